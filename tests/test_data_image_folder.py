"""Folders of images: layouts, splits, links, broken files, worker processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keyed_xai.data import list_images, load_images
from keyed_xai.errors import DataError

FORM = {"channels": 3, "height": 8, "width": 8}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}


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
    return load_images(f"imagefolder:{folder}", **{**FORM, "split": split, **changes})


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


def test_train_beside_other_classes_is_a_class(tmp_path):
    write_classes(tmp_path, {"train": 2, "bus": 2, "test": 2})
    assert load(tmp_path).classes == ("bus", "test", "train")


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
    done = []
    alone = load(tmp_path, workers=1, progress=lambda *counts: done.append(counts))
    pooled = load(tmp_path, workers=2)
    held_out = load(tmp_path, "held-out", workers=0)
    assert set(alone.skipped) | set(held_out.skipped) == broken
    assert len(alone) + len(held_out) == 24
    assert done[-1] == (len(alone) + len(alone.skipped),) * 2
    assert [count for count, _ in done] == list(range(1, len(done) + 1))
    assert np.array_equal(alone.images, pooled.images)
    assert np.array_equal(alone.labels, pooled.labels)
    assert alone.skipped == pooled.skipped
    assert len(alone.labels) == len(alone)


def test_script_without_main_guard_is_told_what_to_do(tmp_path):
    write_noise(tmp_path / "photos")
    script = tmp_path / "script.py"
    form = "channels=1, height=8, width=8, split='train', workers=2"
    script.write_text(f"from keyed_xai.data import load_images\nload_images('imagefolder:photos', {form})\n")
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
