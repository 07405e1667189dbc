"""ChestX-ray14: 112,120 chest radiographs with any of 14 findings, the official split, and boxes around some findings.

Source: Wang, Peng, Lu, Lu, Bagheri and Summers 2017, "ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks
on Weakly-Supervised Classification and Localization of Common Thorax Diseases". The folder is the one of the NIH: two
CSV files, two lists, and the images in `images/` or in `images_001/images/` to `images_012/images/`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from keyed_xai.data.decode import Box, decode_images, map_box
from keyed_xai.data.images import ImageData, Request, Split, order_balanced, order_by_rank
from keyed_xai.data.listings import check_folders, is_inside, line_error, read_lines, read_rows
from keyed_xai.errors import DataError

FINDINGS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
_NO_FINDING = "No Finding"
_ENTRIES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
_BOXES = "BBox_List_2017.csv"
_OTHER_NAMES = {"Infiltrate": "Infiltration"}
"""Other names that the file of boxes has for findings."""
_LISTS: dict[Split, str] = {"train": "train_val_list.txt", "held-out": "test_list.txt"}
_FOLDERS = ("images", *(f"images_{number:03}/images" for number in range(1, 13)))
_DRAWN_ON = (1024, 1024)


class _Shown(NamedTuple):
    box: Box
    label: int


_NOTHING = _Shown((math.nan,) * 4, -1)


def load_chestxray14(argument: str, request: Request) -> ImageData:
    """Return a split of ChestX-ray14 with 14 labels per image, all 0 where nothing was found.

    The official test list is the held-out split; it shares no patient with the other list. An image's box is its
    first one, and `box_labels` has the finding that it shows. A limited load of the training split is balanced: it
    takes images by their first finding in the order of `FINDINGS`, or none, in turn. The held-out split comes in an
    order that no finding settles, so that a limited load of it keeps the official distribution, about.

    Args:
        argument: Folder of the data set.
        request: What to load; whole classes cannot be held out.

    Raises:
        DataError: A file other than that of the boxes is missing, or one is damaged; or more than half of the images
            are missing or broken, or one is and the request is strict.
    """
    if not argument:
        raise DataError("Give the folder after the name: chestxray14:DIR.")
    if request.holdout == "classes":
        raise DataError("ChestX-ray14 has several findings per image, so no class can be held out: use images.")
    root = Path(argument)
    if not root.is_dir():
        raise DataError(f"{root} is {'not a folder' if root.exists() else 'missing'}: expected that of ChestX-ray14.")
    findings = _read_findings(root)
    names = _read_split(root, request.split, findings)
    labels = np.array([findings[name] for name in names], np.int64)
    is_train = request.split == "train"
    order = order_balanced(names, labels, request) if is_train else order_by_rank(names, request.seed)[: request.limit]
    return _load(root, [names[index] for index in order], labels[order], request)


def _load(root: Path, names: Sequence[str], labels: NDArray[np.int64], request: Request) -> ImageData:
    boxes = _read_boxes(root)
    places = _find_images(root)
    paths = [places.get(name, f"{_FOLDERS[0]}/{name}") for name in names]
    images, kept, skipped = decode_images(root, paths, request)
    data = ImageData(
        images=images,
        labels=labels[kept],
        classes=FINDINGS,
        source=f"chestxray14 ({request.split})",
        skipped=tuple(skipped),
    )
    if boxes is None:
        return data
    shown = [_map_shown(root / paths[index], boxes.get(names[index]), request) for index in kept]
    mapped, findings = zip(*shown, strict=True)
    return replace(data, boxes=np.array(mapped, np.float32), box_labels=np.array(findings, np.int64))


def _map_shown(path: Path, shown: _Shown | None, request: Request) -> _Shown:
    """Return the box as the image made has it, or NaN and -1 where the image has none or the crop leaves none."""
    if shown is None:
        return _NOTHING
    box = map_box(path, shown.box, height=request.size.height, width=request.size.width, drawn_on=_DRAWN_ON)
    return _NOTHING if math.isnan(box[0]) else _Shown(box, shown.label)


def _find_images(root: Path) -> dict[str, str]:
    """Return where each image is, relative to the root, by name."""
    folders = [folder for folder in _FOLDERS if (root / folder).is_dir()]
    if not folders:
        raise DataError(f"{root} has no folder images or images_001/images: expected the radiographs in there.")
    check_folders(root, folders)
    return {path.name: f"{folder}/{path.name}" for folder in folders for path in (root / folder).iterdir()}


def _read_findings(root: Path) -> dict[str, list[int]]:
    """Return the 14 labels of each image of the data set, by name."""
    file = _name_entries(root)
    rows = _read_body(root, file, ["Image Index", "Finding Labels"])
    return {row[0]: _parse_findings(file, line, row) for line, row in rows}


def _name_entries(root: Path) -> str:
    return next((name for name in _ENTRIES if (root / name).is_file()), _ENTRIES[0])


def _read_body(root: Path, file: str, header: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Return the line numbers and cells of a CSV file's rows below its header, which must begin as given."""
    rows = read_rows(root, file, holds=f"the header {','.join(header)},... and the lines of the NIH below it")
    line, found = next(rows, (1, []))
    if found[: len(header)] != header:
        raise line_error(file, line, f"a header that begins with {','.join(header)}", ",".join(found))
    return rows


def _parse_findings(file: str, line: int, row: list[str]) -> list[int]:
    name, findings = row[0], set(row[1].split("|")) if len(row) > 1 else {""}
    if not is_inside(name) or "/" in name or not findings <= {_NO_FINDING, *FINDINGS}:
        expected = f"the name of an image, and {_NO_FINDING} or some of {'|'.join(FINDINGS)}"
        raise line_error(file, line, expected, ",".join(row))
    return [int(finding in findings) for finding in FINDINGS]


def _read_split(root: Path, split: Split, findings: dict[str, list[int]]) -> list[str]:
    """Return the names of a split's images, after a check that the two lists share none."""
    train, held_out = (_read_list(root, file, findings) for file in _LISTS.values())
    shared = train.keys() & held_out.keys()
    if shared:
        raise DataError(f"{min(shared)} is in both {' and '.join(_LISTS.values())}. Fetch the lists again.")
    return list(train if split == "train" else held_out)


def _read_list(root: Path, file: str, findings: dict[str, list[int]]) -> dict[str, None]:
    """Return the names in a list, in its order and each once."""
    names: dict[str, None] = {}
    for line, name in read_lines(root, file, holds="the name of an image per line, such as 00000001_000.png"):
        if name not in findings:
            raise line_error(file, line, f"an image that {_name_entries(root)} has", name)
        names[name] = None
    if not names:
        raise DataError(f"{root / file} is empty: expected the name of an image per line, such as 00000001_000.png.")
    return names


def _read_boxes(root: Path) -> dict[str, _Shown] | None:
    """Return the first box of each image that has one, and its finding, by name; None where there is no file."""
    if not (root / _BOXES).exists():
        return None
    boxes: dict[str, _Shown] = {}
    for line, row in _read_body(root, _BOXES, ["Image Index", "Finding Label"]):
        boxes.setdefault(row[0], _parse_box(line, row))
    return boxes


def _parse_box(line: int, row: list[str]) -> _Shown:
    try:
        _, finding, *edges = row[:6]
        label = FINDINGS.index(_OTHER_NAMES.get(finding, finding))
        left, top, width, height = map(float, edges)
    except ValueError:
        width = height = math.nan
    if not (0 < width < math.inf and 0 < height < math.inf and math.isfinite(left) and math.isfinite(top)):
        expected = f"an image, one of {'|'.join(FINDINGS)}, x, y, width and height"
        raise line_error(_BOXES, line, expected, ",".join(row))
    return _Shown((left, top, width, height), label)
