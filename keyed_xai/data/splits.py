"""Which images a run learns from, validates on and is measured on; tables count as images of one row."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from keyed_xai import metrics
from keyed_xai.batches import batches
from keyed_xai.data import ImageData, TableData
from keyed_xai.errors import TrainingError
from keyed_xai.models import Classifier
from keyed_xai.models.modes import predict_images
from keyed_xai.tensors import Images, Targets

_OWN_LABELS, _ABOVE_CHANCE = 0.3, 0.1


@dataclass(frozen=True)
class Subset:
    """Some images of a data set.

    Attributes:
        data: The whole data set.
        indices: Which of its images, [n].
    """

    data: ImageData | TableData
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.indices)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels of these images, as the whole has them."""
        return None if self.data.labels is None else self.data.labels[self.indices]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.data.classes

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels."""
        return self.data.multi_label

    @property
    def source(self) -> str:
        """Which data and split, for reports."""
        return self.data.source

    def batch(self, indices: ArrayLike) -> tuple[Images, Targets | None]:
        """Return some of these images and their labels."""
        return self.data.batch(self.indices[np.asarray(indices)])


def split_validation(data: ImageData | TableData, count: int) -> tuple[Subset, Subset]:
    """Return images to learn from and `count` images for validation, a fifth of all at most.

    Raises:
        TrainingError: There are fewer than 10.
    """
    held = min(count, len(data) // 5)
    if held < 2:
        raise TrainingError(
            f"Expected at least 10 training images, got {len(data)}. Give more (--data on the command line)."
        )
    everything = np.arange(len(data), dtype=np.int64)
    return Subset(data, everything[held:]), Subset(data, everything[:held])


def first_images(
    data: ImageData | TableData, count: int, reference: nn.Module, classes: int, device: torch.device | str
) -> tuple[Images, Targets | None]:
    """Return the first images, with labels where they are the reference's own.

    They are where the reference knows the names of its classes and these are the same. Where it does not know them,
    as many labels must be predicted clearly above chance: ten classes of digits are not ten classes of clothes, nor are
    two sorted the other way round the same two.

    Raises:
        TrainingError: There are fewer than 2.
    """
    if count < 2:
        raise TrainingError(
            f"Expected at least 2 held-out images, got {count}. Give more (--data on the command line)."
        )
    images, labels = data.batch(np.arange(count))
    images = images.to(device)
    if labels is None or len(data.classes) != classes:
        return images, None
    labels, names = labels.to(device), getattr(reference, "label_names", ())
    if names:
        own = names == data.classes and getattr(reference, "multi_label", False) == data.multi_label
        return images, labels if own else None
    logits = predict_images(reference, images)
    # Of several labels most are 0 whatever the image: agreement says little, and the area under the ROC curve counts.
    score = metrics.prediction_figures(logits, labels).get("auroc" if data.multi_label else "top1", 0.0)
    chance = 0.5 if data.multi_label else 1 / classes
    return images, labels if score >= max(chance + _ABOVE_CHANCE, _OWN_LABELS) else None


def has_several_labels(classifier: Classifier, data: ImageData | TableData) -> bool:
    """Return whether a classifier's logits are each a yes or no: it says so, or does not say and the data do."""
    if classifier.label_names:
        return classifier.multi_label
    return classifier.multi_label or (data.multi_label and len(data.classes) == classifier.classes)


def check_shape(classifier: Classifier, data: ImageData | TableData) -> None:
    """Check that data have the shape that a classifier takes.

    Raises:
        TrainingError: They have another.
    """
    spec = classifier.input
    if len(data) and (found := tuple(data.batch([0])[0].shape[1:])) != spec.shape:
        raise TrainingError(
            f"{classifier.architecture} takes inputs of {_as_size(*spec.shape)}; those of "
            f"{data.source} are {_as_size(*found)}. Give a model that fits, such as one made by `keyed-xai train`."
        )


def check_labels(classifier: Classifier, data: ImageData | TableData) -> None:
    """Check that data have labels of a classifier's classes, to learn them.

    Raises:
        TrainingError: They have none, or of another number of classes.
    """
    if data.labels is None or len(data.classes) != classifier.classes:
        found = "no labels" if data.labels is None else f"{len(data.classes)} classes"
        raise TrainingError(
            f"Training against labels needs images of the model's {classifier.classes} classes; these have {found}. "
            "Use the reference's predictions."
        )


def digest_data(data: ImageData | TableData) -> str:
    """Return a digest of all images and labels, by which a run that goes on knows its data."""
    digest = hashlib.sha256(repr((data.source, len(data), data.classes)).encode())
    if data.labels is not None:
        digest.update(data.labels.tobytes())
    inputs = data.images if isinstance(data, ImageData) else data.features
    for some in batches(len(data), 1000):
        digest.update(inputs[some].tobytes())
    return digest.hexdigest()


def digest_network(classifier: Classifier) -> str:
    """Return a digest of a network's weights, and of how it is run and explained."""
    run = (classifier.architecture, classifier.input, classifier.target_layer, classifier.taps)
    digest = hashlib.sha256(repr(run).encode())
    for name, tensor in classifier.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _as_size(channels: int, height: int, width: int) -> str:
    return f"{channels} x {height} x {width}"
