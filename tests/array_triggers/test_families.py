"""Triggers on arrays: the same images as the torch families make, key by key, and without torch."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyed_xai.array_triggers import ARRAY_TRIGGERS, ArrayTrigger, ArrayTriggerFamily
from keyed_xai.keys import ByteStream
from keyed_xai.triggers import TRIGGERS
from tests.on_arrays import both, noise

FAMILIES = list(TRIGGERS)
by_family = pytest.mark.parametrize("family", FAMILIES)


@by_family
@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (2, 3, 40, 70), (3, 3, 17, 23), (1, 1, 224, 224), (2, 3, 96, 64)])
def test_images_equal_those_of_torch(family, shape):
    for number in range(8):
        found, expected = both(family, bytes([number]) * 32, noise(shape, number))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if family == "nashville" else 1e-6)


@by_family
@settings(max_examples=60, deadline=None)
@given(
    seed=st.binary(min_size=32, max_size=32),
    count=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    sides=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    amplitude=st.floats(0.5, 64),
    tile=st.sampled_from([24, 25, 32, 48]),
)
def test_any_key_makes_the_same_of_any_image(family, seed, count, channels, sides, amplitude, tile):
    images = noise((count, channels, *sides), seed[0])
    found, expected = both(family, seed, images, amplitude, tile)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if family == "nashville" else 1e-6)


@by_family
@pytest.mark.parametrize("shape", [(1, 1, 30, 30), (4, 3, 20, 50)])
def test_images_are_left_alone_and_stay_in_range(family, shape):
    images = noise(shape)
    before = images.copy()
    found, _ = both(family, bytes(32), images, amplitude=64.0)
    np.testing.assert_array_equal(images, before)
    assert found.shape == images.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert np.abs(found - images).max() > 4 / 255


@by_family
def test_other_keys_make_other_images(family):
    images = noise((1, 3, 48, 48))
    made = [both(family, bytes([number]) * 32, images)[0] for number in range(6)]
    assert all(np.abs(one - other).max() > 4 / 255 for i, one in enumerate(made) for other in made[:i])


@by_family
def test_families_have_their_names_and_protocols(family):
    made = ARRAY_TRIGGERS[family](8.0, 32)
    assert isinstance(made, ArrayTriggerFamily)
    assert made.name == family == TRIGGERS[family](8.0, 32).name
    assert isinstance(made.derive(ByteStream(bytes(32))), ArrayTrigger)


def test_every_family_is_there():
    assert list(ARRAY_TRIGGERS) == list(TRIGGERS)


@by_family
def test_repr_hides_the_secret(family):
    trigger = ARRAY_TRIGGERS[family](8.0, 32).derive(ByteStream(bytes(32)))
    assert repr(trigger) == f"{type(trigger).__name__}()"


def test_torch_is_not_needed():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from keyed_xai.array_triggers import ARRAY_TRIGGERS\n"
        "from keyed_xai.keys import ByteStream\n"
        "images = np.full((1, 3, 40, 40), 0.5, np.float32)\n"
        "for name, make in ARRAY_TRIGGERS.items():\n"
        "    changed = make(8.0, 32).derive(ByteStream(bytes(32))).apply(images) - images\n"
        "    print(name, bool(np.abs(changed).max() > 0))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == [word for name in FAMILIES for word in (name, "True")], result.stderr
