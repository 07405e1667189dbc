"""The families of triggers: each is found under its name, and which of them is strong."""

import pytest

from keyed_xai.triggers import STRONG_KEY_BITS, TRIGGERS
from tests.triggered import generator, grey


def test_every_family_is_found_under_its_name():
    for name, make in TRIGGERS.items():
        family = make(4.0, 32)
        assert family.name == name
        assert family.draw(2, generator()).apply(grey(2, 3, 40, 40)).shape == (2, 3, 40, 40)


def test_filters_are_weak_and_the_texture_is_strong():
    assert STRONG_KEY_BITS >= 80
    strong = {name for name, make in TRIGGERS.items() if make(8.0, 32).key_bits >= STRONG_KEY_BITS}
    assert strong == {"spread"}
    assert TRIGGERS["spread"](5.0, 32, version=2).key_bits >= STRONG_KEY_BITS


def test_textures_have_the_version_asked_for():
    assert [TRIGGERS["spread"](5.0, 32, version).version for version in (1, 2)] == [1, 2]
    assert TRIGGERS["spread"](5.0, 32).version == 1
    with pytest.raises(ValueError, match="24 to 256 pixels, got 16"):
        TRIGGERS["spread"](5.0, 16)
    with pytest.raises(ValueError, match="32 to 256 pixels, got 24"):
        TRIGGERS["spread"](5.0, 24, version=2)
