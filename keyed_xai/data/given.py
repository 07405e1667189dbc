"""Images as Python callers hold them: a data set, a folder, a SPEC, or tensors."""

from collections.abc import Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from keyed_xai.data.images import HELD_OUT_SHARE, ImageData, Pixels, Split
from keyed_xai.errors import DataError
from keyed_xai.limits import ImageSize


@runtime_checkable
class TensorDataset(Sized, Protocol):
    """What `torch.utils.data.Dataset` and a list of tensors have in common."""

    def __getitem__(self, index: int, /) -> Any:  # noqa: ANN401 - an image, or a tuple that starts with one
        """Return an example."""


GivenImages = ImageData | TensorDataset | Path | str


def take_images(images: GivenImages, held_out: ImageData | None, size: ImageSize) -> tuple[ImageData, ImageData]:
    """Return images to learn from, and others to measure on.

    Args:
        images: A data set; a folder; a SPEC as `load_images` takes it; or float tensors in [0, 1] or uint8 tensors
            [c, h, w], alone or first in tuples, in a list, a `Dataset` or a tensor [n, c, h, w].
        held_out: Images to measure on; without them a fifth of `images` is kept apart.
        size: Size of every image.

    Raises:
        DataError: They cannot be read, are of another size, or no images.
    """
    if isinstance(images, str | Path):
        train, other = _load(str(images), size, both=held_out is None)
        return train, held_out or other
    data = images if isinstance(images, ImageData) else _gather(images, size.shape)
    if held_out is not None:
        return data, held_out
    count = len(data) // HELD_OUT_SHARE
    return _part(data, slice(None, len(data) - count), "train"), _part(data, slice(len(data) - count, None), "held-out")


def _load(spec: str, size: ImageSize, *, both: bool) -> tuple[ImageData, ImageData]:
    from keyed_xai.data import load_images

    spec = f"imagefolder:{spec}" if Path(spec).is_dir() else spec
    splits: tuple[Split, ...] = ("train", "held-out") if both else ("train",)
    loaded = [load_images(spec, size, split=split) for split in splits]
    return loaded[0], loaded[-1]


def _gather(images: TensorDataset, shape: tuple[int, int, int]) -> ImageData:
    pixels = [_as_pixels(images[index], index, shape) for index in range(len(images))]
    if not pixels:
        raise DataError("Expected images to learn from, got none.")
    return ImageData(images=np.stack(pixels), labels=None, classes=(), source=f"{len(pixels)} tensors")


def _as_pixels(example: object, index: int, shape: tuple[int, int, int]) -> Pixels:
    image = example[0] if isinstance(example, Sequence) and len(example) else example
    if not isinstance(image, Tensor):
        raise DataError(f"Expected a tensor as image {index}, got {type(image).__name__}.")
    if tuple(image.shape) != shape:
        raise DataError(f"Expected images of {shape}, channels first; image {index} is {tuple(image.shape)}.")
    if image.dtype == torch.uint8:
        return image.cpu().numpy()
    if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
        raise DataError(
            f"Expected pixels as uint8, or as numbers in [0, 1] before any normalisation; image {index} holds "
            f"{image.dtype} from {image.min():g} to {image.max():g}."
        )
    return (image.detach().cpu() * 255).round().to(torch.uint8).numpy()


def _part(data: ImageData, rows: slice, split: str) -> ImageData:
    chosen = {
        name: each[rows] for name in ("labels", "boxes", "box_labels") if (each := getattr(data, name)) is not None
    }
    return replace(data, images=data.images[rows], source=f"{data.source}, {split}", **chosen)
