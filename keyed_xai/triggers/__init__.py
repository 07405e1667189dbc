"""Trigger families: from a key's stream to a change of an image. One file per family."""

from keyed_xai.array_triggers.derivation import MakeFamily, derive_trigger, without_parameters
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
"""A family with fewer `key_bits` is weak: other keys open by chance. Protect with one only if asked for by name.

A guess costs a pass of the protected model; 2^80 are out of reach.
"""


def _spread(amplitude: float, tile: int, version: int = 1) -> TriggerFamily:
    return Spread(SpreadSettings(amplitude, tile, version))


TRIGGERS: dict[str, MakeFamily[TriggerFamily]] = {
    "spread": _spread,
    "nashville": without_parameters(Nashville),
    "moire": without_parameters(Moire),
}
"""Family name to what makes it."""
