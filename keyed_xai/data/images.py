"""What every loader takes and returns, and what they share: the order of images, the hold-out, room for the pixels.

Nothing here imports torch before a batch is asked for, so that worker processes start quickly.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyed_xai.errors import DataError
from keyed_xai.limits import ImageSize
from keyed_xai.progress import QUIET, Progress

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["train", "held-out"]
Holdout = Literal["images", "classes"]
Pixels = NDArray[np.uint8]

IN_MEMORY_BYTES = 2**30
HELD_OUT_SHARE = 5
"""One image, or class, in so many is held out."""
_LONGEST_SIDE = 4096


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageData:
    """Images of one split, all of one size.

    Attributes:
        images: uint8 [n, c, h, w]; a plain array, or a read-only memmap of a temporary file that is removed with the
            last reference to it. Loaders put them in an order whose every prefix is about class-balanced; the one of
            ChestX-ray14 leaves its held-out images as they are distributed.
        labels: int64 [n] in [0, len(classes)); or of multi-label data int64 [n, len(classes)] of 0 and 1; or None where
            the images have none.
        classes: Names, by label; empty without labels.
        source: Which data and split these are, for reports; no path of this machine.
        skipped: Names of images that could not be read, relative to the data set's folder.
        boxes: float32 [n, 4], where each image shows its object: left, top, right, bottom as fractions in [0, 1] of
            the image as it is in `images`; NaN rows where that is not known. None where the data set has no boxes.
        box_labels: int64 [n], the label, as an index into `classes`, that each image's box shows; -1 where there is no
            box. None where the data set has no boxes, or where they are around the whole object.
        notes: Sentences about what of a folder was taken for what, and what was passed over.
    """

    images: Pixels
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]
    source: str
    skipped: tuple[str, ...] = ()
    boxes: NDArray[np.float32] | None = None
    box_labels: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the shapes, and make a memmap read-only: it is one file, and no copy of it is cheap.

        Raises:
            ValueError: The labels, the boxes or their labels do not fit the images or the classes.
        """
        if isinstance(self.images, np.memmap):
            self.images.flags.writeable = False
        if self.labels is not None:
            _check_labels(self.labels, len(self.images), len(self.classes))
        for name, shape in (("boxes", (len(self.images), 4)), ("box_labels", (len(self.images),))):
            found = getattr(self, name)
            if found is not None and found.shape != shape:
                raise ValueError(f"Expected {name} of shape {shape}, got {found.shape}.")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels at once, or none."""
        return self.labels is not None and self.labels.ndim == 2

    def batch(self, indices: ArrayLike) -> "tuple[Tensor, Tensor | None]":
        """Return copies of some images as float32 [n, c, h, w] in [0, 1], and their int64 labels or None.

        Args:
            indices: Integers, or anything else that indexes the first axis of an array.
        """
        import torch

        chosen = np.asarray(indices)
        pixels = torch.from_numpy(np.ascontiguousarray(self.images[chosen]))
        labels = None if self.labels is None else torch.from_numpy(self.labels[chosen])
        return pixels.to(torch.float32).div_(255), labels


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to load: the arguments of `load_images`, checked.

    Attributes:
        size: Size of every image; 1 (grey) or 3 (RGB) channels.
        split: "train", or "held-out" for images that "train" never has at the same seed.
        holdout: Whether single images are held out or whole classes.
        limit: At most so many images, class-balanced (held-out ChestX-ray14: a random draw); None for all.
        strict: Refuse a data set with a broken image instead of leaving the image out.
        workers: Processes that decode; 0 or 1 decodes in this one, None chooses.
        seed: Settles the hold-out, the order and every random crop.
        progress: Hears of "reading train images", or held-out ones.
        follow_links: Read files and folders that are links out of the data set's folder.
    """

    size: ImageSize
    split: Split
    holdout: Holdout = "images"
    limit: int | None = None
    strict: bool = False
    workers: int | None = None
    seed: int = 0
    progress: Progress = QUIET
    follow_links: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            DataError: No loader makes images with so many channels or of this size.
            ValueError: Another value is outside its range.
        """
        channels, height, width = self.size.shape
        if channels not in (1, 3):
            raise DataError(f"Images have 1 or 3 channels, and the model wants {channels}. Use your own loader.")
        if not (1 <= height <= _LONGEST_SIDE and 1 <= width <= _LONGEST_SIDE):
            raise DataError(f"Expected sides of 1 to {_LONGEST_SIDE} pixels, got {height}x{width}.")
        if self.split not in ("train", "held-out"):
            raise ValueError(f"Expected split 'train' or 'held-out', got {self.split!r}.")
        if self.holdout not in ("images", "classes"):
            raise ValueError(f"Expected holdout 'images' or 'classes', got {self.holdout!r}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"Expected a limit of at least 1 image, got {self.limit}.")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"Expected 0 or more workers, got {self.workers}.")

    def report(self, done: int, total: int) -> None:
        """Tell how many images are read."""
        self.progress.advance(f"reading {self.split} images", done, total)


def rank(seed: int, name: str) -> bytes:
    """Return a pseudorandom sort key of a name: the same on every machine, whatever else is in the data set."""
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()


def order_by_rank(names: Sequence[str], seed: int) -> list[int]:
    """Return the indices of all names by rank: a shuffle, every prefix of which is a random draw."""
    return sorted(range(len(names)), key=lambda index: rank(seed, names[index]))


def order_balanced(names: Sequence[str], labels: ArrayLike | None, request: Request) -> list[int]:
    """Return at most `request.limit` indices: every class's first image by rank, then every class's second, ...

    Args:
        names: Names of the images; they settle the ranks.
        labels: [n], or multi-label [n, k], where an image counts for its first label, or for a class of those without.
        request: Seed and limit.
    """
    groups = [0] * len(names) if labels is None else _group_labels(np.asarray(labels))
    counts: dict[int, int] = {}
    turns: list[tuple[int, int]] = []
    for index in order_by_rank(names, request.seed):
        label = groups[index]
        turns.append((counts.get(label, 0), index))
        counts[label] = counts.get(label, 0) + 1
    turns.sort(key=lambda turn: turn[0])  # stable, so that each turn's classes come in the order of the ranks
    return [index for _, index in turns][: request.limit]


def choose_held_out(names: Sequence[str], seed: int) -> set[str]:
    """Return the fifth of the names with the lowest ranks: at least one, and never the only one."""
    count = max(1, round(len(names) / HELD_OUT_SHARE)) if len(names) > 1 else 0
    return set(sorted(names, key=lambda name: rank(seed, f"held-out\0{name}"))[:count])


def choose_classes(classes: Sequence[str], request: Request) -> set[int]:
    """Return the labels that the split has where whole classes are held out.

    Raises:
        DataError: There are fewer than two classes.
    """
    held_out = choose_held_out(classes, request.seed)
    if not held_out:
        raise DataError(f"Holding out whole classes needs two or more of them; there are {len(classes)}.")
    return {label for label, name in enumerate(classes) if (name in held_out) == (request.split == "held-out")}


def allocate_pixels(count: int, request: Request) -> Pixels:
    """Return room for `count` images: an array, or past `IN_MEMORY_BYTES` a memmap of an unnamed temporary file.

    Raises:
        DataError: The folder for temporary files is too full.
    """
    shape = (count, *request.size.shape)
    size = math.prod(shape)
    if size <= IN_MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    # Unnamed (or deleted on close, on Windows), so nothing is left behind even when the process is killed.
    with tempfile.TemporaryFile() as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk shows here, and not as SIGBUS on a later write
                os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, np.uint8, "r+", shape=shape)
        except OSError as error:
            raise DataError(
                f"The images take {size / 2**30:.1f} GiB in {tempfile.gettempdir()}: {error.strerror}. "
                "Set a limit, or TMPDIR to a folder with more room."
            ) from error


def _check_labels(labels: NDArray[np.int64], images: int, classes: int) -> None:
    expected = (images,) if labels.ndim == 1 else (images, classes)
    if labels.shape != expected:
        raise ValueError(f"Expected labels of shape {(images,)} or {(images, classes)}, got {labels.shape}.")
    if labels.ndim == 2 and not np.isin(labels, (0, 1)).all():
        raise ValueError("Expected multi-label labels of 0 and 1 only.")


def _group_labels(labels: NDArray[np.int64]) -> list[int]:
    """Return one class per image: the label, or the first of several, or k where an image has none of k."""
    if labels.ndim == 2:
        labels = np.where(labels.any(axis=1), labels.argmax(axis=1), labels.shape[1])
    return [int(label) for label in labels]
