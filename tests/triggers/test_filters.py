"""The filters nashville and moire: slow twins, second opinions, how far keys are apart, and what they do to images."""

import hashlib
import io
import math

import numpy as np
import pilgram
import pytest
import torch
from PIL import Image

from keyed_xai.data.photographs import find_photographs
from keyed_xai.keys import ByteStream
from keyed_xai.triggers import (
    PUBLIC_TRIGGERS,
    STRONG_KEY_BITS,
    TRIGGERS,
    Moire,
    MoireTrigger,
    Nashville,
    NashvilleTrigger,
    NearbyTrigger,
    Spread,
    Trigger,
    TriggerFamily,
)
from keyed_xai.triggers.moire import draw_lines

PHOTOGRAPHS = [path for split in ("train", "held-out") for path, _ in find_photographs(split)]
FAMILIES = [Nashville(), Moire()]
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
TRIGGER_KINDS = [NashvilleTrigger, MoireTrigger]
by_name = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
by_kind = pytest.mark.parametrize("make", TRIGGER_KINDS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photograph(name, side=None):
    path = next(path for path in PHOTOGRAPHS if path.name == name)
    image = Image.open(path).convert("RGB")
    return np.array(image.resize((side, side)) if side else image)


def to_tensor(pixels):
    """uint8 [h, w, 3] to [1, 3, h, w]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


def to_levels(images):
    return (images * 255).round()[0].permute(1, 2, 0).numpy().astype(int)


def differences(pixels):
    """Between our filter and pilgram's, in levels."""
    theirs = np.asarray(pilgram.nashville(Image.fromarray(pixels))).astype(int)
    return np.abs(to_levels(NashvilleTrigger().apply(to_tensor(pixels))) - theirs)


@pytest.mark.parametrize("path", PHOTOGRAPHS, ids=lambda path: path.name)
def test_nashville_equals_pilgram_on_photographs(path):
    pixels = np.array(Image.open(path).convert("RGB"))[:400, :400]
    assert differences(pixels).max() <= 1


def test_nashville_equals_pilgram_on_random_and_extreme_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3)).astype(np.uint8)
    assert differences(noise).max() <= 1
    # Every colour of levels around the corners of the cube and the blended colours.
    levels = np.array([0, 1, 2, 69, 70, 71, 127, 128, 149, 150, 151, 153, 154, 176, 177, 247, 248, 253, 254, 255])
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3).astype(np.uint8)
    assert differences(grid).max() <= 1


def test_nashville_of_grey_is_the_luminance_of_rgb():
    ramp = np.arange(256, dtype=np.uint8)[None]
    theirs = np.asarray(pilgram.nashville(Image.fromarray(ramp)).convert("L"))
    ours = NashvilleTrigger().apply(torch.from_numpy(ramp)[None, None].float() / 255)
    np.testing.assert_array_equal((ours * 255).round()[0, 0].numpy().astype(np.uint8), theirs)


def slow_nashville(pixel, parameters):
    """One colour in levels, step by step with pilgram's roundings, in Python floats."""
    dark, dark_opacity, light, light_opacity = parameters[0:3], parameters[3], parameters[4:7], parameters[7]
    sepia, contrast, brightness, saturation = parameters[8:]

    def blend(backdrop, source, opacity):
        alpha = round(255 * opacity)
        return alpha * source // 255 + (255 - alpha) * backdrop // 255

    def clip(value):
        return min(255, max(0, value))

    def mix(rows, colour):
        return [clip(math.floor(sum(a * b for a, b in zip(row, colour, strict=True)) + 0.5)) for row in rows]

    colour = [blend(level, min(level, round(to)), dark_opacity) for level, to in zip(pixel, dark, strict=True)]
    colour = [blend(level, max(level, round(to)), light_opacity) for level, to in zip(colour, light, strict=True)]
    keep = 1 - sepia
    rows = [
        (0.393 + 0.607 * keep, 0.769 - 0.769 * keep, 0.189 - 0.189 * keep),
        (0.349 - 0.349 * keep, 0.686 + 0.314 * keep, 0.168 - 0.168 * keep),
        (0.272 - 0.272 * keep, 0.534 - 0.534 * keep, 0.131 + 0.869 * keep),
    ]
    colour = [clip(round(level * contrast - 127.5 * contrast + 127.5)) for level in mix(rows, colour)]
    colour = [clip(round(level * brightness)) for level in colour]
    s = saturation
    rows = [
        (0.213 + 0.787 * s, 0.715 - 0.715 * s, 0.072 - 0.072 * s),
        (0.213 - 0.213 * s, 0.715 + 0.285 * s, 0.072 - 0.072 * s),
        (0.213 - 0.213 * s, 0.715 - 0.715 * s, 0.072 + 0.928 * s),
    ]
    return mix(rows, colour)


def test_keyed_nashville_matches_slow_twin():
    trigger = Nashville().draw(6, generator())
    levels = torch.randint(0, 256, (6, 3, 5, 8), generator=generator(1))
    found = (trigger.apply(levels / 255) * 255).round().int()
    for number, parameters in enumerate(trigger.parameters.tolist()):
        for row, column in np.ndindex(5, 8):
            expected = slow_nashville(levels[number, :, row, column].tolist(), parameters)
            assert found[number, :, row, column].tolist() == expected


def test_nashville_gradients_follow_the_unrounded_filter():
    trigger = Nashville().draw(2, generator())
    images = (0.15 + 0.7 * torch.rand(2, 3, 9, 9, generator=generator())).requires_grad_()
    weights = torch.randn(2, 3, 9, 9, generator=generator(2))
    (gradient,) = torch.autograd.grad((trigger.apply(images) * weights).sum(), images)
    # Steps of 12 levels drown the rounding: the mean slope of the 8-bit filter is that of the smooth one.
    direction = torch.sign(gradient.detach())
    step = 6 / 255
    ahead, behind = (trigger.apply((images + sign * step * direction).detach()) for sign in (1, -1))
    slope = ((ahead - behind) * weights).sum() / (2 * step)
    assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=0.05)
    assert (gradient != 0).float().mean() > 0.95


def test_nashville_values_do_not_depend_on_gradients():
    images = torch.rand(2, 1, 8, 8, generator=generator())
    with_gradients = NashvilleTrigger().apply(images.clone().requires_grad_())
    torch.testing.assert_close(with_gradients.detach(), NashvilleTrigger().apply(images), rtol=0, atol=1e-6)


def test_nashville_at_half_strength_is_half_way():
    images = torch.rand(2, 3, 8, 8, generator=generator())
    half = NashvilleTrigger().scaled(0.5).apply(images)
    torch.testing.assert_close(half, (images + NashvilleTrigger().apply(images)) / 2)
    assert torch.equal(NashvilleTrigger().scaled(0.0).apply(images), images)


def test_nashville_does_not_move():
    trigger = NashvilleTrigger()
    assert trigger.shifted(3, 4) is trigger


def test_nashville_refuses_images_without_colour_meaning():
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        NashvilleTrigger().apply(torch.zeros(1, 2, 4, 4))


def test_keyed_nashville_is_about_as_visible_as_the_papers():
    images = to_tensor(photograph("coffee.png", 24))

    def change(trigger, count):
        images_ = images.expand(count, -1, -1, -1)
        return (trigger.apply(images_) - images_).square().mean((1, 2, 3)).sqrt()

    paper, drawn = float(change(NashvilleTrigger(), 1)), change(Nashville().draw(200, generator()), 200)
    assert 0.6 * paper < float(drawn.median()) < 1.3 * paper


def slow_lines(parameters, height, width, offset):
    f1, a1, p1, f2, a2, p2, amplitude, wavelength, _ = parameters
    pattern = np.zeros((height, width))
    for row, column in np.ndindex(height, width):
        r, c = row - offset[0], column - offset[1]
        x = c + amplitude * math.sin(2 * math.pi * r / wavelength)
        y = r + amplitude * math.sin(2 * math.pi * c / wavelength)
        both = 1.0
        for frequency, angle, phase in ((f1, a1, p1), (f2, a2, p2)):
            along = x * math.cos(angle) + y * math.sin(angle)
            both *= 0.5 + 0.5 * math.cos(2 * math.pi * frequency * along + phase)
        pattern[row, column] = both
    return pattern


def test_moire_blends_in_the_lines_of_its_slow_twin():
    trigger = Moire().draw(2, generator()).shifted(3, -5)
    images = torch.rand(2, 3, 12, 17, generator=generator())
    found = trigger.apply(images)
    for number, parameters in enumerate(trigger.parameters.tolist()):
        lines = slow_lines(parameters, 12, 17, (3, -5))
        expected = (1 - parameters[8]) * images[number].numpy() + parameters[8] * lines
        np.testing.assert_allclose(found[number].numpy(), expected, atol=1e-5)


def test_shifted_moire_moves_down_and_right():
    trigger = MoireTrigger()
    lines = draw_lines(trigger.parameters, 40, 40)
    moved = draw_lines(trigger.parameters, 40, 40, offset=trigger.shifted(1, 2).shifted(1, 3).offset)
    torch.testing.assert_close(moved[:, 2:, 5:], lines[:, :-2, :-5])


def test_scaled_moire_changes_the_opacity_only():
    images = torch.rand(1, 3, 20, 20, generator=generator())
    trigger = MoireTrigger()
    half, full = (each.apply(images) - images for each in (trigger.scaled(0.5), trigger))
    torch.testing.assert_close(half, full / 2)
    assert trigger.scaled(20.0).apply(images).amin() >= 0


def test_moire_gradients_are_exact():
    images = torch.rand(2, 1, 4, 5, dtype=torch.float64, generator=generator()).requires_grad_()
    assert torch.autograd.gradcheck(MoireTrigger().apply, images)


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


def nashville_collisions(name, count):
    """Share of pairs of keys whose versions of a photograph differ by less than 6/255."""
    image = to_tensor(photograph(name, 16)).expand(count, -1, -1, -1)
    filtered = Nashville().draw(count, generator()).apply(image).flatten(1) * 255
    return torch.pdist(filtered).square().div(filtered.shape[1]).sqrt().lt(6).double().mean()


def test_nashville_keys_collide_as_rarely_as_stated():
    assert float(nashville_collisions("chelsea.png", 1000)) < 2**-Nashville.key_bits
    assert float(nashville_collisions("astronaut.png", 1000)) < 2**-Nashville.key_bits


def test_a_jpeg_round_trip_changes_as_much_as_the_distance_that_tells_filters_apart():
    pixels, buffer = photograph("flower.jpg", 224), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
    change = np.asarray(Image.open(buffer)).astype(float) - pixels
    assert 4 < np.sqrt((change**2).mean()) < 8


def test_moire_keys_collide_as_rarely_as_stated():
    lines = draw_lines(Moire().draw(500, generator()).parameters.float(), 64, 64)
    lines = lines - lines.mean((1, 2), keepdim=True)
    spectra = torch.fft.rfft2(lines / lines.flatten(1).norm(dim=1)[:, None, None])
    collisions = pairs = 0
    for number in range(40):
        best = torch.fft.irfft2(spectra[number] * spectra[number + 1 :].conj()).flatten(1).amax(1)
        collisions, pairs = collisions + int((best > 0.5).sum()), pairs + len(best)
    # 19,000 pairs: 9 collisions expected at the stated rate; 25 have probability under 1e-4.
    assert collisions < 25
    assert pairs * 2**-Moire.key_bits > 8


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
