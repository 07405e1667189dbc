"""What filters promise of their triggers, keyed or public, and families of what they make."""

import hashlib
import math

import numpy as np
import pytest
import torch

from keyed_xai.keys import ByteStream
from keyed_xai.triggers import (
    PUBLIC_TRIGGERS,
    STRONG_KEY_BITS,
    TRIGGERS,
    NashvilleTrigger,
    NearbyTrigger,
    Spread,
    Trigger,
    TriggerFamily,
)
from tests.triggered import by_kind, by_name, generator

FIXED = {
    "nashville": [
        203.51993295480497, 190.77582798781805, 162.20732699381188, 0.4926609721500427, 51.72467589145526,
        68.09280565939844, 51.03142362786457, 0.3458888207678683, 0.10479808170348406, 1.1830074560595678,
        1.0904500395292418, 0.9139943209011108,
    ],
    "moire": [
        0.15135991060640663, 1.2200099204816215, 0.730484739118624, 0.12324178700335325, 1.083319078599393,
        2.852264773625115, 2.0206284725572914, 100.82130717486143, 0.176199520425871,
    ],
}  # fmt: skip


@by_name
def test_batch_of_triggers_gives_every_image_its_own(family):
    drawn, images = family.draw(3, generator()), torch.rand(3, 3, 20, 30, generator=generator())
    together = drawn.apply(images)
    for number in range(3):
        alone = type(drawn)(drawn.parameters[number : number + 1]).apply(images[number : number + 1])
        torch.testing.assert_close(together[number], alone[0], rtol=0, atol=1e-6)


@by_name
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_left_alone_and_stay_in_range(family, channels):
    images = torch.rand(4, channels, 20, 20, generator=generator()).round(decimals=1)
    before = images.clone()
    found = family.draw(4, generator()).apply(images)
    assert torch.equal(images, before)
    assert found.shape == images.shape
    assert found.amin() >= 0
    assert found.amax() <= 1
    assert not torch.equal(found, images)


@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept(make, dtype):
    assert make().apply(torch.full((1, 3, 8, 8), 0.5, dtype=dtype)).dtype == dtype
    assert make().apply(torch.full((1, 3, 8, 8), 0.5, dtype=dtype, requires_grad=True)).dtype == dtype


@by_kind
def test_empty_batch_stays_empty(make):
    assert make().apply(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)


@by_name
def test_too_few_triggers_are_refused(family):
    with pytest.raises(ValueError, match="Expected 1 or 3 .*, got 2"):
        family.draw(2, generator()).apply(torch.zeros(3, 3, 8, 8))


@by_name
def test_derive_reads_one_word_for_each_parameter(family):
    seed = bytes(32)
    words, stream = ByteStream(seed).uint32(20), ByteStream(seed)
    parameters = family.derive(stream).parameters[0].numpy()
    assert stream.uint32(1)[0] == words[len(parameters)]
    many = family.draw(4000, generator()).parameters
    least, greatest = many.amin(0).numpy(), many.amax(0).numpy()
    np.testing.assert_allclose((parameters - least) / (greatest - least), words[: len(parameters)] / 2**32, atol=0.01)


@by_name
def test_derived_triggers_are_fixed(family):
    """Parameters of the all-zero seed, in format version 1: other values would lock owners out of their models."""
    expected = FIXED[family.name]
    assert family.derive(ByteStream(bytes(32))).parameters[0].tolist() == pytest.approx(expected, rel=1e-12)


@by_name
def test_derived_and_drawn_triggers_have_the_same_distribution(family):
    seeds = [number.to_bytes(32, "big") for number in range(1000)]
    derived = torch.cat([family.derive(ByteStream(seed)).parameters for seed in seeds])
    drawn = family.draw(1000, generator()).parameters
    spread = drawn.std(0)
    assert ((derived.mean(0) - drawn.mean(0)).abs() < 5 * spread * math.sqrt(2 / 1000)).all()
    for share in (0.1, 0.5, 0.9):
        gap = (derived.quantile(share, dim=0) - drawn.quantile(share, dim=0)).abs()
        assert (gap < 0.3 * spread).all()


@by_name
def test_draw_follows_its_generator(family):
    assert torch.equal(family.draw(2, generator(5)).parameters, family.draw(2, generator(5)).parameters)
    assert not torch.equal(family.draw(2, generator(5)).parameters, family.draw(2, generator(6)).parameters)


@by_name
def test_near_moves_one_parameter_a_little_and_stays_in_range(family):
    many = family.draw(4000, generator()).parameters
    least, greatest = many.amin(0), many.amax(0)
    trigger, source, moved = family.derive(ByteStream(bytes(32))), generator(), set()
    for _ in range(200):
        change = (trigger.perturbed(source).parameters - trigger.parameters)[0] / (greatest - least)
        (column,) = change.nonzero().flatten().tolist()
        moved.add(column)
        assert 0.12 < abs(float(change[column])) < 0.26
        assert (trigger.perturbed(source).parameters[0] >= least - 1e-2 * (greatest - least)).all()
        assert (trigger.perturbed(source).parameters[0] <= greatest + 1e-2 * (greatest - least)).all()
    assert moved == set(range(len(change)))


@by_kind
def test_repr_hides_the_secret(make):
    assert repr(make()) == f"{make.__name__}()"


def test_filters_are_weak_and_the_texture_is_strong():
    strong = {name for name, make in TRIGGERS.items() if make(8.0, 32).key_bits >= STRONG_KEY_BITS}
    assert strong == {"spread"}


def test_every_family_is_found_under_its_name():
    for name, make in TRIGGERS.items():
        family = make(8.0, 32)
        assert isinstance(family, TriggerFamily)
        assert family.name == name
        assert isinstance(family.derive(ByteStream(bytes(32))), NearbyTrigger)
        assert family.draw(2, generator()).apply(torch.rand(2, 3, 40, 40, generator=generator())).shape[0] == 2


def test_public_triggers_are_the_published_ones():
    images = torch.rand(2, 3, 40, 40, generator=generator())
    seed = hashlib.sha256(b"keyed-xai public spread trigger").digest()
    assert PUBLIC_TRIGGERS.keys() == {"nashville", "moire", "spread"}
    assert all(isinstance(make(), Trigger) for make in PUBLIC_TRIGGERS.values())
    for name, same in {"nashville": NashvilleTrigger(), "spread": Spread().derive(ByteStream(seed))}.items():
        assert torch.equal(PUBLIC_TRIGGERS[name]().apply(images), same.apply(images))
    assert not torch.equal(PUBLIC_TRIGGERS["moire"]().apply(images), images)
