"""The built-in transfer set: what a model is protected with when its owner gives no images.

Grey images of at most 64 pixels come from 10,000 + 1,000 images of Fashion-MNIST that lie beside this file
(`examples/make_builtin_data.py` made it). RGB and larger ones are crops of photographs (`photographs.py`).
"""

from importlib import resources

import numpy as np

from keyed_xai.data.fashion_mnist import select_images
from keyed_xai.data.images import ImageData, Request
from keyed_xai.data.photographs import load_photographs
from keyed_xai.errors import DataError

SUBSET = "fashion_mnist_subset.npz"
_LARGEST_SUBSET_SIDE = 64


def load_builtin(argument: str, request: Request) -> ImageData:
    """Return built-in images: labelled Fashion-MNIST for small grey models, else unlabelled crops of photographs.

    Args:
        argument: Must be empty.
        request: What to load. Crops are made to any number: 2,000 (train) or 400 without a limit.

    Raises:
        DataError: There is an argument, or no package with photographs is installed.
    """
    if argument:
        raise DataError(f"The data set builtin takes nothing after the name, got {argument!r}.")
    if request.size.channels == 1 and max(request.size.height, request.size.width) <= _LARGEST_SUBSET_SIDE:
        return _load_subset(request)
    return load_photographs(request)


def _load_subset(request: Request) -> ImageData:
    prefix = request.split.replace("-", "_")
    with resources.files(__package__).joinpath(SUBSET).open("rb") as file, np.load(file) as arrays:
        images, labels = arrays[f"{prefix}_images"], arrays[f"{prefix}_labels"].astype(np.int64)
    return select_images(images, labels, request, source=f"builtin: Fashion-MNIST subset ({request.split})")
