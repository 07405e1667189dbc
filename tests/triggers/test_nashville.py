"""The filter nashville: pilgram as a second opinion, a slow twin, its gradients, and how often keys collide."""

import io
import math

import numpy as np
import pilgram
import pytest
import torch
from PIL import Image

from keyed_xai.data.photographs import find_photographs
from keyed_xai.triggers import Nashville, NashvilleTrigger
from tests.triggered import generator

PHOTOGRAPHS = [path for split in ("train", "held-out") for path, _ in find_photographs(split)]


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
