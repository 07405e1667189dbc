"""A folder of images, as torchvision's ImageFolder reads it and a little more.

Layouts: a folder per class; images only, without labels; and either of them inside `train` and `val` (or `valid`,
`validation`, `test`) folders, which are then the splits. Otherwise a fifth is held out, chosen by a hash of the
relative names and the seed, class by class. Hidden files and folders without images are left alone. Links are followed
inside the folder only: a file that is a link out of it is skipped like a broken one, a folder that is one is refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keyed_xai.data.decode import SUFFIXES, decode_images, leads_out
from keyed_xai.data.images import ImageData, Request, choose_classes, choose_held_out, order_balanced
from keyed_xai.errors import DataError

_HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")


class _Listing(NamedTuple):
    """Image files, by names relative to the folder, with one label each or none at all."""

    names: list[str]
    labels: list[int] | None
    classes: tuple[str, ...]


def load_image_folder(argument: str, request: Request) -> ImageData:
    """Return a split of a folder of images.

    Args:
        argument: The folder.
        request: What to load.

    Raises:
        DataError: The folder is missing, empty or of another layout, or has too few images or classes to hold some
            out; or images are broken and the request is strict or more than half are.
    """
    if not argument:
        raise DataError("Give the folder after the name: imagefolder:DIR.")
    root = Path(argument)
    listing = _choose_split(root, request)
    order = order_balanced(listing.names, listing.labels, request)
    names = [listing.names[index] for index in order]
    images, kept, skipped = decode_images(root, names, request)
    labels = None
    if listing.labels is not None:
        labels = np.array([listing.labels[order[index]] for index in kept], np.int64)
    source = f"imagefolder:{root.resolve().name} ({request.split})"
    return ImageData(images, labels, listing.classes, source, tuple(skipped))


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and its sub-folders, sorted by relative name.

    Raises:
        DataError: The folder is missing, has no image, or has a link out of it.
    """
    _check_folder(folder)
    found = [folder / name for name in sorted(_walk(folder, folder))]
    if not found:
        raise DataError(f"{folder} has no image (one of {', '.join(sorted(SUFFIXES))}).")
    for path in found:
        if leads_out(folder, path):
            raise DataError(f"{path} is a link out of {folder}: links are followed inside only. Copy the file instead.")
    return found


def _choose_split(root: Path, request: Request) -> _Listing:
    """Return the files of the split asked for: those of its folder where there is one, else by hash."""
    _check_folder(root)
    halves = _find_split_folders(root)
    if halves is None:
        listing = _list_labelled(root, root)
        if request.holdout == "images":
            held_out = _hold_out_images(listing, request.seed)
            wanted = [(name in held_out) == (request.split == "held-out") for name in listing.names]
            return _check_some(_keep(listing, wanted), root, request)
        chosen = listing
    else:
        train, held_out_half = (_list_labelled(root, half) for half in halves)
        chosen = train if request.split == "train" else held_out_half
        chosen = _relabel(chosen, sorted({*train.classes, *held_out_half.classes}))
    if request.holdout == "classes":
        classes = choose_classes(chosen.classes, request)
        chosen = _keep(chosen, [label in classes for label in chosen.labels or []])
    return _check_some(chosen, root, request)


def _find_split_folders(root: Path) -> tuple[Path, Path] | None:
    """Return the folders of the two splits, or None where the folder is not laid out so."""
    names = {folder.name for folder in _sub_folders(root)}
    held_out = [name for name in _HELD_OUT_FOLDERS if name in names]
    if "train" in names and held_out and names <= {"train", *_HELD_OUT_FOLDERS}:
        return root / "train", root / held_out[0]
    return None


def _list_labelled(root: Path, folder: Path) -> _Listing:
    """Return what lies below `folder`, a folder per class or images only; names are relative to `root`."""
    by_class = {child.name: sorted(_walk(root, child)) for child in _sub_folders(folder)}
    by_class = {name: files for name, files in by_class.items() if files}
    loose = sorted(path.relative_to(root).as_posix() for path in folder.iterdir() if _is_image(path))
    if by_class and loose:
        raise DataError(
            f"{folder} has images ({loose[0]}) beside class folders ({next(iter(by_class))}): expected one of the two."
        )
    if not by_class and not loose:
        raise DataError(f"{folder} has no image (one of {', '.join(sorted(SUFFIXES))}) and no folder with images.")
    if loose:
        return _Listing(loose, None, ())
    labels = [label for label, files in enumerate(by_class.values()) for _ in files]
    return _Listing([name for files in by_class.values() for name in files], labels, tuple(by_class))


def _relabel(listing: _Listing, classes: list[str]) -> _Listing:
    """Return the listing with labels that index `classes`, a superset of its own."""
    if listing.labels is None:
        return listing
    labels = [classes.index(listing.classes[label]) for label in listing.labels]
    return _Listing(listing.names, labels, tuple(classes))


def _hold_out_images(listing: _Listing, seed: int) -> set[str]:
    """Return the names held out: a fifth of each class, or of everything where each class has a single image."""
    by_class: dict[int, list[str]] = {}
    for name, label in zip(listing.names, listing.labels or [0] * len(listing.names), strict=True):
        by_class.setdefault(label, []).append(name)
    held_out = set().union(*(choose_held_out(names, seed) for names in by_class.values()))
    return held_out or choose_held_out(listing.names, seed)


def _keep(listing: _Listing, wanted: list[bool]) -> _Listing:
    names = [name for name, keep in zip(listing.names, wanted, strict=True) if keep]
    if listing.labels is None:
        return listing._replace(names=names)
    return listing._replace(
        names=names, labels=[label for label, keep in zip(listing.labels, wanted, strict=True) if keep]
    )


def _check_some(listing: _Listing, root: Path, request: Request) -> _Listing:
    if not listing.names:
        raise DataError(f"{root} has no image for the {request.split} split. Add images, at least two in all.")
    return listing


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(f"{folder} is {'not a folder' if folder.exists() else 'missing'}: expected a folder of images.")


def _sub_folders(folder: Path) -> list[Path]:
    visible = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(visible, key=lambda path: path.name)


def _walk(root: Path, folder: Path) -> Iterator[str]:
    """Yield the names, relative to `root`, of the images in a folder and below. Each real folder is entered once."""
    waiting, entered = [folder], set()
    while waiting:
        here = waiting.pop()
        real = here.resolve()
        if not real.is_relative_to(root.resolve()):
            raise DataError(f"{here} is a link out of {root}: links are followed inside only. Copy the folder instead.")
        if real not in entered:
            entered.add(real)
            waiting += _sub_folders(here)
            yield from (path.relative_to(root).as_posix() for path in here.iterdir() if _is_image(path))


def _is_image(path: Path) -> bool:
    """Return whether a path looks like an image file, by its name."""
    return not path.name.startswith(".") and path.suffix.lower() in SUFFIXES and (path.is_file() or path.is_symlink())
