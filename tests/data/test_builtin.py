"""The images that come with the package."""

from pathlib import Path

import numpy as np

from keyed_xai.data import ImageSize, builtin, load_images
from keyed_xai.data.fashion_mnist import CLASSES

SIZE = ImageSize(1, 28, 28)


def test_committed_subset_is_small_balanced_and_labelled():
    path = Path(builtin.__file__).parent / builtin.SUBSET
    assert path.stat().st_size <= 5 * 2**20
    assert (path.parent / "LICENSE.fashion_mnist_subset.txt").is_file()
    for split, count in (("train", 10_000), ("held-out", 1000)):
        data = load_images("builtin", ImageSize(1, 32, 32), split=split)
        assert data.images.shape == (count, 1, 32, 32)
        assert data.images.dtype == np.uint8
        assert np.bincount(data.labels).tolist() == [count // 10] * 10
        assert data.classes == CLASSES
        assert len(np.unique(data.images.reshape(count, -1), axis=0)) >= count - 5


def test_splits_of_the_committed_subset_share_no_image():
    train, held_out = (load_images("builtin", SIZE, split=split) for split in ("train", "held-out"))
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in held_out.images}
