"""Trigger families on NumPy images, without torch. `keyed_xai.triggers` makes the same changes to torch's images.

An image array is float32 [n, c, h, w] in [0, 1]; triggers return a new one and leave theirs alone. The two packages
agree within 1e-6, `nashville` exactly. What both need, the derivation from the key and every number, is kept here.
"""

from typing import Protocol

from keyed_xai.array_triggers.moire import ArrayMoire
from keyed_xai.array_triggers.nashville import ArrayNashville
from keyed_xai.array_triggers.parameters import require_first_version
from keyed_xai.array_triggers.protocols import ArrayTrigger, ArrayTriggerFamily
from keyed_xai.array_triggers.spread import VERSION, ArraySpread, SpreadSettings

__all__ = ["ARRAY_TRIGGERS", "ArrayTrigger", "ArrayTriggerFamily"]


class MakeArrayFamily(Protocol):
    """Makes a family of public parameters."""

    def __call__(self, amplitude: float, tile: int, version: int = ...) -> ArrayTriggerFamily:
        """Return the family; in the version that models are protected with where none is named.

        Args:
            amplitude: Largest change of a pixel, 1/255; for `spread` only.
            tile: Side of the repeated tile, pixels; likewise.
            version: Version of the triggers.

        Raises:
            ValueError: A parameter is outside its range, or there is no such version.
        """


def _spread(amplitude: float, tile: int, version: int = VERSION) -> ArrayTriggerFamily:
    return ArraySpread(SpreadSettings(amplitude, tile, version))


def _nashville(amplitude: float, tile: int, version: int = 1) -> ArrayTriggerFamily:  # noqa: ARG001 - it has neither
    require_first_version(version)
    return ArrayNashville()


def _moire(amplitude: float, tile: int, version: int = 1) -> ArrayTriggerFamily:  # noqa: ARG001 - it has neither
    require_first_version(version)
    return ArrayMoire()


ARRAY_TRIGGERS: dict[str, MakeArrayFamily] = {
    "spread": _spread,
    "nashville": _nashville,
    "moire": _moire,
}
"""Family name to what makes it, as in `keyed_xai.triggers.TRIGGERS`."""
