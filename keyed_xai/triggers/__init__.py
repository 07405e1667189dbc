"""Trigger families: from a key's stream to a change of an image. One file per family."""

from collections.abc import Callable

from keyed_xai.array_triggers.derivation import derive_trigger
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

STRONG_KEY_BITS = 128
"""A family with fewer `key_bits` is weak: other keys open by chance. Protect with one only if asked for by name."""


def _spread(amplitude: float, tile: int) -> TriggerFamily:
    return Spread(SpreadSettings(amplitude, tile))


def _nashville(_amplitude: float, _tile: int) -> TriggerFamily:
    return Nashville()


def _moire(_amplitude: float, _tile: int) -> TriggerFamily:
    return Moire()


TRIGGERS: dict[str, Callable[[float, int], TriggerFamily]] = {
    "spread": _spread,
    "nashville": _nashville,
    "moire": _moire,
}
"""Family name to a function of (amplitude in 1/255, tile in pixels); both apply to `spread` only."""
