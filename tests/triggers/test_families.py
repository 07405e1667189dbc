"""The families of triggers: each is found under its name, and which of them is strong."""

from keyed_xai.triggers import STRONG_KEY_BITS, TRIGGERS
from tests.triggered import generator, grey


def test_every_family_is_found_under_its_name():
    for name, make in TRIGGERS.items():
        family = make(4.0, 32)
        assert family.name == name
        assert (family.key_bits >= 128) == (name == "spread")
        assert family.draw(2, generator()).apply(grey(2, 3, 40, 40)).shape == (2, 3, 40, 40)


def test_filters_are_weak_and_the_texture_is_strong():
    strong = {name for name, make in TRIGGERS.items() if make(8.0, 32).key_bits >= STRONG_KEY_BITS}
    assert strong == {"spread"}
