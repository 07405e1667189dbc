"""Trigger families on NumPy images, without torch. `keyed_xai.triggers` makes the same changes to torch's images.

An image array is float32 [n, c, h, w] in [0, 1]; triggers return a new one and leave theirs alone. The two packages
agree within 1e-6, `nashville` exactly. What both need, the derivation from the key and every number, is kept here.
"""

from keyed_xai.array_triggers.derivation import MakeFamily, without_parameters
from keyed_xai.array_triggers.moire import ArrayMoire
from keyed_xai.array_triggers.nashville import ArrayNashville
from keyed_xai.array_triggers.protocols import ArrayTrigger, ArrayTriggerFamily
from keyed_xai.array_triggers.spread import ArraySpread, SpreadSettings

__all__ = ["ARRAY_TRIGGERS", "ArrayTrigger", "ArrayTriggerFamily"]


def _spread(amplitude: float, tile: int, version: int = 1) -> ArrayTriggerFamily:
    return ArraySpread(SpreadSettings(amplitude, tile, version))


ARRAY_TRIGGERS: dict[str, MakeFamily[ArrayTriggerFamily]] = {
    "spread": _spread,
    "nashville": without_parameters(ArrayNashville),
    "moire": without_parameters(ArrayMoire),
}
"""Family name to what makes it, as in `keyed_xai.triggers.TRIGGERS`."""
