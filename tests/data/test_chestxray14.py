"""ChestX-ray14: findings, the official lists, boxes, and the folders of the NIH's archives."""

import hashlib
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from keyed_xai.data import ImageSize, load_images
from keyed_xai.data.chestxray14 import FINDINGS
from keyed_xai.errors import DataError

SIZE = ImageSize(1, 16, 16)
COLUMNS = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,"
    "Height],OriginalImagePixelSpacing[x,y],"
)
ROWS = {  # image i has the grey value 20 i
    "00000001_000.png": "Cardiomegaly",
    "00000001_001.png": "Cardiomegaly|Emphysema",
    "00000002_000.png": "No Finding",
    "00000003_000.png": "Hernia",
    "00000003_001.png": "Atelectasis|Pleural_Thickening|Hernia",
    "00000004_000.png": "No Finding",
    "00000005_000.png": "Mass|Nodule",
    "00000006_000.png": "Effusion",
}
TEST = ["00000003_000.png", "00000003_001.png", "00000006_000.png"]
TRAIN = [name for name in ROWS if name not in TEST]
BOXES = """Image Index,Finding Label,Bbox [x,y,w,h],,,
00000001_000.png,Cardiomegaly,256.0,512.0,128.0,256.0,,,
00000001_000.png,Infiltrate,0,0,10,10,,,
,,,,,,,,
00000003_001.png,Atelectasis,0.0,102.4,1024.0,102.4,,,
"""


def write_chest(folder, places=("images",), entries="Data_Entry_2017.csv"):
    """Write the eight images, 40 x 30 pixels, in turn into the places."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(ROWS):
        place = folder / places[index % len(places)]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 30), 20 * index).save(place / name)
    body = [f"{name},{findings},0,1,058,M,PA,2682,2749,0.143,0.143," for name, findings in ROWS.items()]
    (folder / entries).write_text("\n".join([COLUMNS, *body]) + "\n")
    (folder / "BBox_List_2017.csv").write_text(BOXES)
    (folder / "train_val_list.txt").write_text("\n".join(TRAIN) + "\n")
    (folder / "test_list.txt").write_bytes("\r\n".join(TEST).encode())  # the last line has no end
    return folder


def load(folder, split="train", **changes):
    return load_images(f"chestxray14:{folder}", SIZE, split=split, **changes)


def names_of(data):
    return [list(ROWS)[round(int(value) / 20)] for value in data.images[:, 0, 8, 8]]


def findings_of(data):
    """Return the labels of each image as they are written in the file."""
    assert data.labels.shape == (len(data), 14)
    return ["|".join(np.array(FINDINGS)[row == 1]) or "No Finding" for row in data.labels]


def edit(folder, name, old, new):
    path = folder / name
    content = path.read_bytes().decode()
    assert old in content
    path.write_bytes(content.replace(old, new, 1).encode())


def test_official_lists_are_the_splits_and_labels_are_one_per_finding(tmp_path):
    write_chest(tmp_path)
    train, held_out = load(tmp_path), load(tmp_path, "held-out")
    assert sorted(names_of(train)) == TRAIN
    assert sorted(names_of(held_out)) == TEST
    assert train.multi_label
    assert train.classes == FINDINGS
    assert findings_of(train) + findings_of(held_out) == [ROWS[name] for name in names_of(train) + names_of(held_out)]
    assert train.source == "chestxray14 (train)"


@pytest.mark.parametrize(
    ("places", "entries"),
    [
        (["images_001/images", "images_002/images", "images_012/images"], "Data_Entry_2017.csv"),
        (["images", "images_003/images"], "Data_Entry_2017_v2020.csv"),
    ],
)
def test_layouts_of_the_archives_give_the_same_data(tmp_path, places, entries):
    one = load(write_chest(tmp_path / "one"))
    other = load(write_chest(tmp_path / "other", places, entries))
    assert np.array_equal(one.images, other.images)
    assert np.array_equal(one.labels, other.labels)
    assert np.array_equal(one.boxes, other.boxes, equal_nan=True)
    assert np.array_equal(one.box_labels, other.box_labels)


def test_first_box_is_scaled_from_1024_pixels_and_follows_the_crop(tmp_path):
    write_chest(tmp_path)
    train, held_out = load(tmp_path), load(tmp_path, "held-out")
    boxes = dict(zip(names_of(train) + names_of(held_out), [*train.boxes, *held_out.boxes], strict=True))
    # In the file's 40 x 30 pixels the edges are 10, 15, 15, 22.5; columns 5 to 35 are left.
    assert boxes.pop("00000001_000.png") == pytest.approx([5 / 30, 15 / 30, 10 / 30, 22.5 / 30])
    assert boxes.pop("00000003_001.png") == pytest.approx([0, 0.1, 1, 0.2])
    assert np.isnan([*boxes.values()]).all()


def box_labels_of(data):
    """Return the finding that each image's box shows, by name, of the images that have one."""
    assert data.box_labels.dtype == np.int64
    assert (data.box_labels == -1).tolist() == np.isnan(data.boxes[:, 0]).tolist()
    return {name: FINDINGS[label] for name, label in zip(names_of(data), data.box_labels, strict=True) if label != -1}


def test_box_labels_are_the_findings_of_the_first_boxes(tmp_path):
    write_chest(tmp_path)
    assert box_labels_of(load(tmp_path)) == {"00000001_000.png": "Cardiomegaly"}
    assert box_labels_of(load(tmp_path, "held-out")) == {"00000003_001.png": "Atelectasis"}


@pytest.mark.parametrize("written", ["Infiltrate", "Infiltration"])
def test_infiltrate_of_the_boxes_is_infiltration(tmp_path, written):
    edit(write_chest(tmp_path), "BBox_List_2017.csv", "png,Cardiomegaly", f"png,{written}")
    assert box_labels_of(load(tmp_path)) == {"00000001_000.png": "Infiltration"}


def test_box_that_the_crop_leaves_out_has_no_label(tmp_path):
    edit(write_chest(tmp_path), "BBox_List_2017.csv", "256.0,512.0,128.0", "0.0,512.0,100.0")
    assert box_labels_of(load(tmp_path)) == {}


def test_boxes_are_none_without_their_file(tmp_path):
    (write_chest(tmp_path) / "BBox_List_2017.csv").unlink()
    assert load(tmp_path).boxes is None
    assert load(tmp_path).box_labels is None
    assert len(load(tmp_path)) == 5


def test_limit_takes_first_findings_in_turn_and_is_a_prefix(tmp_path):
    write_chest(tmp_path)
    whole, part = load(tmp_path), load(tmp_path, limit=3)
    assert np.array_equal(part.images, whole.images[:3])
    assert np.array_equal(part.labels, whole.labels[:3])
    firsts = {ROWS[name].split("|")[0] for name in names_of(part)}
    assert firsts == {"Cardiomegaly", "No Finding", "Mass"}


def test_held_out_images_come_by_rank_alone_whatever_their_findings(tmp_path):
    write_chest(tmp_path)
    (tmp_path / "train_val_list.txt").write_text(TEST[0])
    names = [name for name in ROWS if name != TEST[0]]
    (tmp_path / "test_list.txt").write_text("\n".join(names))
    body = [f"{name},{'Mass' if name == names[-1] else 'No Finding'}" for name in ROWS]
    (tmp_path / "Data_Entry_2017.csv").write_text("\n".join([COLUMNS, *body]))
    for seed in range(4):  # balanced, the one image with a finding would always be first or second
        by_rank = sorted(names, key=lambda name, seed=seed: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
        assert names_of(load(tmp_path, "held-out", seed=seed)) == by_rank
        assert names_of(load(tmp_path, "held-out", seed=seed, limit=4)) == by_rank[:4]


def test_missing_and_broken_images_are_skipped(tmp_path):
    write_chest(tmp_path)
    (tmp_path / "images" / TRAIN[1]).unlink()
    (tmp_path / "images" / TRAIN[2]).write_bytes(b"I am no image")
    for seed in range(4):  # so that they are first in the order, in between, and last
        train = load(tmp_path, seed=seed)
        assert set(train.skipped) == {f"images/{TRAIN[1]}", f"images/{TRAIN[2]}"}
        assert sorted(names_of(train)) == [TRAIN[0], *TRAIN[3:]]
        assert findings_of(train) == [ROWS[name] for name in names_of(train)]
        assert (~np.isnan(train.boxes[:, 0])).tolist() == [name == TRAIN[0] for name in names_of(train)]
    with pytest.raises(DataError, match="strict"):
        load(tmp_path, strict=True)


def test_mostly_missing_images_are_refused(tmp_path):
    write_chest(tmp_path)
    for name in TRAIN[1:4]:
        (tmp_path / "images" / name).unlink()
    with pytest.raises(DataError, match="3 of 5 images cannot be read.*no such image file"):
        load(tmp_path)


MISSING = {
    "Data_Entry_2017.csv": r"Data_Entry_2017\.csv is missing: expected the header Image Index,Finding Labels",
    "train_val_list.txt": r"train_val_list\.txt is missing: expected the name of an image per line",
    "test_list.txt": r"test_list\.txt is missing: expected the name of an image per line",
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_file_is_named_with_what_it_holds(tmp_path, name):
    (write_chest(tmp_path) / name).unlink()
    with pytest.raises(DataError, match=MISSING[name]):
        load(tmp_path)


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere is missing"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="chestxray14:DIR"):
        load("")
    shutil.rmtree(write_chest(tmp_path) / "images")
    with pytest.raises(DataError, match="no folder images or images_001/images"):
        load(tmp_path)


def test_whole_classes_cannot_be_held_out(tmp_path):
    with pytest.raises(DataError, match="several findings per image"):
        load(write_chest(tmp_path), holdout="classes")


ENTRIES = "Data_Entry_2017.csv"
DAMAGE = {
    "other header": (
        ENTRIES,
        "Finding Labels",
        "Labels",
        r"Data_Entry_2017\.csv, line 1: .*Image Index,Finding Labels",
    ),
    "unknown finding": (ENTRIES, "Mass|", "Masse|", r"Data_Entry_2017\.csv, line 8: .*Hernia.*Masse"),
    "no finding at all": (ENTRIES, "Hernia,0", ",0", r"Data_Entry_2017\.csv, line 5"),
    "one cell": (ENTRIES, f"{TRAIN[0]},Cardiomegaly,0,1,058,M,PA,2682,2749,0.143,0.143,", "x.png", r"line 2"),
    "upwards": (ENTRIES, TRAIN[0], f"../{TRAIN[0]}", r"Data_Entry_2017\.csv, line 2: expected the name of an image"),
    "sub-folder": (ENTRIES, TRAIN[0], f"x/{TRAIN[0]}", r"Data_Entry_2017\.csv, line 2"),
    "unknown image": ("test_list.txt", TEST[1], "9.png", r"test_list\.txt, line 2: .* that Data_Entry_2017\.csv has"),
    "upwards in a list": ("train_val_list.txt", TRAIN[0], f"../{TRAIN[0]}", r"train_val_list\.txt, line 1"),
    "image in both lists": ("test_list.txt", TEST[1], TRAIN[1], f"{TRAIN[1]} is in both train_val_list.txt and test"),
    "header of boxes": ("BBox_List_2017.csv", "Image Index", "Image", r"BBox_List_2017\.csv, line 1"),
    "three edges": ("BBox_List_2017.csv", "0,0,10,10", "0,0,10", r"BBox_List_2017\.csv, line 3"),
    "no number": ("BBox_List_2017.csv", "0,0,10,10", "0,nan,10,10", r"BBox_List_2017\.csv, line 3"),
    "flat box": ("BBox_List_2017.csv", "102.4,1024.0", "102.4,0", r"BBox_List_2017\.csv, line 5"),
    "other finding": ("BBox_List_2017.csv", "Infiltrate", "Masse", r"BBox_List_2017\.csv, line 3: .*Hernia.*Masse"),
    "box of one cell": (
        "BBox_List_2017.csv",
        f"{TEST[1]},Atelectasis,0.0,102.4,1024.0,102.4",
        TEST[1],
        "BBox_List_2017.csv, line 5",
    ),
    "huge cell": (ENTRIES, "Mass", "M" * 200_000, r"Data_Entry_2017\.csv, line 8: .*10000 characters"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_line_is_named(tmp_path, damage):
    name, old, new, message = DAMAGE[damage]
    edit(write_chest(tmp_path), name, old, new)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_unknown_image_is_said_to_lack_in_the_file_that_was_read(tmp_path):
    edit(write_chest(tmp_path, entries="Data_Entry_2017_v2020.csv"), "test_list.txt", TEST[1], "9.png")
    with pytest.raises(DataError, match=r"expected an image that Data_Entry_2017_v2020\.csv has, got '9\.png'"):
        load(tmp_path)


def test_empty_list_is_refused(tmp_path):
    (write_chest(tmp_path) / "test_list.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"test_list\.txt is empty"):
        load(tmp_path, "held-out")


@pytest.mark.parametrize("name", ["images", "train_val_list.txt"])
def test_links_out_of_the_folder_are_refused(tmp_path, name):
    inside = write_chest(tmp_path / "chest")
    shutil.move(inside / name, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", inside / name)
    with pytest.raises(DataError, match="is a link out of"):
        load(inside)
