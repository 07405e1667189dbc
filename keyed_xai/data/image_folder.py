"""A folder of images, as torchvision's ImageFolder reads it and a little more.

Layouts: a folder per class; images only, without labels; and either of them inside `train` and `val` folders (or
`Training` and `Testing`, `valid`, `test_set`, ...: see `_SPLIT`), which are then the splits. Otherwise a fifth is held
out, chosen by a hash of the relative names and the seed, class by class. Hidden files are left alone; other files, and
folders without images, are passed over and counted in the notes. Links are followed inside the folder only, unless the
request says otherwise: a file that is a link out of it is skipped like a broken one, a folder that is one is refused.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keyed_xai.data.decode import (
    HEIF_SUFFIXES,
    HOW_TO_FOLLOW,
    WITHOUT_HEIF,
    decode_images,
    leads_out,
    readable_suffixes,
)
from keyed_xai.data.images import ImageData, Request, choose_classes, choose_held_out, order_balanced
from keyed_xai.errors import DataError

_SPLIT = re.compile(
    r"(train|val|dev|eval|test)(?:ing|id|idation|uation)?[ _-]?(?:set|data|images?|split)?", re.IGNORECASE
)
_TRAIN, _HELD_OUT = "train", ("val", "dev", "eval", "test")
_SHOWN = 8


class _Listing(NamedTuple):
    """Image files, by names relative to the folder, with one label each or none at all."""

    names: list[str]
    labels: list[int] | None
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


class _Folder(NamedTuple):
    """A folder of images, how it is read, and the suffixes of the files met that are none."""

    root: Path
    follow_links: bool
    others: Counter[str]


def load_image_folder(argument: str, request: Request) -> ImageData:
    """Return a split of a folder of images.

    Args:
        argument: Folder of the images.
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
    return ImageData(
        images=images,
        labels=labels,
        classes=listing.classes,
        source=source,
        skipped=tuple(skipped),
        notes=listing.notes,
    )


def list_images(folder: Path, *, follow_links: bool = False) -> list[Path]:
    """Return the image files in a folder and its sub-folders, sorted by relative name.

    Raises:
        DataError: The folder is missing, has no image, or has a link out of it and links are not to be followed.
    """
    _check_folder(folder)
    reading = _Folder(folder, follow_links, Counter())
    found = [folder / name for name in sorted(_walk(reading, folder))]
    if not found:
        raise DataError(f"{folder} has no image{_describe_others(reading.others)}.")
    for path in found:
        if not follow_links and leads_out(folder, path):
            raise DataError(f"{path} is a link out of {folder}: {HOW_TO_FOLLOW}.")
    return found


def _choose_split(root: Path, request: Request) -> _Listing:
    """Return the files of the split asked for: those of its folder where there is one, else by hash."""
    _check_folder(root)
    folder = _Folder(root, request.follow_links, Counter())
    train, held_out_half, notes = _list_halves(folder)
    if held_out_half is None:
        if request.holdout == "images":
            held_out = _hold_out_images(train, request.seed)
            wanted = [(name in held_out) == (request.split == "held-out") for name in train.names]
            train = _keep(train, wanted)
        chosen = train
    else:
        chosen = train if request.split == "train" else held_out_half
        chosen = _relabel(chosen, sorted({*train.classes, *held_out_half.classes}))
    if request.holdout == "classes":
        classes = choose_classes(chosen.classes, request)
        chosen = _keep(chosen, [label in classes for label in chosen.labels or []])
    if folder.others:
        notes.append(f"Passed over in {root.name}{_describe_others(folder.others)}.")
    return _check_some(chosen._replace(notes=tuple(notes)), root, request)


def _list_halves(folder: _Folder) -> tuple[_Listing, _Listing | None, list[str]]:
    """Return what is to learn from, what is held out where folders say so, and notes on what was taken for what."""
    splits = _find_split_folders(folder)
    if splits is None:
        listing = _list_labelled(folder, folder.root)
        empty = [child.name for child in _sub_folders(folder.root) if child.name not in listing.classes]
        notes = [f"Folders without an image: {_listed(empty)}."] if empty else []
        named = [name for name in listing.classes if _split_of(name)]
        if named and len(listing.classes) > len(named):
            notes.append(f"{_listed(named)} are taken for classes, as the folders beside them are.")
        return listing, None, notes
    train_folder, held_out_folder, others = splits
    train = _list_labelled(folder, train_folder)
    held_out = None if held_out_folder is None else _list_labelled(folder, held_out_folder)
    if held_out_folder is None or held_out is None or bool(held_out.classes) != bool(train.classes):
        others += [] if held_out_folder is None else [held_out_folder.name]
        said, held_out = f"Read from {train_folder.name}", None
    else:
        said = f"Split by folders: {train_folder.name} and {held_out_folder.name}"
    beside = f"; passed over beside: {_listed(others)}" if others else ""
    return train, held_out, [f"{said}{beside}."]


def _find_split_folders(folder: _Folder) -> tuple[Path, Path | None, list[str]] | None:
    """Return the folders of the two splits and the names of others; None where the folder is not laid out so.

    Folders beside them are passed over, unless all have images and no folders, as classes have.
    """
    children = _sub_folders(folder.root)
    by_split: dict[str, Path] = {}
    for child in children:
        split = _split_of(child.name)
        if split is not None:
            by_split.setdefault(split, child)
    filled = [child for child in children if any(_walk(folder._replace(others=Counter()), child))]
    found = [by_split[name] for name in (_TRAIN, *_HELD_OUT) if name in by_split and by_split[name] in filled]
    deep = [child for child in found if any(each for each in _sub_folders(child))]
    beside = [child for child in filled if _split_of(child.name) is None]
    if not found or (beside and not deep):
        return None
    train = by_split[_TRAIN] if _TRAIN in by_split and by_split[_TRAIN] in found else found[0]
    held_out = next((child for child in found if child != train and (child in deep) == (train in deep)), None)
    held_out = held_out or next((child for child in found if child != train), None)
    others = [child.name for child in children if child not in (train, held_out)]
    return train, held_out, others


def _split_of(name: str) -> str | None:
    """Return the split that a folder's name says, such as "train" for "Training set"."""
    found = _SPLIT.fullmatch(name)
    return found[1].lower() if found else None


def _list_labelled(reading: _Folder, folder: Path) -> _Listing:
    """Return what lies below `folder`, a folder per class or images only; names are relative to the root."""
    root = reading.root
    by_class = {child.name: sorted(_walk(reading, child)) for child in _sub_folders(folder)}
    by_class = {name: files for name, files in by_class.items() if files}
    loose = sorted(path.relative_to(root).as_posix() for path in _files(reading, folder))
    if by_class and loose:
        raise DataError(
            f"{folder} has images ({loose[0]}) beside class folders ({next(iter(by_class))}): expected one of the two."
        )
    if not by_class and not loose:
        raise DataError(f"{folder} has no image and no folder with images{_describe_others(reading.others)}.")
    if loose:
        return _Listing(loose, None, ())
    labels = [label for label, files in enumerate(by_class.values()) for _ in files]
    return _Listing([name for files in by_class.values() for name in files], labels, tuple(by_class))


def _relabel(listing: _Listing, classes: list[str]) -> _Listing:
    """Return the listing with labels that index `classes`, a superset of its own."""
    if listing.labels is None:
        return listing
    labels = [classes.index(listing.classes[label]) for label in listing.labels]
    return _Listing(listing.names, labels, tuple(classes), listing.notes)


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


def _walk(reading: _Folder, folder: Path) -> Iterator[str]:
    """Yield the names, relative to the root, of the images in a folder and below.

    Each real folder is entered once, and none that the folder itself is in.
    """
    root, waiting, entered = reading.root, [folder], set(folder.resolve().parents)
    while waiting:
        here = waiting.pop()
        real = here.resolve()
        if not reading.follow_links and not real.is_relative_to(root.resolve()):
            raise DataError(f"{here} is a link out of {root}: {HOW_TO_FOLLOW}.")
        if real not in entered:
            entered.add(real)
            waiting += _sub_folders(here)
            yield from (path.relative_to(root).as_posix() for path in _files(reading, here))


def _files(reading: _Folder, folder: Path) -> Iterator[Path]:
    """Yield the files in a folder that are images by their names, and count the others that are not hidden."""
    for path in folder.iterdir():
        if path.name.startswith(".") or not (path.is_file() or path.is_symlink()) or path.is_dir():
            continue
        if path.suffix.lower() in readable_suffixes():
            yield path
        else:
            reading.others[path.suffix.lower()] += 1


def _describe_others(others: Counter[str]) -> str:
    """Return how many files of other kinds there are, and what photographs of telephones need; starts with a colon."""
    if not others:
        return ""
    counts = [f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(others.items())]
    hint = f" ({WITHOUT_HEIF})" if HEIF_SUFFIXES & others.keys() else ""
    return f": files {_listed(counts)}{hint}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
