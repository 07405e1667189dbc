"""Triggers on arrays: the same images as the torch families make, key by key, and the same derivation."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keyed_xai.array_triggers import ARRAY_TRIGGERS, ArrayTrigger, ArrayTriggerFamily
from keyed_xai.array_triggers.parameters import Ranges
from keyed_xai.keys import ByteStream
from keyed_xai.triggers import TRIGGERS

FAMILIES = list(TRIGGERS)
by_family = pytest.mark.parametrize("family", FAMILIES)


def noise(shape, seed=0):
    """Random pixels, every other one of 8 bits, with black and white among them."""
    random = np.random.default_rng(seed)
    pixels = random.random(shape, dtype=np.float32)
    rounded = np.round(pixels * 255).astype(np.float32) / np.float32(255)
    mixed = np.where(random.random(shape) < 0.5, rounded, pixels)
    return np.where(random.random(shape) < 0.1, np.round(mixed), mixed).astype(np.float32)


def both(family, seed, images, amplitude=8.0, tile=32):
    """What a key's trigger makes of images on arrays, and what it makes of them in torch."""
    found = ARRAY_TRIGGERS[family](amplitude, tile).derive(ByteStream(seed)).apply(images)
    expected = TRIGGERS[family](amplitude, tile).derive(ByteStream(seed)).apply(torch.from_numpy(images.copy()))
    return found, expected.numpy()


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


@pytest.mark.parametrize("channels", [1, 3])
def test_nashville_decides_ties_as_torch(channels):
    halves = (np.arange(255, dtype=np.float32) + np.float32(0.5)) / np.float32(255)
    near = np.concatenate([halves, np.nextafter(halves, np.float32(0)), np.nextafter(halves, np.float32(1))])
    images = np.broadcast_to(near[None, None, None], (1, channels, 2, len(near))).copy()
    for number in range(20):
        found, expected = both("nashville", bytes([number]) * 32, images)
        np.testing.assert_array_equal(found, expected)


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


@pytest.mark.parametrize("channels", [2, 4])
def test_nashville_refuses_what_is_no_photograph(channels):
    with pytest.raises(ValueError, match=f"1 or 3 channels, got {channels}"):
        both("nashville", bytes(32), noise((1, channels, 8, 8)))


@pytest.mark.parametrize(("amplitude", "tile"), [(0.0, 32), (65.0, 32), (math.nan, 32), (8.0, 23), (8.0, 257)])
def test_impossible_parameters_are_refused(amplitude, tile):
    with pytest.raises(ValueError, match="expected"):
        ARRAY_TRIGGERS["spread"](amplitude, tile)


def test_parameters_are_uniform_words_of_the_stream():
    ranges = Ranges([(0.5, 0.0, 1.0), (3.0, 2.0, 6.0)])
    words = ByteStream(b"seed").uint32(3)
    stream = ByteStream(b"seed")
    assert ranges.derive(stream).tolist() == [words[0] / 2**32, 2 + 4 * words[1] / 2**32]
    assert stream.uint32(1)[0] == words[2]


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
