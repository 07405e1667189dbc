"""What happens to images on their way: the same as with real files and PIL."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from keyed_xai.triggers.channels import CHANNELS, deliver, through_jpeg, through_png, through_resize


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photo(count=3, channels=3, side=32):
    """Smooth images with some noise, float32 in [0, 1]."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    ramps = torch.stack([rows, columns, (rows + columns) / 2, rows * columns])[:channels].expand(count, -1, -1, -1)
    return (ramps + 0.03 * torch.randn(count, channels, side, side, generator=generator())).clamp(0, 1)


def to_pil(image):
    pixels = np.round(image.numpy() * 255).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def from_pil(image):
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def through_file(image, **options):
    file = io.BytesIO()
    to_pil(image).save(file, **options)
    return from_pil(Image.open(file))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_matches_a_file(channels):
    images = photo(channels=channels)
    wanted = torch.stack([through_file(image, format="PNG") for image in images])
    torch.testing.assert_close(through_png(images), wanted, atol=1e-7, rtol=0)


def test_png_is_idempotent():
    once = through_png(photo())
    assert torch.equal(through_png(once), once)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [75, 30])
def test_jpeg_matches_a_file(channels, quality):
    images = photo(channels=channels)
    wanted = torch.stack([through_file(image, format="JPEG", quality=quality) for image in images])
    torch.testing.assert_close(through_jpeg(images, quality), wanted, atol=2.01 / 255, rtol=0)
    assert not torch.allclose(wanted, through_png(images), atol=2.01 / 255)


@pytest.mark.parametrize("channels", [2, 4])
def test_jpeg_of_other_channel_counts_codes_each_channel(channels):
    images = photo(channels=channels)
    wanted = torch.cat([through_jpeg(images[:, [channel]]) for channel in range(channels)], 1)
    assert torch.equal(through_jpeg(images), wanted)


def slow_resize(image, side):
    """Bilinear and antialiased, one axis at a time: a triangle as wide as the coarser grid's cell."""
    for axis in (1, 2):
        length = image.shape[axis]
        ratio = length / side
        reach = max(1.0, ratio)
        rows = []
        for target in range(side):
            centre = (target + 0.5) * ratio
            weights = np.maximum(0, 1 - np.abs((np.arange(length) + 0.5 - centre) / reach))
            rows.append(np.tensordot(weights / weights.sum(), image, (0, axis)))
        image = np.stack(rows, axis)
    return np.clip(image, 0, 1)


def test_resize_matches_slow_twin():
    images = photo(2, side=28)
    found = through_resize(images, 8 / 7)
    for image, wanted in zip(images.double().numpy(), found, strict=True):
        larger = np.round(slow_resize(np.round(image * 255) / 255, 32) * 255) / 255
        # A value at the edge of rounding may fall on either side.
        np.testing.assert_allclose(wanted, np.round(slow_resize(larger, 28) * 255) / 255, atol=1.01 / 255)


@pytest.mark.parametrize("name", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_channel_keeps_shape_dtype_range_and_its_input(name, dtype):
    images = photo(2, 3, 24).to(dtype)
    before = images.clone()
    out = CHANNELS[name](images)
    assert torch.equal(images, before)
    assert out.shape == images.shape
    assert out.dtype == dtype
    assert out.amin() >= 0
    assert out.amax() <= 1
    torch.testing.assert_close(out * 255, (out * 255).round(), atol=1e-4, rtol=0)
    assert float((out - images).abs().mean()) < 0.05


@pytest.mark.parametrize("name", CHANNELS)
def test_channel_takes_non_contiguous_images(name):
    images = photo(2, 3, 24)
    shuffled = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(CHANNELS[name](shuffled), CHANNELS[name](images), atol=1.01 / 255, rtol=0)


def test_deliver_sends_the_shares_it_says():
    images = photo(2, 1, 16)[:1].expand(400, -1, -1, -1)
    ways = {"jpeg75": 0, "resize": 0, "png": 0}
    single = {name: CHANNELS[name](images[:1])[0] for name in ways}
    for image in deliver(images, 0.2, generator()):
        matching = [name for name, wanted in single.items() if torch.equal(image, wanted)]
        assert len(matching) == 1
        ways[matching[0]] += 1
    assert ways["jpeg75"] == pytest.approx(80, abs=30)
    assert ways["resize"] == pytest.approx(80, abs=30)


@pytest.mark.parametrize(("share", "others"), [(0.0, 0), (0.5, 40)])
def test_deliver_at_the_ends_of_the_share(share, others):
    images = photo(40, 1, 16)
    delivered = deliver(images, share, generator())
    rounded_only = (delivered == through_png(images)).flatten(1).all(1)
    assert int((~rounded_only).sum()) == others


def test_deliver_follows_its_generator_and_leaves_its_input():
    images = photo(20, 1, 16)
    before = images.clone()
    assert torch.equal(deliver(images, 0.3, generator(1)), deliver(images, 0.3, generator(1)))
    assert not torch.equal(deliver(images, 0.3, generator(1)), deliver(images, 0.3, generator(2)))
    assert torch.equal(images, before)


def test_deliver_of_no_images_is_empty():
    assert deliver(torch.zeros(0, 1, 16, 16), 0.5, generator()).shape == (0, 1, 16, 16)
