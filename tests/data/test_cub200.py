"""CUB-200-2011: its five lists, the official split, and boxes that follow the centre crop."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from keyed_xai.data import ImageSize, load_images
from keyed_xai.data.decode import map_box
from keyed_xai.errors import DataError

SIZE = ImageSize(3, 16, 16)
FOLDERS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")
LISTS = ("images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt", "bounding_boxes.txt")
BOX = (10.0, 6.0, 15.0, 12.0)  # x, y, width, height in the 40 x 30 pixels of every image


def write_cub(folder, per_class=4):
    """Write images 1, 2, ... class by class, every fourth of them for testing; image i has a red of 10 i in its box."""
    lines = {name: [] for name in LISTS}
    number = 0
    for label, name in enumerate(FOLDERS, 1):
        lines["classes.txt"].append(f"{label} {name}")
        (folder / "images" / name).mkdir(parents=True)
        for index in range(per_class):
            number += 1
            path = f"{name}/{name[4:]}_{index:04}_{number}.jpg"
            write_photograph(folder / "images" / path, number)
            lines["images.txt"].append(f"{number} {path}")
            lines["image_class_labels.txt"].append(f"{number} {label}")
            lines["train_test_split.txt"].append(f"{number} {int(index % 4 > 0)}")
            lines["bounding_boxes.txt"].append(f"{number} {' '.join(map(str, BOX))}")
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content) + "\n")
    return folder


def write_photograph(path, number, **options):
    image = Image.new("RGB", (40, 30), (0, 0, 255))
    image.paste((10 * number, 0, 0), (10, 6, 25, 18))
    image.save(path, quality=95, subsampling=0, **options)


def load(folder, split="train", size=SIZE, **changes):
    return load_images(f"cub200:{folder}", size, split=split, **changes)


def numbers(data):
    """Return which images these are, from the red inside their boxes."""
    return np.round(data.images[:, 0, 6, 6] / 10).astype(int).tolist()


def edit(folder, name, old, new):
    path = folder / name
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


@pytest.mark.parametrize("place", ["", "CUB_200_2011"])
def test_official_split_is_read_from_the_folder_or_its_parent(tmp_path, place):
    write_cub(tmp_path / place)
    train, held_out = load(tmp_path), load(tmp_path, "held-out")
    assert sorted(numbers(held_out)) == [1, 5, 9]
    assert sorted(numbers(train)) == [2, 3, 4, 6, 7, 8, 10, 11, 12]
    assert train.classes == held_out.classes == ("Black footed Albatross", "Laysan Albatross", "Sooty Albatross")
    assert train.labels.tolist() == [(number - 1) // 4 for number in numbers(train)]
    assert train.source == "cub200 (train)"
    assert not train.multi_label


def test_boxes_follow_the_centre_crop(tmp_path):
    write_cub(tmp_path)
    square = load(tmp_path)  # columns 5 to 35 of 40 are left
    assert square.boxes.dtype == np.float32
    assert square.box_labels is None
    assert square.boxes == pytest.approx(np.tile([5 / 30, 6 / 30, 20 / 30, 18 / 30], (9, 1)))
    wide = load(tmp_path, size=ImageSize(3, 10, 20))  # rows 5 to 25 of 30 are left
    assert wide.boxes == pytest.approx(np.tile([10 / 40, 1 / 20, 25 / 40, 13 / 20], (9, 1)))


def test_box_lies_where_the_pixels_of_the_object_are(tmp_path):
    data = load(write_cub(tmp_path), size=ImageSize(3, 60, 60))
    for image, (left, top, right, bottom) in zip(data.images, np.round(60 * data.boxes).astype(int), strict=True):
        is_object = image[2] < 128  # all else is blue
        assert is_object[top + 1 : bottom - 1, left + 1 : right - 1].all()
        is_object[top - 1 : bottom + 1, left - 1 : right + 1] = False
        assert not is_object.any()


def test_box_is_clipped_to_the_crop_and_absent_when_nothing_is_left(tmp_path):
    write_photograph(tmp_path / "x.jpg", 1)
    assert map_box(tmp_path / "x.jpg", (0.0, -3.0, 90.0, 13.0), height=9, width=9) == pytest.approx((0, 0, 1, 1 / 3))
    assert np.isnan(map_box(tmp_path / "x.jpg", (0.0, 0.0, 5.0, 30.0), height=9, width=9)).all()
    assert np.isnan(map_box(tmp_path / "nowhere.jpg", BOX, height=9, width=9)).all()
    doubled = map_box(tmp_path / "x.jpg", (20.0, 12.0, 30.0, 24.0), height=9, width=9, drawn_on=(80, 60))
    assert doubled == pytest.approx(map_box(tmp_path / "x.jpg", BOX, height=9, width=9))


def test_turned_photograph_has_no_box(tmp_path):
    write_cub(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    first = (tmp_path / "images.txt").read_text().split()[1]
    write_photograph(tmp_path / "images" / first, 1, exif=exif)
    held_out = load(tmp_path, "held-out")
    assert np.isnan(held_out.boxes).all(axis=1).tolist() == [label == 0 for label in held_out.labels]


def test_limit_is_balanced_and_a_prefix(tmp_path):
    write_cub(tmp_path)
    whole, part = load(tmp_path), load(tmp_path, limit=6)
    assert np.bincount(part.labels).tolist() == [2, 2, 2]
    assert np.array_equal(part.images, whole.images[:6])
    assert np.array_equal(part.boxes, whole.boxes[:6])
    assert numbers(load(tmp_path)) == numbers(whole)
    assert any(numbers(load(tmp_path, seed=seed)) != numbers(whole) for seed in (1, 2))


def test_held_out_classes_are_disjoint_and_together_all(tmp_path):
    write_cub(tmp_path)
    train, held_out = (load(tmp_path, split, holdout="classes") for split in ("train", "held-out"))
    assert len(set(held_out.labels)) == 1
    assert set(train.labels) | set(held_out.labels) == {0, 1, 2}
    assert not set(train.labels) & set(held_out.labels)
    assert len(train) == 6


def test_missing_and_broken_images_are_skipped_with_their_boxes(tmp_path):
    write_cub(tmp_path)
    names = [line.split()[1] for line in (tmp_path / "images.txt").read_text().splitlines()]
    (tmp_path / "images" / names[1]).unlink()
    (tmp_path / "images" / names[6]).write_bytes(b"I am no image")
    edit(tmp_path, "bounding_boxes.txt", "8 10.0", "8 20.0")
    train = load(tmp_path)
    assert set(train.skipped) == {f"images/{names[1]}", f"images/{names[6]}"}
    assert sorted(numbers(train)) == [3, 4, 6, 8, 10, 11, 12]
    assert len(train.labels) == len(train.boxes) == 7
    assert train.boxes[numbers(train).index(8), 0] == pytest.approx(0.5)
    with pytest.raises(DataError, match="strict"):
        load(tmp_path, strict=True)


@pytest.mark.parametrize("name", LISTS)
def test_missing_list_is_named_with_what_it_holds(tmp_path, name):
    (write_cub(tmp_path) / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing: expected lines such as '1 "):
        load(tmp_path)


def test_missing_folder_and_argument_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is missing: expected the folder CUB_200_2011"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cub200:DIR"):
        load("")


DAMAGE = {
    "no number": ("images.txt", "2 001", "two 001", r"^images\.txt, line 2: expected a new number"),
    "number twice": ("images.txt", "2 001", "1 001", r"^images\.txt, line 2"),
    "no name": ("images.txt", f"2 {FOLDERS[0]}/Black_footed_Albatross_0001_2.jpg", "2", r"^images\.txt, line 2"),
    "upwards": ("images.txt", f"2 {FOLDERS[0]}", "2 ../..", r"^images\.txt, line 2: .*\.\./\.\."),
    "absolute": ("images.txt", f"2 {FOLDERS[0]}", "2 /etc", r"^images\.txt, line 2"),
    "drive": ("images.txt", f"2 {FOLDERS[0]}/", "2 C:\\\\", r"^images\.txt, line 2"),
    "zero byte": ("images.txt", f"2 {FOLDERS[0]}/", "2 a\0", r"^images\.txt, line 2"),
    "long name": ("images.txt", f"2 {FOLDERS[0]}/", "2 " + 300 * "a", r"^images\.txt, line 2"),
    "long line": ("images.txt", "2 001", "2 " + 20_000 * "a", r"^images\.txt, line 2: .*at most 10000 characters"),
    "unknown class": ("image_class_labels.txt", "3 1", "3 4", r"^image_class_labels\.txt, line 3"),
    "class zero": ("image_class_labels.txt", "3 1", "3 0", r"^image_class_labels\.txt, line 3"),
    "no label": ("image_class_labels.txt", "3 1\n", "", "has no line for image 3 of images.txt"),
    "third split": ("train_test_split.txt", "4 1", "4 2", r"^train_test_split\.txt, line 4"),
    "gap in the classes": ("classes.txt", "3 003", "4 003", "numbered 1, 2, ... without a gap"),
    "three edges": ("bounding_boxes.txt", "5 10.0 6.0", "5 10.0", r"^bounding_boxes\.txt, line 5"),
    "no number in a box": ("bounding_boxes.txt", "5 10.0", "5 nan", r"^bounding_boxes\.txt, line 5"),
    "flat box": ("bounding_boxes.txt", "5 10.0 6.0 15.0", "5 10.0 6.0 0.0", r"^bounding_boxes\.txt, line 5"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_line_is_named(tmp_path, damage):
    name, old, new, message = DAMAGE[damage]
    edit(write_cub(tmp_path), name, old, new)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_split_without_images_is_refused(tmp_path):
    write_cub(tmp_path)
    path = tmp_path / "train_test_split.txt"
    path.write_text(path.read_text().replace(" 0\n", " 1\n"))
    assert len(load(tmp_path)) == 12
    with pytest.raises(DataError, match=r"train_test_split\.txt leaves no image for the held-out split"):
        load(tmp_path, "held-out")


def test_binary_and_oversized_lists_are_refused(tmp_path, monkeypatch):
    write_cub(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe1 x")
    with pytest.raises(DataError, match=r"classes\.txt cannot be read"):
        load(tmp_path)
    monkeypatch.setattr("keyed_xai.data.listings.LARGEST_TEXT", 2)
    with pytest.raises(DataError, match=r"classes\.txt has over 2 bytes"):
        load(tmp_path)


@pytest.mark.parametrize("name", [f"images/{FOLDERS[1]}", "images", "classes.txt"])
def test_links_out_of_the_folder_are_refused(tmp_path, name):
    inside = write_cub(tmp_path / "cub")
    shutil.move(inside / name, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", inside / name)
    with pytest.raises(DataError, match="is a link out of"):
        load(inside)
