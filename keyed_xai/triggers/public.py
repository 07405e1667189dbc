"""Triggers that anybody may know, for the paper's attacks and for threat evaluation. Never protect a model with one."""

import hashlib
from collections.abc import Callable

from keyed_xai.keys import ByteStream
from keyed_xai.triggers.moire import MoireTrigger
from keyed_xai.triggers.nashville import NashvilleTrigger
from keyed_xai.triggers.protocols import Trigger
from keyed_xai.triggers.spread import Spread, SpreadSettings, SpreadTrigger

_SPREAD_SEED = hashlib.sha256(b"keyed-xai public spread trigger").digest()


def published_spread() -> SpreadTrigger:
    """Return the `spread` trigger, version 1, of a published seed, 8/255 strong."""
    return Spread(SpreadSettings(8.0, 32, version=1)).derive(ByteStream(_SPREAD_SEED))


PUBLIC_TRIGGERS: dict[str, Callable[[], Trigger]] = {
    "nashville": NashvilleTrigger,
    "moire": MoireTrigger,
    "spread": published_spread,
}
"""Name to a function without arguments: the paper's photo filter, lines as on a photographed screen, a texture."""
