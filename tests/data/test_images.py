"""Image data: requests, batches, orders and held-out names."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keyed_xai.data import ImageData, ImageSize
from keyed_xai.data import images as images_module
from keyed_xai.data.images import Request, allocate_pixels, choose_held_out, order_balanced
from keyed_xai.errors import DataError


def request_of(**changes):
    size = {name: changes.pop(name) for name in ("channels", "height", "width") if name in changes}
    return Request(size=ImageSize(**{"channels": 1, "height": 8, "width": 8, **size}), **{"split": "train", **changes})


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"channels": 4}, DataError),
        ({"height": 0}, DataError),
        ({"width": 5000}, DataError),
        ({"limit": 0}, ValueError),
        ({"workers": -1}, ValueError),
    ],
)
def test_request_refuses_values_outside_their_range(changes, error):
    with pytest.raises(error, match="Expected|channels"):
        request_of(**changes)


def test_batch_gives_floats_in_the_unit_interval_and_labels():
    pixels = np.arange(4 * 3 * 2 * 2, dtype=np.uint8).reshape(4, 3, 2, 2)
    pixels[3] = 255
    data = ImageData(images=pixels, labels=np.array([0, 1, 0, 1]), classes=("a", "b"), source="test")
    batch, labels = data.batch([3, 1])
    assert batch.shape == (2, 3, 2, 2)
    assert batch.dtype == torch.float32
    assert batch[0].eq(1).all()
    assert torch.equal(batch[1], torch.from_numpy(pixels[1]).float() / 255)
    assert labels is not None
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 1]
    assert len(data) == 4


def test_batch_is_a_copy_and_labels_may_be_missing():
    data = ImageData(images=np.zeros((2, 1, 2, 2), np.uint8), labels=None, classes=(), source="test")
    batch, labels = data.batch(np.array([0]))
    batch += 1
    assert labels is None
    assert data.images.max() == 0


def test_multi_label_data_gives_one_row_of_labels_per_image():
    labels = np.array([[0, 1, 1], [0, 0, 0]])
    data = ImageData(images=np.zeros((2, 1, 2, 2), np.uint8), labels=labels, classes=("a", "b", "c"), source="test")
    assert data.multi_label
    assert data.batch([1, 0])[1].tolist() == [[0, 0, 0], [0, 1, 1]]
    assert not ImageData(images=data.images, labels=labels[:, 1], classes=data.classes, source="test").multi_label
    assert not ImageData(images=data.images, labels=None, classes=(), source="test").multi_label


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 1, 0])}, r"labels of shape \(2,\) or \(2, 2\), got \(3,\)"),
        ({"labels": np.array([[0, 1, 0], [0, 0, 1]])}, r"got \(2, 3\)"),
        ({"labels": np.zeros((2, 2, 1), np.int64)}, r"got \(2, 2, 1\)"),
        ({"labels": np.array([[0, 2], [0, 1]])}, "0 and 1 only"),
        ({"boxes": np.zeros((3, 4), np.float32)}, r"boxes of shape \(2, 4\), got \(3, 4\)"),
        ({"boxes": np.zeros((2, 2), np.float32)}, r"got \(2, 2\)"),
        ({"box_labels": np.zeros(3, np.int64)}, r"box_labels of shape \(2,\), got \(3,\)"),
        ({"box_labels": np.zeros((2, 1), np.int64)}, r"got \(2, 1\)"),
    ],
)
def test_labels_and_boxes_that_do_not_fit_are_refused(changes, message):
    arguments = {"labels": np.array([0, 1]), "classes": ("a", "b"), "source": "test", **changes}
    with pytest.raises(ValueError, match=message):
        ImageData(images=np.zeros((2, 1, 2, 2), np.uint8), **arguments)


def test_large_data_goes_to_a_read_only_memmap_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(images_module.tempfile, "tempdir", str(tmp_path))
    pixels = allocate_pixels(10, request_of())
    assert isinstance(pixels, np.memmap)
    pixels[:] = 7
    data = ImageData(images=pixels[:5], labels=None, classes=(), source="test")
    assert (data.batch([0, 4])[0] * 255).round().eq(7).all()
    with pytest.raises(ValueError, match="read-only"):
        data.images[0] = 1
    del pixels, data
    gc.collect()
    assert not list(tmp_path.iterdir())


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=40), limit=st.integers(1, 50), seed=st.integers(0, 9))
def test_order_is_a_balanced_prefix_of_a_permutation(labels, limit, seed):
    names = [f"{index}.png" for index in range(len(labels))]
    whole = order_balanced(names, labels, request_of(seed=seed))
    part = order_balanced(names, labels, request_of(seed=seed, limit=limit))
    assert sorted(whole) == list(range(len(labels)))
    assert part == whole[:limit]
    taken = {label: sum(labels[index] == label for index in part) for label in set(labels)}
    most = max(taken.values())
    assert all(count >= most - 1 or count == labels.count(label) for label, count in taken.items())


def test_order_of_multi_label_images_is_balanced_by_their_first_label():
    labels = np.array([[1, 0]] * 10 + [[1, 1]] * 3 + [[0, 1]] * 4 + [[0, 0]] * 5)
    names = [f"{index}.png" for index in range(len(labels))]
    order = order_balanced(names, labels, request_of())
    assert sorted(order) == list(range(22))
    firsts = [{(1, 0): "a", (1, 1): "a", (0, 1): "b", (0, 0): "none"}[tuple(labels[index])] for index in order]
    assert all({*firsts[turn : turn + 3]} == {"a", "b", "none"} for turn in (0, 3, 6, 9))
    assert order_balanced(names, labels, request_of(limit=5)) == order[:5]


@given(count=st.integers(0, 60), seed=st.integers(-3, 3))
def test_held_out_names_are_a_fifth_and_do_not_depend_on_the_order(count, seed):
    names = [f"{index}.png" for index in range(count)]
    held_out = choose_held_out(names, seed)
    assert held_out == choose_held_out(names[::-1], seed)
    assert len(held_out) == (max(1, round(count / 5)) if count > 1 else 0)
