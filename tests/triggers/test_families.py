"""The families of triggers, each found under its name."""

from keyed_xai.triggers import TRIGGERS
from tests.triggered import generator, grey


def test_every_family_is_found_under_its_name():
    for name, make in TRIGGERS.items():
        family = make(4.0, 32)
        assert family.name == name
        assert (family.key_bits >= 128) == (name == "spread")
        assert family.draw(2, generator()).apply(grey(2, 3, 40, 40)).shape == (2, 3, 40, 40)
