"""Fashion-MNIST from its four IDX files: 60,000 training and 10,000 held-out images, 28x28 grey, ten classes.

Source: Xiao, Rasul and Vollgraf 2017, "Fashion-MNIST: a novel image dataset for benchmarking machine learning
algorithms". The format is that of MNIST: a big-endian header (magic number, sizes), then the bytes.
"""

import gzip
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keyed_xai.data.images import ImageData, Pixels, Request, Split, allocate_pixels, choose_classes, order_balanced
from keyed_xai.errors import DataError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SIDE = 28
_STEMS: dict[Split, str] = {"train": "train", "held-out": "t10k"}
_MAGIC_IMAGES, _MAGIC_LABELS = 0x803, 0x801
_MOST_IMAGES = 70_000
_USUAL_PLACES = (
    "/usr/share/datasets/fashion-mnist",
    "data/fashion-mnist",
    "data/FashionMNIST/raw",
    "~/.cache/FashionMNIST/raw",
    "~/.cache/fashion-mnist",
)


def load_fashion_mnist(argument: str, request: Request) -> ImageData:
    """Return a split of Fashion-MNIST; its own test set is the held-out split.

    Where whole classes are held out, two of the ten are, and "train" has the other eight.

    Args:
        argument: Folder with the four files, plain or gzipped, or torchvision's `root`; "" searches the usual places.
        request: What to load.

    Raises:
        DataError: A file is missing or damaged.
    """
    folder = _find_folder(argument)
    images, labels = read_split(folder, request.split)
    return select_images(images, labels, request, source=f"fashion-mnist ({request.split})")


def read_split(folder: Path, split: Split) -> tuple[Pixels, NDArray[np.int64]]:
    """Return the images, uint8 [n, 28, 28], and labels of one split as they are in the files.

    Raises:
        DataError: A file is missing or damaged, or the two do not belong together.
    """
    images = _read_idx(_find_file(folder, f"{_STEMS[split]}-images-idx3-ubyte"), _MAGIC_IMAGES)
    labels = _read_idx(_find_file(folder, f"{_STEMS[split]}-labels-idx1-ubyte"), _MAGIC_LABELS)
    if len(images) != len(labels):
        raise DataError(f"Fashion-MNIST ({split}): {len(images)} images, but {len(labels)} labels.")
    if labels.size and labels.max() >= len(CLASSES):
        raise DataError(f"Fashion-MNIST ({split}): a label is {labels.max()}; labels are 0 to {len(CLASSES) - 1}.")
    return images, labels.astype(np.int64)


def select_images(images: Pixels, labels: NDArray[np.int64], request: Request, *, source: str) -> ImageData:
    """Return what the request asks for out of a whole split [n, 28, 28]: hold-out by class, order, limit, size."""
    chosen = np.arange(len(labels))
    if request.holdout == "classes":
        chosen = chosen[np.isin(labels, sorted(choose_classes(CLASSES, request)))]
    order = order_balanced([str(index) for index in chosen], labels[chosen].tolist(), request)
    chosen = chosen[order]
    return ImageData(images=fit_grey(images[chosen], request), labels=labels[chosen], classes=CLASSES, source=source)


def fit_grey(images: Pixels, request: Request) -> Pixels:
    """Return grey images [n, 28, 28] at the size and with the channels asked for.

    They are padded with zeros to 32x32, and scaled to other sizes (bilinear, antialiased where they shrink).
    """
    fitted = allocate_pixels(len(images), request)
    size = (request.size.height, request.size.width)
    if size == (32, 32):
        fitted[:] = np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]
    elif size == images.shape[1:]:
        fitted[:] = images[:, None]
    else:
        for index, image in enumerate(images):
            fitted[index] = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    request.report(len(images), len(images))
    return fitted


def _find_folder(argument: str) -> Path:
    names = [argument, f"{argument}/FashionMNIST/raw", f"{argument}/raw"] if argument else _USUAL_PLACES
    for name in names:
        folder = Path(name).expanduser()
        if any((folder / f"train-images-idx3-ubyte{suffix}").is_file() for suffix in ("", ".gz")):
            return folder
    raise DataError(_describe_missing(names[:1] if argument else names))


def _describe_missing(places: Sequence[str]) -> str:
    files = ", ".join(f"{stem}-{kind}-ubyte.gz" for stem in _STEMS.values() for kind in ("images-idx3", "labels-idx1"))
    return (
        f"Fashion-MNIST is not in {', '.join(places)}. Wanted: {files} (or without .gz). The Debian package "
        "dataset-fashion-mnist has them, as has https://github.com/zalandoresearch/fashion-mnist; then give the "
        "folder as fashion-mnist:DIR. The built-in subset needs no files: use builtin."
    )


def _find_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{name}.gz is missing. {_describe_missing([str(folder)])}")


def _read_idx(path: Path, magic: int) -> Pixels:
    """Return the array in an IDX file of unsigned bytes; never reads more than the header promises."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _parse_header(file.read(16 if magic == _MAGIC_IMAGES else 8), magic, path)
            wanted = int(np.prod(shape))
            data = file.read(wanted + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Fetch it again.") from error
    if len(data) != wanted:
        raise DataError(f"{path} is cut short or too long: its header promises {wanted} bytes. Fetch it again.")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _parse_header(header: bytes, magic: int, path: Path) -> tuple[int, ...]:
    expected = (magic, SIDE, SIDE) if magic == _MAGIC_IMAGES else (magic,)
    try:
        found, count, *sides = struct.unpack(f">{len(expected) + 1}I", header)
    except struct.error:
        raise DataError(f"{path} is cut short: it has no whole IDX header. Fetch it again.") from None
    if (found, *sides) != expected or not 0 < count <= _MOST_IMAGES:
        raise DataError(
            f"{path} is no IDX file of Fashion-MNIST: expected (magic, sides) {expected} and 1 to {_MOST_IMAGES} "
            f"items, found {(found, *sides)} and {count}."
        )
    return (count, *sides)
