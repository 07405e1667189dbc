"""Triggers that anybody may know are the published ones."""

import hashlib

import torch

from keyed_xai.keys import ByteStream
from keyed_xai.triggers import PUBLIC_TRIGGERS, NashvilleTrigger, Spread, Trigger
from tests.triggered import generator


def test_public_triggers_are_the_published_ones():
    images = torch.rand(2, 3, 40, 40, generator=generator())
    seed = hashlib.sha256(b"keyed-xai public spread trigger").digest()
    assert PUBLIC_TRIGGERS.keys() == {"nashville", "moire", "spread"}
    assert all(isinstance(make(), Trigger) for make in PUBLIC_TRIGGERS.values())
    for name, same in {"nashville": NashvilleTrigger(), "spread": Spread().derive(ByteStream(seed))}.items():
        assert torch.equal(PUBLIC_TRIGGERS[name]().apply(images), same.apply(images))
    assert not torch.equal(PUBLIC_TRIGGERS["moire"]().apply(images), images)
