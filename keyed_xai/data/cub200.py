"""CUB-200-2011: 11,788 photographs of 200 kinds of birds, with the official split and a box around each bird.

Source: Wah, Branson, Welinder, Perona and Belongie 2011, "The Caltech-UCSD Birds-200-2011 Dataset". The folder is the
one of the archive: five text files, whose lines begin with the number of an image or class, and `images/`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from keyed_xai.data.decode import Box, decode_images, map_box
from keyed_xai.data.images import ImageData, Request, choose_classes, order_balanced
from keyed_xai.data.listings import check_folders, is_inside, line_error, read_lines
from keyed_xai.errors import DataError

_FOLDER = "CUB_200_2011"
_EXAMPLES = {
    "images.txt": "1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg",
    "image_class_labels.txt": "1 1",
    "classes.txt": "1 001.Black_footed_Albatross",
    "train_test_split.txt": "1 0",
    "bounding_boxes.txt": "1 60.0 27.0 325.0 304.0",
}
_Entry = TypeVar("_Entry")


class _Photograph(NamedTuple):
    name: str
    label: int
    is_train: bool
    box: Box


def load_cub200(argument: str, request: Request) -> ImageData:
    """Return a split of CUB-200-2011 with boxes; the official test set is the held-out split.

    Where whole classes are held out, a fifth of them are, and "train" has official training images of the others.

    Args:
        argument: The folder CUB_200_2011, or the one that it lies in.
        request: What to load.

    Raises:
        DataError: A file is missing or damaged; or images are broken and the request is strict or more than half are.
    """
    if not argument:
        raise DataError("Give the folder after the name: cub200:DIR.")
    root = _find_folder(Path(argument))
    classes = _read_classes(root)
    wanted = choose_classes(classes, request) if request.holdout == "classes" else range(len(classes))
    photographs = [
        photograph
        for photograph in _read_photographs(root, len(classes))
        if photograph.is_train == (request.split == "train") and photograph.label in wanted
    ]
    if not photographs:
        raise DataError(f"{root}: train_test_split.txt leaves no image for the {request.split} split.")
    return _load(root, photographs, classes, request)


def _load(root: Path, photographs: Sequence[_Photograph], classes: tuple[str, ...], request: Request) -> ImageData:
    labels = [photograph.label for photograph in photographs]
    order = order_balanced([photograph.name for photograph in photographs], labels, request)
    photographs = [photographs[index] for index in order]
    images, kept, skipped = decode_images(root, [photograph.name for photograph in photographs], request)
    photographs = [photographs[index] for index in kept]
    boxes = [
        map_box(root / photograph.name, photograph.box, height=request.size.height, width=request.size.width)
        for photograph in photographs
    ]
    return ImageData(
        images=images,
        labels=np.array([photograph.label for photograph in photographs], np.int64),
        classes=classes,
        source=f"cub200 ({request.split})",
        skipped=tuple(skipped),
        boxes=np.array(boxes, np.float32),
    )


def _find_folder(folder: Path) -> Path:
    """Return the folder with the lists: the one given, or CUB_200_2011 in it."""
    inner = folder / _FOLDER
    root = inner if inner.is_dir() else folder
    if not root.is_dir():
        raise DataError(f"{root} is {'not a folder' if root.exists() else 'missing'}: expected the folder {_FOLDER}.")
    return root


def _read_classes(root: Path) -> tuple[str, ...]:
    """Return the names of the classes, "Black footed Albatross" for "001.Black_footed_Albatross"."""
    names = _read_list(root, "classes.txt", lambda name: name.partition(".")[2].replace("_", " ") or name)
    if not names or set(names) != set(range(1, len(names) + 1)):
        raise DataError(f"{root / 'classes.txt'}: expected classes numbered 1, 2, ... without a gap. Fetch it again.")
    return tuple(names[number] for number in range(1, len(names) + 1))


def _read_photographs(root: Path, classes: int) -> list[_Photograph]:
    """Return what the lists say of each image, in the order of `images.txt`."""
    names = _read_list(root, "images.txt", _parse_name)
    # `index` refuses a class that there is not, or a split other than 0 and 1, with a ValueError.
    labels = _read_list(root, "image_class_labels.txt", lambda label: range(classes).index(int(label) - 1), names)
    splits = _read_list(root, "train_test_split.txt", lambda split: ("0", "1").index(split) == 1, names)
    boxes = _read_list(root, "bounding_boxes.txt", _parse_box, names)
    check_folders(root, (Path(name).parent.as_posix() for name in names.values()))
    return [_Photograph(name, labels[image], splits[image], boxes[image]) for image, name in names.items()]


def _read_list(root: Path, file: str, parse: Callable[[str], _Entry], images: Iterable[int] = ()) -> dict[int, _Entry]:
    """Return what the lines of a list say, by the number that they begin with.

    Args:
        root: Folder of the list.
        file: Name of the list.
        parse: Makes an entry of the rest of a line; raises ValueError where that is damaged.
        images: Numbers that the list must have.

    Raises:
        DataError: The list is missing, lacks a number, has one twice, or has a damaged line.
    """
    found: dict[int, _Entry] = {}
    for line, text in read_lines(root, file, holds=f"lines such as {_EXAMPLES[file]!r}"):
        number, _, rest = text.partition(" ")
        try:
            if int(number) in found:
                raise ValueError("twice")
            found[int(number)] = parse(rest.strip())
        except ValueError:
            raise line_error(file, line, f"a new number and the rest as in {_EXAMPLES[file]!r}", text) from None
    missing = set(images) - found.keys()
    if missing:
        raise DataError(f"{root / file} has no line for image {min(missing)} of images.txt. Fetch it again.")
    return found


def _parse_name(name: str) -> str:
    if not is_inside(name):
        raise ValueError("not a name inside the folder of images")
    return f"images/{name}"


def _parse_box(text: str) -> Box:
    left, top, width, height = (float(number) for number in text.split())
    if not (all(map(math.isfinite, (left, top))) and 0 < width < math.inf and 0 < height < math.inf):
        raise ValueError("not a box")
    return left, top, width, height
