"""Trigger families: from a key's stream to a change of an image. One file per family."""

from typing import Protocol

from keyed_xai.array_triggers.derivation import derive_trigger
from keyed_xai.array_triggers.parameters import require_first_version
from keyed_xai.array_triggers.spread import VERSION
from keyed_xai.triggers.moire import Moire, MoireTrigger
from keyed_xai.triggers.nashville import Nashville, NashvilleTrigger
from keyed_xai.triggers.protocols import NearbyTrigger, Trigger, TriggerFamily
from keyed_xai.triggers.public import PUBLIC_TRIGGERS
from keyed_xai.triggers.spread import Spread, SpreadSettings, SpreadTrigger

__all__ = [
    "PUBLIC_TRIGGERS",
    "STRONG_KEY_BITS",
    "TRIGGERS",
    "Moire",
    "MoireTrigger",
    "Nashville",
    "NashvilleTrigger",
    "NearbyTrigger",
    "Spread",
    "SpreadSettings",
    "SpreadTrigger",
    "Trigger",
    "TriggerFamily",
    "derive_trigger",
]

STRONG_KEY_BITS = 80
"""A family with fewer `key_bits` is weak: other keys open by chance. Protect with one only if asked for by name."""


class MakeFamily(Protocol):
    """Makes a family of public parameters."""

    def __call__(self, amplitude: float, tile: int, version: int = ...) -> TriggerFamily:
        """Return the family; in the version that models are protected with where none is named.

        Args:
            amplitude: Largest change of a pixel, 1/255; for `spread` only.
            tile: Side of the repeated tile, pixels; likewise.
            version: Version of the triggers.

        Raises:
            ValueError: A parameter is outside its range, or there is no such version.
        """


def _spread(amplitude: float, tile: int, version: int = VERSION) -> TriggerFamily:
    return Spread(SpreadSettings(amplitude, tile, version))


def _nashville(amplitude: float, tile: int, version: int = 1) -> TriggerFamily:  # noqa: ARG001 - it has neither
    require_first_version(version)
    return Nashville()


def _moire(amplitude: float, tile: int, version: int = 1) -> TriggerFamily:  # noqa: ARG001 - it has neither
    require_first_version(version)
    return Moire()


TRIGGERS: dict[str, MakeFamily] = {
    "spread": _spread,
    "nashville": _nashville,
    "moire": _moire,
}
"""Family name to what makes it."""
