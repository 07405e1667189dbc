"""Every family, and the triggers that it makes, can do what the protocols ask."""

import torch

from keyed_xai.keys import ByteStream
from keyed_xai.triggers import TRIGGERS, NearbyTrigger, TriggerFamily
from tests.triggered import generator


def test_every_family_is_found_under_its_name():
    for name, make in TRIGGERS.items():
        family = make(8.0, 32)
        assert isinstance(family, TriggerFamily)
        assert family.name == name
        assert isinstance(family.derive(ByteStream(bytes(32))), NearbyTrigger)
        assert family.draw(2, generator()).apply(torch.rand(2, 3, 40, 40, generator=generator())).shape[0] == 2
