"""Images as Python callers hold them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from keyed_xai.data import ImageData, ImageSize
from keyed_xai.data.given import take_images
from keyed_xai.errors import DataError

SIZE = ImageSize(1, 9, 8)


def pixels(count=10, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 9, 8), dtype=np.uint8)


def take(images, held_out=None):
    return take_images(images, held_out, SIZE)


@pytest.mark.parametrize(
    "form",
    [
        lambda raw: list(torch.from_numpy(raw)),
        torch.from_numpy,
        lambda raw: [image.float() / 255 for image in torch.from_numpy(raw)],
        lambda raw: TensorDataset(torch.from_numpy(raw), torch.arange(len(raw))),
        lambda raw: [(image, 3) for image in torch.from_numpy(raw).double() / 255],
    ],
    ids=["list", "tensor", "floats", "dataset", "pairs"],
)
def test_tensors_become_the_same_images_a_fifth_of_them_held_out(form):
    raw = pixels()
    train, held_out = take(form(raw))
    assert np.array_equal(np.concatenate([train.images, held_out.images]), raw)
    assert (len(train), len(held_out)) == (8, 2)
    assert train.labels is None


def test_data_set_is_parted_with_its_labels_and_boxes():
    boxes = np.zeros((10, 4), np.float32)
    boxes[:, 2:] = np.linspace(0.1, 1, 10)[:, None]
    data = ImageData(images=pixels(), labels=np.arange(10) % 2, classes=("a", "b"), source="own", boxes=boxes)
    train, held_out = take(data)
    assert np.array_equal(held_out.labels, data.labels[8:])
    assert np.array_equal(held_out.boxes, boxes[8:])
    assert (train.source, held_out.source) == ("own, train", "own, held-out")
    assert len(data) == 10


def test_held_out_images_that_are_given_are_used_as_they_are():
    data, other = (ImageData(images=pixels(seed=seed), labels=None, classes=(), source="own") for seed in (0, 1))
    assert take(data, other) == (data, other)


def test_folder_is_read_in_both_splits(tmp_path):
    for number, image in enumerate(pixels(30)):
        Image.fromarray(image[0]).save(tmp_path / f"{number}.png")
    for given in (tmp_path, str(tmp_path), f"imagefolder:{tmp_path}"):
        train, held_out = take(given)
        assert (len(train), len(held_out)) == (24, 6)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "got none"),
        ([torch.zeros(3, 9, 8)], r"image 0 is \(3, 9, 8\)"),
        ([torch.full((1, 9, 8), 2.0)], "numbers in .0, 1. before any normalisation"),
        ([torch.full((1, 9, 8), float("nan"))], "before any normalisation"),
        ([torch.zeros(1, 9, 8, dtype=torch.int64)], "torch.int64"),
        ([np.zeros((1, 9, 8))], "a tensor as image 0, got ndarray"),
        ("nowhere", "Expected a data set"),
    ],
)
def test_what_is_no_image_is_refused(images, words):
    with pytest.raises(DataError, match=words):
        take(images)
