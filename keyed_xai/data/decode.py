"""Image files to pixels, one by one or in worker processes. Files are untrusted.

Only common raster formats are opened (never EPS, which would start Ghostscript), and no image of more than
`LARGEST_IMAGE` pixels. Beside what Pillow decodes there is at most the image in 8 bits: modes are changed in strips.
This module loads neither torch nor the rest of the package: worker processes import it.
"""

import importlib
import io
import math
import multiprocessing
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from keyed_xai.batches import batches
from keyed_xai.data.images import Pixels, Request, allocate_pixels
from keyed_xai.errors import DataError

LARGEST_IMAGE = 89_478_485
"""Pixels; Pillow's own limit, where it only warns."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats of pictures that may come as bytes, from anybody."""
_FILE_FORMATS = (*FORMATS, "DIB", "AVIF", "JPEG2000", "TGA", "PCX", "SGI", "QOI")
_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".tga", ".pcx", ".sgi", ".qoi",
})  # fmt: skip
HEIF_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
"""Photographs of telephones; Pillow reads them where pillow-heif is installed."""
WITHOUT_HEIF = "HEIC needs the package pillow-heif (keyed-xai[heic])"
HOW_TO_FOLLOW = "--follow-links, or follow_links=True, follows it"
_Result = TypeVar("_Result")
Box = tuple[float, float, float, float]
"""Four edges, or left, top, width and height."""
_POOL_FROM = 256
_MOST_WORKERS = 8
_CHUNK = 16
_ORIENTATION = 0x0112  # the EXIF tag
_NO_BOX = (math.nan, math.nan, math.nan, math.nan)
_STRIP = 2**18  # pixels whose mode is changed at once
_GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # in Pillow's memory; others 4
_WEBP_BYTES = 16  # of a pixel, for the decoder's own two pictures and what is copied from them
_PROGRESSIVE_BYTES = 6  # of a pixel, for the coefficients of a progressive JPEG, which are kept whole
_SIXTEEN_BIT = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
# What Pillow's decoders have been seen to raise on damaged files: far more than the OSError they document.
_DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, AttributeError,
    AssertionError, RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


@cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes, in small letters, of files that are read."""
    return _SUFFIXES | HEIF_SUFFIXES if _add_heif() else _SUFFIXES


def read_image(path: Path, *, channels: int, height: int, width: int) -> Pixels:
    """Return one image file as uint8 [c, h, w], turned upright, centre-cropped to the aspect ratio and scaled.

    Any mode becomes grey (1 channel) or RGB (3): transparency is flattened on white, 16-bit grey divided by 257, or by
    4095 / 255 where no value is above 4,095, as those of 12 bits in a 16-bit file. Of animations and multi-page files
    it is the first page.

    Raises:
        DataError: The file is missing, no image, damaged or too large.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such image file.")
    if path.suffix.lower() in HEIF_SUFFIXES and not _add_heif():
        raise DataError(f"{path}: {WITHOUT_HEIF}.")
    return _open_or_refuse(path, str(path), LARGEST_IMAGE, (channels, height, width), _decode)


def read_image_bytes(data: bytes, *, channels: int, height: int, width: int, largest: int = LARGEST_IMAGE) -> Pixels:
    """Return the image in a file's bytes as `read_image` does the file's.

    Args:
        data: Content of the file.
        channels: 1 or 3.
        height: Height of the result, pixels.
        width: Width of the result, pixels.
        largest: Most pixels that the image may have.

    Raises:
        DataError: It is no image, damaged or too large; then its cause is Pillow's DecompressionBombError.
    """
    return _open_or_refuse(io.BytesIO(data), "the image", largest, (channels, height, width), _decode)


def measure_image(data: bytes, *, channels: int, height: int, width: int, largest: int = LARGEST_IMAGE) -> int:
    """Return how many bytes of memory `read_image_bytes` takes for a file, about, by its header.

    Raises:
        DataError: As `read_image_bytes` does.
    """
    return _open_or_refuse(io.BytesIO(data), "the image", largest, (channels, height, width), _measure)


def map_box(path: Path, box: Box, *, height: int, width: int, drawn_on: tuple[int, int] | None = None) -> Box:
    """Return where a box of an image file lies in what `read_image` makes of the file.

    Args:
        path: The file; only its header is read.
        box: Left, top, width and height, pixels.
        height: Height of the image made, pixels.
        width: Width of the image made, pixels.
        drawn_on: Width and height, in the box's pixels, of the image that it was drawn on; None for the file's own.

    Returns:
        Left, top, right and bottom as fractions in [0, 1] of the image made. Four NaN where the centre crop leaves
        nothing of the box, or that cannot be told: the file is unreadable, or turned by its EXIF orientation.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_formats_of(path)) as image:
                size, turned = image.size, image.getexif().get(_ORIENTATION, 1) != 1
    except _DAMAGED:
        return _NO_BOX
    return _NO_BOX if turned else _crop_box(box, size, drawn_on or size, height, width)


def decode_images(folder: Path, names: Sequence[str], request: Request) -> tuple[Pixels, list[int], list[str]]:
    """Return the readable images, their indices in `names`, and the names of the others.

    Args:
        folder: The folder that they are in; a file that is a link out of it counts as unreadable, unless links are
            followed.
        names: Files, relative to the folder, in the order the images shall have.
        request: Size, workers, strictness and progress.

    Raises:
        DataError: More than half of the files cannot be read; or one cannot, and the request is strict.
    """
    pixels = allocate_pixels(len(names), request)
    kept: list[int] = []
    skipped: list[str] = []
    first_complaint = ""
    with closing(_decode_in_order(folder, names, request)) as results:
        for index, decoded in enumerate(results):
            if isinstance(decoded, str):
                first_complaint = first_complaint or f"{names[index]}: {decoded}"
                if request.strict:
                    raise DataError(f"{first_complaint} (strict: take it out of the folder, or load without strict).")
                skipped.append(names[index])
            else:
                pixels[len(kept)] = decoded
                kept.append(index)
            request.report(index + 1, len(names))
    if len(skipped) > len(names) / 2:
        raise DataError(f"{len(skipped)} of {len(names)} images cannot be read. The first is {first_complaint}.")
    return pixels[: len(kept)], kept, skipped


def leads_out(folder: Path, path: Path) -> bool:
    """Return whether a file in a folder is a link to somewhere outside."""
    return path.is_symlink() and not path.resolve().is_relative_to(folder.resolve())


def decode_chunk(
    folder: str, names: Sequence[str], shape: tuple[int, int, int], *, follow_links: bool = False
) -> list[Pixels | str]:
    """Return each file's pixels [c, h, w], or what is wrong with it. Runs in worker processes."""
    return [_decode_or_complain(Path(folder), name, shape, follow_links=follow_links) for name in names]


def _decode_or_complain(folder: Path, name: str, shape: tuple[int, int, int], *, follow_links: bool) -> Pixels | str:
    path = folder / name
    if not follow_links and leads_out(folder, path):
        return f"a link out of the folder ({HOW_TO_FOLLOW})"
    try:
        return read_image(path, channels=shape[0], height=shape[1], width=shape[2])
    except DataError as error:
        return str(error).removeprefix(f"{path}: ").removesuffix(".")


def _decode_in_order(folder: Path, names: Sequence[str], request: Request) -> Generator[Pixels | str, None, None]:
    """Yield each file's pixels, or what is wrong with it."""
    shape = request.size.shape
    decode = partial(decode_chunk, str(folder), shape=shape, follow_links=request.follow_links)
    workers = _choose_workers(len(names), request)
    chunks = [names[some] for some in batches(len(names), _CHUNK)]
    if workers < 2:
        for chunk in chunks:
            yield from decode(chunk)
        return
    # Spawned, not forked: the caller may hold threads (torch, a progress bar), which a fork would leave locked.
    pool = ProcessPoolExecutor(min(workers, len(chunks)), multiprocessing.get_context("spawn"))
    try:
        for decoded in pool.map(decode, chunks):
            yield from decoded
    except BrokenProcessPool as error:
        raise DataError(
            "A process that decodes images died. In a script, call this below `if __name__ == '__main__':`, or pass "
            "workers=0 to decode without processes. Otherwise memory ran out, or an image crashes its decoder."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _choose_workers(count: int, request: Request) -> int:
    if request.workers is not None:
        return request.workers
    return min(os.cpu_count() or 1, _MOST_WORKERS) if count >= _POOL_FROM else 0


def _open_or_refuse(
    file: Path | io.BytesIO,
    origin: str,
    largest: int,
    shape: tuple[int, int, int],
    work: Callable[[Image.Image, tuple[int, int, int]], _Result],
) -> _Result:
    """Return what `work` makes of an image whose header is read; large JPEGs are to be decoded at a fraction."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about odd metadata and sizes; sizes are checked here
            with Image.open(file, formats=_formats_of(file)) as image:
                if image.width * image.height > largest:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height} is over {largest} pixels")
                return work(image, shape)
    except _DAMAGED as error:
        raise DataError(f"{origin}: not a readable image: {_describe(error)}.") from error


def _formats_of(file: Path | io.BytesIO) -> tuple[str, ...]:
    """Return the formats to try: of a file on this machine more than of bytes that anybody sent."""
    if not isinstance(file, Path):
        return FORMATS
    return (*_FILE_FORMATS, "HEIF") if _add_heif() else _FILE_FORMATS


@cache
def _add_heif() -> bool:
    """Have Pillow read HEIC and HEIF, if the package for it is installed; return whether it is."""
    if find_spec("pillow_heif") is None:
        return False
    importlib.import_module("pillow_heif").register_heif_opener()
    return True


def _decode(image: Image.Image, shape: tuple[int, int, int]) -> Pixels:
    _draft(image, shape)
    image.load()
    with suppress(*_DAMAGED):  # the pixels are fine, only their metadata may not be
        ImageOps.exif_transpose(image, in_place=True)
    return fit_image(image, *shape)


def _measure(image: Image.Image, shape: tuple[int, int, int]) -> int:
    whole, extra = image.width * image.height, {"WEBP": _WEBP_BYTES}.get(image.format or "", 0)
    if image.info.get("progressive"):
        extra = _PROGRESSIVE_BYTES
    _draft(image, shape)
    stored = _PIXEL_BYTES.get(image.mode, 4)
    flat = 0 if image.mode == _flat_mode(image, shape[0]) else 1 if shape[0] == 1 or image.mode in _GREY else 4
    return whole * extra + image.width * image.height * (stored + max(stored, flat))  # turned, or flattened


def _draft(image: Image.Image, shape: tuple[int, int, int]) -> None:
    """Have large JPEGs decoded at 1/2, 1/4 or 1/8, never below twice the size wanted."""
    twice = 2 * max(shape[1:])
    image.draft(None, (twice, twice))


def fit_image(image: Image.Image, channels: int, height: int, width: int) -> Pixels:
    """Return the largest centred crop of the aspect ratio wanted, scaled (bicubic, antialiased), as uint8 [c, h, w].

    Raises:
        ValueError: The pixels are floating-point or 32-bit numbers of unknown range.
    """
    flat = _flatten(image, _flat_mode(image, channels))
    edges = _centre_crop(flat.size, height, width)
    pixels = to_pixels(flat.resize((width, height), Image.Resampling.BICUBIC, edges))
    return np.repeat(pixels, channels, axis=0) if len(pixels) < channels else pixels


def flatten(image: Image.Image, channels: int) -> Image.Image:
    """Return an image of any mode as 8-bit grey (1) or RGB (3), transparent parts on white.

    Raises:
        ValueError: The pixels are floating-point or 32-bit numbers of unknown range.
    """
    return _flatten(image, "L" if channels == 1 else "RGB")


def _flat_mode(image: Image.Image, channels: int) -> str:
    """Return the mode that an image is scaled in: grey ones become RGB after that."""
    return "L" if channels == 1 or image.mode in _GREY else "RGB"


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Return an image of any mode as "L" or "RGB", changed strip by strip."""
    if image.mode == mode and not image.has_transparency_data:
        return image
    full = _full_scale(image) if image.mode in _SIXTEEN_BIT else 0
    flat = Image.new(mode, image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        flat.paste(_flatten_strip(strip, mode, full), (0, top))
    return flat


def _full_scale(image: Image.Image) -> int:
    """Return which value is white in an image of 16-bit numbers: 4,095 where none is above it, as with 12 bits.

    Raises:
        ValueError: There are numbers of more bits, or below 0.
    """
    lowest, highest = image.getextrema()
    if not (isinstance(lowest, int) and isinstance(highest, int) and lowest >= 0 and highest < 2**16):
        raise ValueError("32-bit values of unknown range; save it with 8 or 16 bits")
    return 2**16 - 1 if highest >= 2**12 else 2**12 - 1


def _flatten_strip(image: Image.Image, mode: str, full: int) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values / (full / 255)).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point values of unknown range; save it with 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def to_pixels(image: Image.Image) -> Pixels:
    """Return an L or RGB image as uint8 [c, h, w]."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _centre_crop(size: tuple[int, int], height: int, width: int) -> Box:
    """Return left, top, right and bottom, in pixels, of the largest centred crop of an aspect ratio."""
    scale = min(size[0] / width, size[1] / height)
    left, top = max(0.0, size[0] - scale * width) / 2, max(0.0, size[1] - scale * height) / 2
    return left, top, size[0] - left, size[1] - top


def _crop_box(box: Box, size: tuple[int, int], drawn_on: tuple[int, int], height: int, width: int) -> Box:
    """Return a box as fractions of the centre crop of an image of some size (width, height)."""
    left, top, right, bottom = _centre_crop(size, height, width)
    across, down = size[0] / drawn_on[0], size[1] / drawn_on[1]
    x0, x1 = (_clip((across * x - left) / (right - left)) for x in (box[0], box[0] + box[2]))
    y0, y1 = (_clip((down * y - top) / (bottom - top)) for y in (box[1], box[1] + box[3]))
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else _NO_BOX


def _clip(share: float) -> float:
    return min(1.0, max(0.0, share))


def _describe(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not one of {', '.join(FORMATS)} and others that Pillow reads"
    return str(error).rstrip(".") or type(error).__name__
