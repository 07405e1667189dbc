"""Folders of images: layouts, splits, links, broken files, worker processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keyed_xai.data import ImageSize, list_images, load_images, read_image
from keyed_xai.data.decode import readable_suffixes
from keyed_xai.errors import DataError
from tests.heard import Heard

SIZE = ImageSize(3, 8, 8)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def write_image(path, number):
    """Write a PNG of one colour that tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (number, 255 - number, 7)).save(path)


def write_classes(folder, counts, start=0):
    for name, count in counts.items():
        for index in range(count):
            write_image(folder / name / f"{index}.png", start)
            start += 1
    return folder


def numbers(data):
    return data.images[:, 0, 4, 4].tolist()


def load(folder, split="train", **changes):
    return load_images(f"imagefolder:{folder}", SIZE, split=split, **changes)


def test_classes_are_sub_folders_and_a_fifth_of_each_is_held_out(tmp_path):
    write_classes(tmp_path, {"cat": 10, "ant": 5, "bee": 20})
    train, held_out = load(tmp_path), load(tmp_path, "held-out")
    assert train.classes == held_out.classes == ("ant", "bee", "cat")
    assert np.bincount(train.labels).tolist() == [4, 16, 8]
    assert np.bincount(held_out.labels).tolist() == [1, 4, 2]
    assert sorted(numbers(train) + numbers(held_out)) == list(range(35))
    by_number = ["cat"] * 10 + ["ant"] * 5 + ["bee"] * 20
    assert [train.classes[label] for label in train.labels] == [by_number[number] for number in numbers(train)]
    assert train.source == f"imagefolder:{tmp_path.name} (train)"


def test_flat_folder_has_no_labels(tmp_path):
    for number in range(10):
        write_image(tmp_path / f"{number}.png", number)
    train, held_out = load(tmp_path), load(tmp_path, "held-out")
    assert train.labels is None
    assert train.classes == ()
    assert len(train) == 8
    assert sorted(numbers(train) + numbers(held_out)) == list(range(10))


@pytest.mark.parametrize("held_out_name", ["val", "test", "valid"])
def test_train_and_val_folders_are_the_splits(tmp_path, held_out_name):
    write_classes(tmp_path / "train", {"a": 3, "b": 2, "c": 1})
    write_classes(tmp_path / held_out_name, {"c": 2, "a": 1}, start=100)
    train, held_out = load(tmp_path), load(tmp_path, "held-out")
    assert sorted(numbers(train)) == list(range(6))
    assert sorted(zip(numbers(held_out), held_out.labels, strict=True)) == [(100, 2), (101, 2), (102, 0)]
    assert held_out.classes == ("a", "b", "c")


def test_val_is_taken_before_test_and_the_folders_may_be_flat(tmp_path):
    for number, name in enumerate(["train", "val", "test"]):
        write_image(tmp_path / name / "x.png", number)
    assert numbers(load(tmp_path)) == [0]
    held_out = load(tmp_path, "held-out")
    assert numbers(held_out) == [1]
    assert held_out.labels is None


def test_train_beside_other_classes_is_a_class_and_that_is_said(tmp_path):
    write_classes(tmp_path, {"train": 2, "bus": 2, "test": 2})
    data = load(tmp_path)
    assert data.classes == ("bus", "test", "train")
    assert data.notes == ("test, train are taken for classes, as the folders beside them are.",)


SPLIT_NAMES = [
    ("Training", "Testing"), ("Train", "Val"), ("TRAIN", "TEST"), ("train_set", "test_set"), ("train-images", "dev"),
    ("Training Set", "Validation Set"), ("traindata", "valid"), ("train", "evaluation"),
]  # fmt: skip


@pytest.mark.parametrize(("train_name", "held_out_name"), SPLIT_NAMES)
def test_split_folders_are_known_by_usual_names_in_any_case(tmp_path, train_name, held_out_name):
    write_classes(tmp_path / train_name, {"a": 3, "b": 2})
    write_classes(tmp_path / held_out_name, {"a": 1, "b": 1}, start=100)
    train, held_out = load(tmp_path), load(tmp_path, "held-out")
    assert train.classes == held_out.classes == ("a", "b")
    assert sorted(numbers(train)) == list(range(5))
    assert sorted(numbers(held_out)) == [100, 101]
    assert train.notes == held_out.notes == (f"Split by folders: {train_name} and {held_out_name}.",)


@pytest.mark.parametrize("name", ["training day", "contest", "testers", "trainer", "valley"])
def test_other_names_are_classes(tmp_path, name):
    write_classes(tmp_path, {name: 3, "train": 3})
    assert load(tmp_path).classes == tuple(sorted([name, "train"]))


def test_folders_beside_the_splits_are_passed_over_and_named(tmp_path):
    write_classes(tmp_path / "train", {"a": 3, "b": 2})
    write_classes(tmp_path / "val", {"a": 1, "b": 1}, start=100)
    write_classes(tmp_path, {"masks": 4, "test/a": 1})
    (tmp_path / "annotations").mkdir()
    train, held_out = load(tmp_path), load(tmp_path, "held-out")
    assert train.classes == ("a", "b")
    assert sorted(numbers(held_out)) == [100, 101]
    assert train.notes == ("Split by folders: train and val; passed over beside: annotations, masks, test.",)


@pytest.mark.parametrize("beside", [{}, {"test": 3}])
def test_training_folder_alone_is_split_by_hash(tmp_path, beside):
    """Also where the other one has images without classes, as competitions hand them out."""
    write_classes(tmp_path / "train", {"a": 5, "b": 5})
    write_classes(tmp_path, beside, start=100)
    train, held_out = load(tmp_path), load(tmp_path, "held-out")
    assert train.classes == ("a", "b")
    assert sorted(numbers(train) + numbers(held_out)) == list(range(10))
    assert "Read from train" in train.notes[0]
    assert ("passed over beside: test" in train.notes[0]) == bool(beside)


def test_held_out_folder_with_classes_is_taken_before_one_without(tmp_path):
    write_classes(tmp_path / "train", {"a": 5, "b": 5})
    write_classes(tmp_path, {"val": 2}, start=50)
    write_classes(tmp_path / "test", {"a": 1, "b": 1}, start=100)
    assert sorted(numbers(load(tmp_path, "held-out"))) == [100, 101]


def test_what_is_passed_over_is_counted(tmp_path):
    write_classes(tmp_path, {"a": 4, "b": 4})
    for name in ("a/x.xml", "a/y.XML", "b/readme.txt", "c/z.raw", "b/LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    assert load(tmp_path).notes == (
        "Folders without an image: c.",
        f"Passed over in {tmp_path.name}: files 1 without a suffix, 1 .raw, 1 .txt, 2 .xml.",
    )


@pytest.mark.parametrize(
    ("suffix", "form"),
    [
        (".jfif", "JPEG"), (".jpe", "JPEG"), (".JPEG", "JPEG"), (".avif", "AVIF"), (".jp2", "JPEG2000"),
        (".tga", "TGA"),
        (".qoi", "QOI"), (".pcx", "PCX"), (".pnm", "PPM"), (".apng", "PNG"),
        (".dib", "DIB"), (".sgi", "SGI"),
    ],
)  # fmt: skip
def test_what_pillow_reads_is_read(tmp_path, suffix, form):
    for number in range(4):
        path = tmp_path / "ab"[number % 2] / f"{number}{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number, 200, 100)).save(path, form)
    both = [load(tmp_path, split, strict=True) for split in ("train", "held-out")]
    levels = sorted(level for data in both for level in numbers(data))
    assert np.abs(np.subtract(levels, [0, 40, 80, 120])).max() <= 6
    assert both[0].classes == ("a", "b")
    assert both[0].notes == ()


def test_heic_is_read_where_its_package_is_installed(tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    for number in range(4):
        Image.new("RGB", (16, 16), (40 * number, 200, 100)).save(tmp_path / f"{number}.HEIC", "HEIF")
    levels = sorted(numbers(load(tmp_path)) + numbers(load(tmp_path, "held-out")))
    assert np.abs(np.subtract(levels, [0, 40, 80, 120])).max() <= 6


def test_heic_without_its_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("keyed_xai.data.decode._add_heif", lambda: False)
    readable_suffixes.cache_clear()
    try:
        folder = write_classes(tmp_path / "photos", {"a": 4, "b": 4})
        (folder / "a" / "x.HEIC").write_bytes(b"picture")
        assert load(folder).notes == (
            "Passed over in photos: files 1 .heic (HEIC needs the package pillow-heif (keyed-xai[heic])).",
        )
        (tmp_path / "phone").mkdir()
        (tmp_path / "phone" / "x.heic").write_bytes(b"picture")
        with pytest.raises(DataError, match=r"no image.*1 \.heic .*pillow-heif"):
            load(tmp_path / "phone")
        with pytest.raises(DataError, match=r"no image.*pillow-heif"):
            list_images(tmp_path / "phone")
        with pytest.raises(DataError, match="pillow-heif"):
            read_image(tmp_path / "phone" / "x.heic", channels=3, height=8, width=8)
    finally:
        readable_suffixes.cache_clear()


def test_whole_classes_can_be_held_out(tmp_path):
    write_classes(tmp_path, {name: 2 for name in "abcdefghij"})
    train, held_out = (load(tmp_path, split, holdout="classes") for split in ("train", "held-out"))
    assert len(set(held_out.labels)) == 2
    assert not set(train.labels) & set(held_out.labels)
    assert sorted(numbers(train) + numbers(held_out)) == list(range(20))


@pytest.mark.parametrize("counts", [{"a": 4}, {}])
def test_holding_out_classes_needs_two(tmp_path, counts):
    write_classes(tmp_path, counts)
    if not counts:
        write_image(tmp_path / "flat.png", 0)
    with pytest.raises(DataError, match="two or more"):
        load(tmp_path, holdout="classes")


def test_split_depends_on_seed_and_names_only(tmp_path):
    here, there = (write_classes(tmp_path / name, {"a": 20, "b": 20}) for name in ("here", "there"))
    assert numbers(load(here)) == numbers(load(there))
    assert set(numbers(load(here))) != set(numbers(load(here, seed=1)))


def test_limit_is_a_class_balanced_prefix(tmp_path):
    write_classes(tmp_path, {"a": 10, "b": 40})
    part = load(tmp_path, limit=6)
    assert np.bincount(part.labels).tolist() == [3, 3]
    assert numbers(part) == numbers(load(tmp_path))[:6]


def test_single_images_per_class_are_held_out_together(tmp_path):
    write_classes(tmp_path, {name: 1 for name in "abcdefghij"})
    assert len(load(tmp_path)) == 8
    assert len(load(tmp_path, "held-out")) == 2


def test_one_image_cannot_be_split(tmp_path):
    write_image(tmp_path / "only.png", 1)
    assert numbers(load(tmp_path)) == [1]
    with pytest.raises(DataError, match="at least two"):
        load(tmp_path, "held-out")


def test_hidden_files_and_folders_without_images_are_left_alone(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 2, ".cache": 3})
    (tmp_path / "a" / "._0.png").write_bytes(b"Mac rubbish")
    (tmp_path / "README.txt").write_text("read me")
    (tmp_path / "notes").mkdir()
    train = load(tmp_path, strict=True)
    assert train.classes == ("a", "b")
    assert train.skipped == ()


def test_nested_folders_belong_to_their_class(tmp_path):
    write_classes(tmp_path, {"a/day": 2, "a/night": 2, "b": 4})
    assert load(tmp_path).classes == ("a", "b")
    assert len(load(tmp_path)) + len(load(tmp_path, "held-out")) == 8


@pytest.mark.parametrize("layout", ["missing", "empty", "file", "no images", "mixed", "no name"])
def test_other_layouts_are_refused(tmp_path, layout):
    folder = tmp_path / "photos"
    if layout == "file":
        folder.write_text("no folder")
    elif layout != "missing":
        folder.mkdir()
    if layout == "no images":
        (folder / "a").mkdir()
        (folder / "a" / "data.csv").write_text("1,2")
    if layout == "mixed":
        write_image(folder / "x.png", 1)
        write_image(folder / "a" / "x.png", 2)
    expected = {"missing": "is missing", "file": "not a folder", "mixed": "beside class folders", "no name": "DIR"}
    with pytest.raises(DataError, match=expected.get(layout, "no image")):
        load("" if layout == "no name" else folder)


def add_broken(folder):
    (folder / "a" / "text.png").write_text("I am no image")
    whole = (folder / "a" / "0.jpg").read_bytes()
    (folder / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "empty.jpg").write_bytes(b"")
    return {"a/text.png", "b/cut.jpg", "b/empty.jpg"}


def write_noise(folder):
    generator = np.random.default_rng(0)
    for index in range(24):
        path = folder / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return folder


def test_broken_images_are_named_and_skipped_whatever_the_number_of_workers(tmp_path):
    broken = add_broken(write_noise(tmp_path))
    heard = Heard()
    alone = load(tmp_path, workers=1, progress=heard)
    pooled = load(tmp_path, workers=2)
    held_out = load(tmp_path, "held-out", workers=0)
    assert set(alone.skipped) | set(held_out.skipped) == broken
    assert len(alone) + len(held_out) == 24
    total = len(alone) + len(alone.skipped)
    assert heard.steps == [("reading train images", count, total) for count in range(1, total + 1)]
    assert np.array_equal(alone.images, pooled.images)
    assert np.array_equal(alone.labels, pooled.labels)
    assert alone.skipped == pooled.skipped
    assert len(alone.labels) == len(alone)


def test_script_without_main_guard_is_told_what_to_do(tmp_path):
    write_noise(tmp_path / "photos")
    script = tmp_path / "script.py"
    form = "ImageSize(1, 8, 8), split='train', workers=2"
    script.write_text(f"from keyed_xai.data import ImageSize, load_images\nload_images('imagefolder:photos', {form})\n")
    command = [sys.executable, script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 1
    # The interpreter may add a warning of its own behind the error.
    assert any("DataError" in line and "pass workers=0" in line for line in done.stderr.splitlines())


def test_strict_refuses_the_first_broken_image_by_name(tmp_path):
    write_classes(tmp_path, {"a": 8})
    (tmp_path / "a" / "x.png").write_text("I am no image")
    split = "train" if load(tmp_path).skipped else "held-out"
    with pytest.raises(DataError, match=r"^a/x\.png: not a readable image: not one of JPEG.*strict"):
        load(tmp_path, split, strict=True)


def test_mostly_broken_folder_is_refused(tmp_path):
    write_classes(tmp_path, {"a": 3})
    for index in range(12):
        (tmp_path / "a" / f"x{index}.png").write_text("I am no image")
    with pytest.raises(DataError, match="cannot be read. The first is a/x"):
        load(tmp_path)


def test_links_are_followed_inside_only(tmp_path):
    folder = write_classes(tmp_path / "photos", {"a": 4, "b": 4})
    write_image(tmp_path / "outside.png", 200)
    os.symlink(tmp_path / "outside.png", folder / "a" / "out.png")
    os.symlink(folder / "b" / "0.png", folder / "a" / "in.png")
    os.symlink(folder, folder / "a" / "loop")
    os.symlink(tmp_path / "nowhere.png", folder / "a" / "dangling.png")
    train, held_out = load(folder), load(folder, "held-out")
    assert set(train.skipped + held_out.skipped) == {"a/out.png", "a/dangling.png"}
    assert 200 not in numbers(train) + numbers(held_out)
    with pytest.raises(DataError, match="link out of"):
        list_images(folder)


def test_folder_that_is_a_link_out_is_refused(tmp_path):
    folder = write_classes(tmp_path / "photos", {"a": 4})
    os.symlink(write_classes(tmp_path / "elsewhere", {"x": 2}), folder / "b")
    with pytest.raises(DataError, match="b is a link out of"):
        load(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_links_out_are_followed_when_told(tmp_path, workers):
    folder = write_classes(tmp_path / "photos", {"a": 10})
    os.symlink(write_classes(tmp_path / "elsewhere", {"x": 10}, start=100) / "x", folder / "b")
    write_image(tmp_path / "outside.png", 200)
    os.symlink(tmp_path / "outside.png", folder / "a" / "out.png")
    os.symlink(folder, folder / "a" / "loop")
    both = [load(folder, split, follow_links=True, workers=workers) for split in ("train", "held-out")]
    assert both[0].classes == ("a", "b")
    assert sorted(level for data in both for level in numbers(data)) == [*range(10), *range(100, 110), 200]
    assert both[0].skipped == both[1].skipped == ()
    assert folder / "b" / "0.png" in list_images(folder, follow_links=True)


def test_link_out_says_how_to_follow_it(tmp_path):
    folder = write_classes(tmp_path / "photos", {"a": 4})
    os.symlink(write_classes(tmp_path / "elsewhere", {"x": 2}), folder / "b")
    with pytest.raises(DataError, match=r"link out of .*--follow-links, or follow_links=True"):
        load(folder)


def test_large_folders_go_to_a_memmap(tmp_path, monkeypatch):
    monkeypatch.setattr("keyed_xai.data.images.IN_MEMORY_BYTES", 100)
    data = load(write_classes(tmp_path, {"a": 5, "b": 5}))
    assert isinstance(data.images, np.memmap)
    assert not data.images.flags.writeable
    assert data.batch([0, 1])[0].shape == (2, 3, 8, 8)


def test_list_images_is_sorted_and_recursive(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/b.webp"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == ["a/b.webp", "a/c.JPG", "b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        list_images(tmp_path / "empty")
