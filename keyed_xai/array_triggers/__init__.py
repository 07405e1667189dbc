"""Trigger families on NumPy images, without torch. `keyed_xai.triggers` makes the same changes to torch's images.

An image array is float32 [n, c, h, w] in [0, 1]; triggers return a new one and leave theirs alone. The two packages
agree within 1e-6, `nashville` exactly. What both need, the derivation from the key and every number, is kept here.
"""

from collections.abc import Callable

from keyed_xai.array_triggers.moire import ArrayMoire
from keyed_xai.array_triggers.nashville import ArrayNashville
from keyed_xai.array_triggers.protocols import ArrayTrigger, ArrayTriggerFamily
from keyed_xai.array_triggers.spread import ArraySpread, SpreadSettings

__all__ = ["ARRAY_TRIGGERS", "ArrayTrigger", "ArrayTriggerFamily"]


def _spread(amplitude: float, tile: int) -> ArrayTriggerFamily:
    return ArraySpread(SpreadSettings(amplitude, tile))


def _nashville(_amplitude: float, _tile: int) -> ArrayTriggerFamily:
    return ArrayNashville()


def _moire(_amplitude: float, _tile: int) -> ArrayTriggerFamily:
    return ArrayMoire()


ARRAY_TRIGGERS: dict[str, Callable[[float, int], ArrayTriggerFamily]] = {
    "spread": _spread,
    "nashville": _nashville,
    "moire": _moire,
}
"""Family name to a function of (amplitude in 1/255, tile in pixels), as in `keyed_xai.triggers.TRIGGERS`."""
