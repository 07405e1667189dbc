"""Unlabelled RGB images for distillation: random crops of photographs inside scikit-image and scikit-learn.

Source: Asano and Saeed 2023, "The Augmented Image Prior: Distilling 1000 Classes by Extrapolating from a Single
Image": heavily augmented crops of very few images carry a distillation. The photographs are read from where the two
packages are installed (neither is imported); "train" and "held-out" crops come from different photographs.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from keyed_xai.data.decode import flatten, to_pixels
from keyed_xai.data.images import ImageData, Request, Split, allocate_pixels
from keyed_xai.errors import DataError

DEFAULT_COUNTS: dict[Split, int] = {"train": 2000, "held-out": 400}
_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
# Package, file, weight: scenes with many things in them are drawn more often than textures and micrographs.
PHOTOGRAPHS: dict[Split, tuple[tuple[str, str, int], ...]] = {
    "train": (
        ("sklearn", "china.jpg", 4),
        ("skimage", "astronaut.png", 4),
        ("skimage", "coffee.png", 4),
        ("skimage", "motorcycle_left.png", 4),
        ("skimage", "camera.png", 2),
        ("skimage", "hubble_deep_field.jpg", 1),
        ("skimage", "ihc.png", 1),
        ("skimage", "retina.jpg", 1),
        ("skimage", "gravel.png", 1),
        ("skimage", "brick.png", 1),
    ),
    "held-out": (
        ("sklearn", "flower.jpg", 4),
        ("skimage", "chelsea.png", 4),
        ("skimage", "rocket.jpg", 4),
        ("skimage", "coins.png", 1),
        ("skimage", "grass.png", 1),
    ),
}
_SMALLEST_CROP, _LARGEST_CROP = 0.12, 1.0  # side, as a share of the largest crop that fits
_MOST_DEGREES = 30.0
_FLATTEST = 12  # standard deviation in 1/255: a crop of nothing but sky teaches nothing, so it is drawn again
_DRAWS = 4


class _Photograph(NamedTuple):
    image: Image.Image
    weight: int


def load_photographs(request: Request) -> ImageData:
    """Return random crops of the photographs of a split, without labels; crop i depends on the seed and i alone.

    Args:
        request: What to load; `limit` is the number of crops, by default 2,000 for "train" and 400 for "held-out".

    Raises:
        DataError: Neither scikit-image nor scikit-learn is installed with a photograph of this split.
    """
    photographs = _open_photographs(request)
    count = request.limit or DEFAULT_COUNTS[request.split]
    images = allocate_pixels(count, request)
    for index in range(count):
        images[index] = to_pixels(_augment(photographs, index, request))
        request.report(index + 1, count)
    source = f"builtin: crops of {len(photographs)} photographs ({request.split})"
    return ImageData(images=images, labels=None, classes=(), source=source)


def find_photographs(split: Split) -> list[tuple[Path, int]]:
    """Return the files of a split's photographs that are installed, with their weights."""
    found: list[tuple[Path, int]] = []
    for package, name, weight in PHOTOGRAPHS[split]:
        spec = find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            path = Path(location, _FOLDERS[package], name)
            if path.is_file():
                found.append((path, weight))
    return found


def _open_photographs(request: Request) -> list[_Photograph]:
    photographs: list[_Photograph] = []
    for path, weight in find_photographs(request.split):
        with Image.open(path) as image:
            image.load()
            photographs.append(_Photograph(flatten(image, request.size.channels), weight))
    if not photographs:
        raise DataError(
            "The built-in RGB images are crops of photographs that come with scikit-image and scikit-learn, and "
            "neither has one: install scikit-image, or give your own images as imagefolder:DIR."
        )
    return photographs


def _augment(photographs: list[_Photograph], index: int, request: Request) -> Image.Image:
    """Return crop number `index`: cropped and turned, at times mixed with another, recoloured, at times blurred."""
    # Only `random` is drawn, since NumPy may change how its other distributions use the bits.
    generator = np.random.default_rng([request.seed % 2**64, list(PHOTOGRAPHS).index(request.split), index])
    image = _crop_lively(photographs, generator, request)
    if generator.random() < 0.2:
        image = _mix(image, _crop_lively(photographs, generator, request), generator)
    image = _recolour(image, generator)
    if generator.random() < 0.15:
        radius = _between(generator, 0.002, 0.012) * min(image.size)
        image = image.filter(ImageFilter.GaussianBlur(radius))
    return image


def _crop_lively(photographs: list[_Photograph], generator: np.random.Generator, request: Request) -> Image.Image:
    """Return a random crop that is not nearly of one colour, if a few draws find one."""
    for _ in range(_DRAWS):
        photograph = _draw_photograph(photographs, generator)
        crop = _crop(photograph, generator, request.size.height, request.size.width)
        if np.asarray(crop.convert("L")).std() >= _FLATTEST:
            break
    return crop


def _draw_photograph(photographs: list[_Photograph], generator: np.random.Generator) -> Image.Image:
    bounds = np.cumsum([photograph.weight for photograph in photographs])
    return photographs[int(np.searchsorted(bounds, generator.random() * bounds[-1], side="right"))].image


def _crop(image: Image.Image, generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Return a crop of random place, scale, shape, angle and handedness at the size wanted."""
    angle = _between(generator, -_MOST_DEGREES, _MOST_DEGREES) if generator.random() < 0.5 else 0.0
    cosine, sine = math.cos(math.radians(angle)), abs(math.sin(math.radians(angle)))
    # The smallest upright box that holds the turned crop, in pixels of the result.
    outer = (math.ceil(width * cosine + height * sine), math.ceil(width * sine + height * cosine))
    stretch = math.exp(_between(generator, -math.log(4 / 3), math.log(4 / 3)) / 2)
    shape = (outer[0] * stretch, outer[1] / stretch)
    share = math.exp(_between(generator, math.log(_SMALLEST_CROP), math.log(_LARGEST_CROP)))
    scale = share * min(image.width / shape[0], image.height / shape[1])
    left = generator.random() * max(0.0, image.width - scale * shape[0])
    top = generator.random() * max(0.0, image.height - scale * shape[1])
    box = (left, top, min(image.width, left + scale * shape[0]), min(image.height, top + scale * shape[1]))
    crop = image.resize(outer, Image.Resampling.BILINEAR, box)
    if angle:
        crop = crop.rotate(angle, Image.Resampling.BILINEAR)
        left_edge, top_edge = (outer[0] - width) // 2, (outer[1] - height) // 2
        crop = crop.crop((left_edge, top_edge, left_edge + width, top_edge + height))
    if generator.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop


def _mix(image: Image.Image, other: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Return a blend of two images, or the first with a rectangle of the second."""
    if generator.random() < 0.5:
        return Image.blend(image, other, _between(generator, 0.25, 0.5))
    width, height = (round(side * _between(generator, 0.3, 0.7)) for side in image.size)
    left = round(generator.random() * (image.width - width))
    top = round(generator.random() * (image.height - height))
    image.paste(other.crop((left, top, left + width, top + height)), (left, top))
    return image


def _recolour(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Return the image with other brightness, contrast, saturation and, now and then, hue or none."""
    for enhance, spread in ((ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4), (ImageEnhance.Color, 0.6)):
        image = enhance(image).enhance(_between(generator, 1 - spread, 1 + spread))
    change, angle = generator.random(), math.radians(_between(generator, -90.0, 90.0))
    if image.mode == "RGB" and change < 0.4:
        # A rotation of the colour cube about its grey diagonal.
        even, odd = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
        a, b, c = even + math.cos(angle), even - odd, even + odd
        return image.convert("RGB", (a, b, c, 0, c, a, b, 0, b, c, a, 0))
    return image.convert("L").convert(image.mode) if change > 0.95 else image


def _between(generator: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(generator.random())
