"""The built-in RGB images: random crops of the photographs that other packages bring."""

import numpy as np
import pytest

from keyed_xai.data import ImageSize, load_images, photographs
from keyed_xai.data.photographs import PHOTOGRAPHS, find_photographs
from keyed_xai.errors import DataError
from tests.heard import Heard

SIZE = ImageSize(3, 48, 40)


def load(split="train", size=SIZE, **changes):
    return load_images("builtin", size, split=split, **{"limit": 12, **changes})


def test_splits_have_different_photographs_and_all_are_installed():
    files = {split: {path.name for path, _ in find_photographs(split)} for split in PHOTOGRAPHS}
    assert not files["train"] & files["held-out"]
    assert {split: len(names) for split, names in files.items()} == {"train": 10, "held-out": 5}


def test_crops_are_unlabelled_and_of_the_size_asked_for():
    data = load()
    assert data.images.shape == (12, 3, 48, 40)
    assert data.images.dtype == np.uint8
    assert data.labels is None
    assert data.classes == ()
    assert data.source == "builtin: crops of 10 photographs (train)"


def test_crop_depends_on_seed_split_and_index_only():
    assert np.array_equal(load().images, load(limit=14).images[:12])
    assert not np.array_equal(load().images, load(seed=1).images)
    assert not np.array_equal(load().images, load("held-out").images)


def test_crops_differ_and_are_lively():
    images = load(limit=60).images
    assert len({image.tobytes() for image in images}) == 60
    assert np.mean(images.std(axis=(1, 2, 3)) > 8) > 0.9
    assert 40 < images.mean() < 200


def test_default_counts_are_used_without_a_limit(monkeypatch):
    monkeypatch.setattr(photographs, "DEFAULT_COUNTS", {"train": 5, "held-out": 3})
    assert len(load(limit=None)) == 5
    assert len(load("held-out", limit=None)) == 3


def test_large_grey_images_are_grey_crops_and_small_ones_are_not():
    assert load(size=ImageSize(1, 80, 40)).images.shape == (12, 1, 80, 40)
    assert load(size=ImageSize(1, 80, 40)).labels is None
    assert load(size=ImageSize(1, 64, 40)).labels is not None


def test_progress_is_reported():
    heard = Heard()
    load(progress=heard)
    assert heard.steps == [("reading train images", count, 12) for count in range(1, 13)]


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(photographs, "find_spec", {}.get)
    with pytest.raises(DataError, match="install scikit-image"):
        load()


def test_builtin_takes_no_argument():
    with pytest.raises(DataError, match="takes nothing"):
        load_images("builtin:x", SIZE, split="train")
