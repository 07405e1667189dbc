"""Fashion-MNIST: the files, their defects, and the built-in subset with the script that makes it."""

import gzip
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keyed_xai.data import ImageSize, builtin, load_images
from keyed_xai.data.fashion_mnist import CLASSES
from keyed_xai.errors import DataError

SIZE = ImageSize(1, 28, 28)

SCRIPT = Path(__file__).parents[2] / "examples" / "make_builtin_data.py"


def write_files(folder, *, counts=(50, 20), suffix=".gz"):
    """Write the four files with random images; image i has label i % 10 and its number in its first two pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for stem, count in zip(("train", "t10k"), counts, strict=True):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(count), 256)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write(folder / f"{stem}-images-idx3-ubyte{suffix}", struct.pack(">4I", 0x803, count, 28, 28), images)
        write(folder / f"{stem}-labels-idx1-ubyte{suffix}", struct.pack(">2I", 0x801, count), labels)
    return folder


def write(path, header, array):
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


@pytest.mark.parametrize(("place", "suffix"), [("", ".gz"), ("", ""), ("FashionMNIST/raw", ".gz"), ("raw", "")])
def test_files_are_read_plain_or_gzipped_and_in_the_layout_of_torchvision(tmp_path, place, suffix):
    write_files(tmp_path / place, suffix=suffix)
    train = load_images(f"fashion-mnist:{tmp_path}", SIZE, split="train")
    held_out = load_images(f"fashion-mnist:{tmp_path}", SIZE, split="held-out")
    assert train.images.shape == (50, 1, 28, 28)
    assert held_out.images.shape == (20, 1, 28, 28)
    assert train.classes == CLASSES
    assert train.labels is not None
    assert (train.images[:, 0, 0, 1] % 10 == train.labels).all()
    assert str(tmp_path) not in train.source


def test_usual_places_are_searched_without_a_folder(tmp_path, monkeypatch):
    write_files(tmp_path / "data" / "fashion-mnist", counts=(10, 10))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("keyed_xai.data.fashion_mnist._USUAL_PLACES", ("nowhere", "data/fashion-mnist"))
    assert len(load_images("fashion-mnist", SIZE, split="train")) == 10


@pytest.mark.parametrize("argument", ["", ":nowhere"])
def test_missing_files_are_named_with_where_to_get_them(tmp_path, monkeypatch, argument):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("keyed_xai.data.fashion_mnist._USUAL_PLACES", ("data/fashion-mnist",))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte\.gz.*dataset-fashion-mnist"):
        load_images(f"fashion-mnist{argument}", SIZE, split="train")


def test_one_missing_file_is_named(tmp_path):
    write_files(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    assert len(load_images(f"fashion-mnist:{tmp_path}", SIZE, split="train")) == 50
    with pytest.raises(DataError, match=r"^t10k-labels-idx1-ubyte\.gz is missing"):
        load_images(f"fashion-mnist:{tmp_path}", SIZE, split="held-out")


HEADER = struct.pack(">4I", 0x803, 50, 28, 28)
DEFECTS = {
    "no header": (b"\0\0\0", "cut short"),
    "empty": (b"", "cut short"),
    "magic": (struct.pack(">4I", 0x802, 50, 28, 28) + bytes(50 * 784), "no IDX file"),
    "sides": (struct.pack(">4I", 0x803, 50, 32, 28) + bytes(50 * 896), "no IDX file"),
    "too many": (struct.pack(">4I", 0x803, 2**31, 28, 28), "no IDX file"),
    "none": (struct.pack(">4I", 0x803, 0, 28, 28), "no IDX file"),
    "truncated": (HEADER + bytes(49 * 784), "cut short or too long"),
    "too long": (HEADER + bytes(51 * 784), "cut short or too long"),
    "fewer images than labels": (struct.pack(">4I", 0x803, 49, 28, 28) + bytes(49 * 784), "49 images, but 50 labels"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_damaged_images_file_is_refused(tmp_path, defect):
    data, message = DEFECTS[defect]
    write_files(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(data))
    with pytest.raises(DataError, match=message):
        load_images(f"fashion-mnist:{tmp_path}", SIZE, split="train")


@pytest.mark.parametrize(("kept", "tail"), [(-20, b""), (0, b"text"), (40, b"\xff" * 90)])
def test_damaged_gzip_is_refused(tmp_path, kept, tail):
    write_files(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:kept] + tail)
    with pytest.raises(DataError, match="cannot be read|cut short"):
        load_images(f"fashion-mnist:{tmp_path}", SIZE, split="train")


def test_label_out_of_range_is_refused(tmp_path):
    write_files(tmp_path)
    write(tmp_path / "train-labels-idx1-ubyte.gz", struct.pack(">2I", 0x801, 50), np.full(50, 10, np.uint8))
    with pytest.raises(DataError, match="a label is 10"):
        load_images(f"fashion-mnist:{tmp_path}", SIZE, split="train")


def test_limit_is_balanced_and_a_prefix_and_the_seed_changes_it(tmp_path):
    spec = f"fashion-mnist:{write_files(tmp_path)}"
    whole = load_images(spec, SIZE, split="train")
    part = load_images(spec, SIZE, split="train", limit=20)
    other = load_images(spec, SIZE, split="train", limit=20, seed=1)
    assert np.bincount(part.labels).tolist() == [2] * 10
    assert np.array_equal(part.images, whole.images[:20])
    assert not np.array_equal(part.images, other.images)


def test_held_out_classes_are_disjoint_and_together_all(tmp_path):
    spec = f"fashion-mnist:{write_files(tmp_path)}"
    train = load_images(spec, SIZE, split="train", holdout="classes")
    held_out = load_images(spec, SIZE, split="held-out", holdout="classes")
    assert len(set(held_out.labels)) == 2
    assert set(train.labels) | set(held_out.labels) == set(range(10))
    assert not set(train.labels) & set(held_out.labels)


def test_32_pixels_are_padded_and_other_sizes_scaled(tmp_path):
    spec = f"fashion-mnist:{write_files(tmp_path)}"
    whole = load_images(spec, SIZE, split="train").images
    padded = load_images(spec, ImageSize(3, 32, 32), split="train").images
    scaled = load_images(spec, ImageSize(1, 14, 40), split="train").images
    assert np.array_equal(padded[:, :, 2:30, 2:30], np.repeat(whole, 3, axis=1))
    assert padded.sum(dtype=int) == 3 * whole.sum(dtype=int)
    assert scaled.shape == (50, 1, 14, 40)
    expected = Image.fromarray(whole[7, 0]).resize((40, 14), Image.Resampling.BILINEAR)
    assert np.array_equal(scaled[7, 0], np.asarray(expected))


def test_script_makes_a_subset_of_the_same_form_twice_the_same(tmp_path):
    folder = write_files(tmp_path / "files", counts=(11_000, 1200))
    script = runpy.run_path(str(SCRIPT))
    outputs = [tmp_path / "first.npz", tmp_path / "second.npz"]
    for output in outputs:
        script["main"]([str(folder), str(output)])
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    committed = Path(builtin.__file__).parent / builtin.SUBSET
    with np.load(outputs[0]) as made, np.load(committed) as shipped:
        assert {name: made[name].shape for name in made} == {name: shipped[name].shape for name in shipped}
        numbers = made["train_images"][:, 0, 0].astype(int) * 256 + made["train_images"][:, 0, 1]
        assert np.array_equal(numbers, made["train_indices"])
        assert np.array_equal(numbers % 10, made["train_labels"])
