"""Images and tables to train and test with: one file per data set, chosen by a SPEC such as "imagefolder:photos"."""

from collections.abc import Callable
from pathlib import Path

from keyed_xai.data.builtin import load_builtin
from keyed_xai.data.chestxray14 import load_chestxray14
from keyed_xai.data.credit_default import load_credit_default
from keyed_xai.data.cub200 import load_cub200
from keyed_xai.data.decode import read_image
from keyed_xai.data.fashion_mnist import load_fashion_mnist
from keyed_xai.data.image_folder import list_images, load_image_folder
from keyed_xai.data.images import Holdout, ImageData, Request, Split
from keyed_xai.data.tables import TableData
from keyed_xai.errors import DataError
from keyed_xai.limits import ImageSize
from keyed_xai.progress import QUIET, Progress

__all__ = [
    "LOADERS",
    "ImageData",
    "ImageSize",
    "Request",
    "TableData",
    "is_table",
    "list_images",
    "load_images",
    "load_table",
    "read_image",
]

LOADERS: dict[str, Callable[[str, Request], ImageData]] = {
    "builtin": load_builtin,
    "fashion-mnist": load_fashion_mnist,
    "imagefolder": load_image_folder,
    "cub200": load_cub200,
    "chestxray14": load_chestxray14,
}
"""Loaders by SPEC name; each takes what follows the colon ("" without one) and the request."""
TABLE = "credit-default"
"""SPEC name of the one data set that is a table."""


def load_images(
    spec: str,
    size: ImageSize,
    *,
    split: Split,
    holdout: Holdout = "images",
    limit: int | None = None,
    strict: bool = False,
    workers: int | None = None,
    seed: int = 0,
    progress: Progress = QUIET,
    follow_links: bool = False,
) -> ImageData:
    """Return the images of a data set at one size; the arguments are those of `Request`.

    The result depends on the files, the arguments and the seed, never on the number of workers.

    Args:
        spec: "builtin", "fashion-mnist[:DIR]", "imagefolder:DIR", "cub200:DIR" or "chestxray14:DIR".
        size: Size of every image; 1 (grey) or 3 (RGB) channels. A classifier's `input` is one.
        split: "train" or "held-out"; the two share no image at the same seed.
        holdout: Whether single images are held out or whole classes.
        limit: At most so many images, class-balanced (held-out ChestX-ray14: a random draw); None for all.
        strict: Refuse a data set with a broken image instead of leaving the image out.
        workers: Processes that decode; 0 or 1 decodes in this one, None chooses.
        seed: Settles the hold-out, the order and every random crop.
        progress: Hears of "reading train images", or held-out ones.
        follow_links: Read files and folders that are links out of the folder of imagefolder:DIR.

    Raises:
        DataError: The SPEC is unknown or a table's, or the data set is missing, empty or damaged.
        ValueError: Another argument is outside its range.
    """
    request = Request(
        size=size,
        split=split,
        holdout=holdout,
        limit=limit,
        strict=strict,
        workers=workers,
        seed=seed,
        progress=progress,
        follow_links=follow_links,
    )
    name, _, argument = spec.partition(":")
    if is_table(spec):
        raise DataError(
            f"{name} is a table and has no images: load_table reads it. Here expected {', '.join(LOADERS)}."
        )
    if name not in LOADERS:
        hint = f" For a folder of images write imagefolder:{spec}." if Path(spec).is_dir() else ""
        raise DataError(f"Expected a data set out of {', '.join(LOADERS)}; got {spec!r}.{hint}")
    return LOADERS[name](argument, request)


def is_table(spec: str) -> bool:
    """Return whether a SPEC names a table, for `load_table`, and not images."""
    return spec.partition(":")[0] == TABLE


def load_table(spec: str, *, split: Split, limit: int | None = None, seed: int = 0) -> TableData:
    """Return the rows of a table, encoded as numbers; they depend on the file, the arguments and the seed only.

    Args:
        spec: The table, as "credit-default:CSV".
        split: "train" or "held-out"; the two share no row at the same seed.
        limit: At most so many rows, with the classes in their natural ratio; None for all.
        seed: Settles the hold-out and the order.

    Raises:
        DataError: The SPEC names no table, or the table is missing or damaged.
        ValueError: Another argument is outside its range.
    """
    if not is_table(spec):
        raise DataError(f"Expected the SPEC of a table, {TABLE}:CSV; got {spec!r}.")
    if split not in ("train", "held-out"):
        raise ValueError(f"Expected split 'train' or 'held-out', got {split!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"Expected a limit of at least 1 row, got {limit}.")
    return load_credit_default(spec.partition(":")[2], split=split, limit=limit, seed=seed)
