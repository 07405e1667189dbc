"""Images to train and test with: one file per data set, chosen by a SPEC such as "imagefolder:photos"."""

from collections.abc import Callable
from pathlib import Path

from keyed_xai.data.builtin import load_builtin
from keyed_xai.data.decode import read_image
from keyed_xai.data.fashion_mnist import load_fashion_mnist
from keyed_xai.data.image_folder import list_images, load_image_folder
from keyed_xai.data.images import Holdout, ImageData, Progress, Request, Split
from keyed_xai.errors import DataError

__all__ = ["LOADERS", "ImageData", "Request", "list_images", "load_images", "read_image"]

LOADERS: dict[str, Callable[[str, Request], ImageData]] = {
    "builtin": load_builtin,
    "fashion-mnist": load_fashion_mnist,
    "imagefolder": load_image_folder,
}
"""Loaders by SPEC name; each takes what follows the colon ("" without one) and the request."""


def load_images(
    spec: str,
    *,
    channels: int,
    height: int,
    width: int,
    split: Split,
    holdout: Holdout = "images",
    limit: int | None = None,
    strict: bool = False,
    workers: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImageData:
    """Return the images of a data set at one size; the arguments are those of `Request`.

    The result depends on the files, the arguments and the seed, never on the number of workers.

    Args:
        spec: "builtin", "fashion-mnist[:DIR]" or "imagefolder:DIR"; `LOADERS` has them all.
        channels: 1 (grey) or 3 (RGB).
        height: Of every image, pixels.
        width: Of every image, pixels.
        split: "train" or "held-out"; the two share no image at the same seed.
        holdout: Whether single images are held out or whole classes.
        limit: At most so many images, class-balanced; None for all.
        strict: Refuse a data set with a broken image instead of leaving the image out.
        workers: Processes that decode; 0 or 1 decodes in this one, None chooses.
        seed: Settles the hold-out, the order and every random crop.
        progress: Called with the number of images done and in all.

    Raises:
        DataError: The SPEC is unknown, or the data set is missing, empty or damaged.
        ValueError: Another argument is outside its range.
    """
    request = Request(channels, height, width, split, holdout, limit, strict, workers, seed, progress)
    name, _, argument = spec.partition(":")
    if name not in LOADERS:
        hint = f" For a folder of images write imagefolder:{spec}." if Path(spec).is_dir() else ""
        raise DataError(f"Expected a data set out of {', '.join(LOADERS)}; got {spec!r}.{hint}")
    return LOADERS[name](argument, request)
