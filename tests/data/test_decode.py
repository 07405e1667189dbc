"""One image file to pixels: modes, orientation, crop, and files that mean harm."""

import contextlib
import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from keyed_xai.data import read_image
from keyed_xai.data.decode import fit_image, read_image_bytes
from keyed_xai.errors import DataError


def colour_of(path, channels=3, size=(6, 6)):
    """Return the one colour of an image, after a check that it has only one (to within a level)."""
    pixels = read_image(path, channels=channels, height=size[0], width=size[1])
    assert pixels.dtype == np.uint8
    assert pixels.shape == (channels, *size)
    assert np.ptp(pixels, axis=(1, 2)).max() <= 1
    return pixels[:, 2, 2].tolist()


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif", "webp", "ppm", "jpg"])
def test_common_formats_are_read(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (16, 16), (200, 100, 50)).save(path, lossless=True)
    assert np.abs(np.subtract(colour_of(path), (200, 100, 50))).max() <= 4


MODES = {
    "grey": (Image.new("L", (9, 9), 90), [90, 90, 90]),
    "bits": (Image.new("1", (9, 9), 1), [255, 255, 255]),
    "palette": (Image.new("RGB", (9, 9), (10, 200, 30)).quantize(4), [10, 200, 30]),
    "half transparent": (Image.new("RGBA", (9, 9), (255, 0, 0, 128)), [255, 127, 127]),
    "transparent": (Image.new("RGBA", (9, 9), (0, 0, 0, 0)), [255, 255, 255]),
    "grey and alpha": (Image.new("LA", (9, 9), (0, 51)), [204, 204, 204]),
    "16 bits": (Image.fromarray(np.full((9, 9), 257 * 77, np.uint16)), [77, 77, 77]),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode_becomes_grey_or_rgb(tmp_path, name, channels):
    image, expected = MODES[name]
    path = tmp_path / "x.png"
    image.save(path)
    if channels == 1:
        expected = [expected @ np.array([0.299, 0.587, 0.114])]
    assert np.abs(np.subtract(colour_of(path, channels), expected)).max() <= 1


def test_transparent_palette_and_colour_key_are_flattened_on_white(tmp_path):
    palette = Image.new("P", (9, 9), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert colour_of(tmp_path / "palette.png") == [255, 255, 255]
    assert colour_of(tmp_path / "key.png") == [255, 255, 255]


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    red, green, blue = colour_of(tmp_path / "x.jpg")
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_twelve_bits_in_a_file_of_sixteen_are_scaled(tmp_path, suffix, channels):
    """White is 4,095 where nothing is above it, and 65,535 where something is, over the whole image."""
    ramp = np.linspace(0, 4095, 700 * 600).round().astype(np.uint16).reshape(600, 700)
    Image.fromarray(ramp).save(tmp_path / f"twelve.{suffix}")
    pixels = read_image(tmp_path / f"twelve.{suffix}", channels=channels, height=600, width=700)
    assert np.array_equal(pixels, np.repeat((ramp / (4095 / 255)).round()[None].astype(np.uint8), channels, 0))
    ramp[0, 0] = 4096
    Image.fromarray(ramp).save(tmp_path / f"sixteen.{suffix}")
    assert read_image(tmp_path / f"sixteen.{suffix}", channels=1, height=600, width=700).max() == 16


@pytest.mark.parametrize("values", [np.full((9, 9), 0.5, np.float32), np.full((9, 9), 70_000, np.int32)])
def test_values_of_unknown_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="unknown range; save it with 8 or 16 bits"):
        read_image(tmp_path / "x.tif", channels=1, height=6, width=6)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / "x.png", exif=exif)
    pixels = read_image(tmp_path / "x.png", channels=1, height=32, width=32)[0]
    assert pixels[:, 20:].min() > 240
    assert pixels[:, :12].max() < 15


def test_broken_exif_does_not_cost_the_image(tmp_path):
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff rubbish")
    assert colour_of(tmp_path / "x.jpg") == [9, 9, 9]


def test_crop_is_central_and_keeps_the_aspect_ratio(tmp_path):
    image = Image.new("L", (300, 100), 0)
    image.paste(255, (100, 0, 200, 100))
    image.save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", channels=1, height=20, width=20)[0, :, 1:-1].min() == 255
    wide = read_image(tmp_path / "x.png", channels=1, height=20, width=60)[0]
    assert wide[:, :18].max() == 0
    assert wide[:, 22:38].min() == 255


def test_large_jpeg_is_scaled_like_the_slow_way(tmp_path):
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1600, 1200))
    smooth.save(tmp_path / "x.jpg", quality=95)
    smooth.save(tmp_path / "x.png")
    fast, slow = (read_image(tmp_path / name, channels=3, height=48, width=48) for name in ("x.jpg", "x.png"))
    assert np.abs(fast.astype(int) - slow).mean() < 2


def test_extreme_aspect_ratio_needs_little_memory(tmp_path):
    Image.new("1", (1_000_000, 1)).save(tmp_path / "x.png")
    assert colour_of(tmp_path / "x.png", 3, (64, 64)) == [0, 0, 0]


def png_bomb(side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_bytes_are_read_like_their_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.jpg")
    data = (tmp_path / "p.jpg").read_bytes()
    expected = read_image(tmp_path / "p.jpg", channels=3, height=20, width=20)
    np.testing.assert_array_equal(read_image_bytes(data, channels=3, height=20, width=20), expected)
    with pytest.raises(DataError, match="the image: not a readable image"):
        read_image_bytes(data[:100], channels=3, height=20, width=20)
    with pytest.raises(DataError, match="70x50 is over 3499 pixels") as refused:
        read_image_bytes(data, channels=3, height=20, width=20, largest=3499)
    assert isinstance(refused.value.__cause__, Image.DecompressionBombError)


@pytest.mark.parametrize("side", [9_500, 14_000, 60_000])
def test_decompression_bomb_is_refused(tmp_path, side):
    (tmp_path / "x.png").write_bytes(png_bomb(side))
    with pytest.raises(DataError, match="pixels"):
        read_image(tmp_path / "x.png", channels=3, height=8, width=8)


def broken_files():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    return {"empty": b"", "text": b"I am no image", "eps": eps, "cut header": png_bomb(4)[:45], "zeros": bytes(500)}


@pytest.mark.parametrize("name", broken_files())
def test_what_is_no_image_is_refused(tmp_path, name):
    path = tmp_path / "x.png"
    path.write_bytes(broken_files()[name])
    with pytest.raises(DataError, match="x.png: not a readable image"):
        read_image(path, channels=3, height=8, width=8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "bmp", "ppm"])
def test_truncated_or_altered_file_gives_pixels_or_our_error(tmp_path, suffix):
    generator = np.random.default_rng(1)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    for _ in range(40):
        data = bytearray(whole[: generator.integers(1, len(whole) + 1)])
        data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        path.write_bytes(data)
        with contextlib.suppress(DataError):
            assert read_image(path, channels=3, height=8, width=8).shape == (3, 8, 8)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a readable image"):
        read_image(path, channels=3, height=8, width=8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*MODES, "32 bits"])
def test_mode_changed_in_strips_gives_the_same_pixels(monkeypatch, name, channels):
    generator = np.random.default_rng(2)
    like = Image.new("I", (1, 1)) if name == "32 bits" else MODES[name][0]
    noise = Image.fromarray(generator.integers(0, 256, (23, 31, 3), dtype=np.uint8))
    if like.mode in ("I", "I;16"):
        kind = np.int32 if like.mode == "I" else np.uint16
        image = Image.fromarray(generator.integers(0, 65536, (23, 31)).astype(kind))
    else:
        image = noise.quantize(40) if like.mode == "P" else noise.convert(like.mode)
    if "A" in image.mode:
        image.putalpha(Image.fromarray(generator.integers(0, 256, (23, 31), dtype=np.uint8)))
    whole = fit_image(image, channels, 9, 8)
    monkeypatch.setattr("keyed_xai.data.decode._STRIP", 70)
    assert np.array_equal(fit_image(image, channels, 9, 8), whole)


MEMORY = """
import json, os, sys
from keyed_xai.data.decode import measure_image, read_image_bytes
shape = {"channels": 3, "height": 8, "width": 8}
def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
def measure(data):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before = memory("VmRSS")
    measured = measure_image(data, **shape)
    read_image_bytes(data, **shape)
    print(json.dumps([memory("VmHWM") - before, measured]), flush=True)
small, *large = [open(path, "rb").read() for path in sys.argv[1:]]
measure(small)  # imports what is imported late
for data in large:
    if child := os.fork():
        os.waitpid(child, 0)
    else:  # a process of its own: none starts with memory that another picture left behind
        read_image_bytes(small, **shape)  # and its own pages of what is imported
        measure(data)
        os._exit(0)
"""


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


SIDE = 3000
# Kind, and bytes of a pixel as it is decoded, in 8 bits.
LARGE = {
    "16 bits.png": (lambda: Image.fromarray(np.full((SIDE, SIDE), 770, np.uint16)), {}, 1),
    "grey.png": (lambda: Image.new("L", (SIDE, SIDE), 90), {}, 1),
    "grey and alpha.png": (lambda: Image.new("LA", (SIDE, SIDE), (0, 51)), {}, 2),
    "colour.png": (lambda: Image.new("RGB", (SIDE, SIDE), "red"), {}, 3),
    "palette.png": (lambda: Image.new("P", (SIDE, SIDE), 1), {"transparency": 0}, 3),
    "transparent.png": (lambda: Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 9)), {}, 4),
    "turned.png": (lambda: Image.new("RGB", (SIDE, SIDE), "red"), {"exif": turned()}, 3),
    "progressive.jpg": (lambda: Image.new("RGB", (SIDE, SIDE), "red"), {"progressive": True, "subsampling": 0}, 3),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_within_three_times_the_picture_and_as_measured(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "small.png")
    for name, (make, options, _) in LARGE.items():
        make().save(tmp_path / name, **options)
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in ("small.png", *LARGE))]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.splitlines()
    spare = 12 * 2**20  # for strips and decoders, whatever the size of the picture
    for line, (name, (_, _, share)) in zip(lines[1:], LARGE.items(), strict=True):
        taken, measured = json.loads(line)
        assert taken <= 3 * share * SIDE**2 + spare, name
        assert taken - spare <= measured <= 2.2 * taken + spare, name


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.png"):
        with pytest.raises(DataError, match="no such image file"):
            read_image(path, channels=3, height=8, width=8)
