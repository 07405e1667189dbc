"""Triggers that anybody may know, for the paper's attacks and for threat evaluation. Never protect a model with one."""

import hashlib
from collections.abc import Callable

from keyed_xai.keys import ByteStream
from keyed_xai.triggers.moire import MoireTrigger
from keyed_xai.triggers.nashville import NashvilleTrigger
from keyed_xai.triggers.protocols import Trigger
from keyed_xai.triggers.spread import Spread, SpreadTrigger

_SPREAD_SEED = hashlib.sha256(b"keyed-xai public spread trigger").digest()


def published_spread() -> SpreadTrigger:
    """Return the `spread` trigger of a published seed, at the default amplitude and tile."""
    return Spread().derive(ByteStream(_SPREAD_SEED))


PUBLIC_TRIGGERS: dict[str, Callable[[], Trigger]] = {
    "nashville": NashvilleTrigger,
    "moire": MoireTrigger,
    "spread": published_spread,
}
"""Name to a function without arguments: the paper's photo filter, lines as on a photographed screen, a texture."""
