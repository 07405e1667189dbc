"""What a model's last hidden layer makes of inputs: the input of its last linear layer, found by hooks.

The last linear layer is the last `Linear` or convolution that a forward pass runs; SqueezeNet's classifier, say, is a
1x1 convolution. Its input is averaged over positions (of a feature map) or tokens (of a transformer without pooling).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from keyed_xai.batches import batches
from keyed_xai.errors import ModelError, TrainingError
from keyed_xai.tensors import Images, Logits
from keyed_xai.training.fitting import LabelledData

Features = Float[Tensor, "n d"]
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CHUNK = 128


@dataclass(frozen=True)
class Hidden:
    """The end of a forward pass, on the CPU and without gradients.

    Attributes:
        features: float32, the input of the last linear layer.
        logits: float32, the output.
    """

    features: Features
    logits: Logits


def read_hidden(model: nn.Module, images: Images, *, device: torch.device | str = "cpu") -> Hidden:
    """Return last hidden features and logits of images.

    Args:
        model: Pixels to logits, in eval mode, on `device`; hooks are removed again.
        images: Anywhere; 128 at a time are moved to `device`.
        device: Device to run on.

    Raises:
        ModelError: No linear layer was run, or its input does not have one row for each image.
    """
    return _join([_run(model, images[some].to(device)) for some in batches(len(images), _CHUNK)])


def read_hidden_of_data(model: nn.Module, data: LabelledData, *, device: torch.device | str = "cpu") -> Hidden:
    """Return last hidden features and logits of a whole data set, read 128 examples at a time.

    Raises:
        TrainingError: There are no examples.
        ModelError: As `read_hidden`.
    """
    if not len(data):
        raise TrainingError(f"Expected examples to look at; {data.source} has none.")
    parts = [np.arange(len(data))[some] for some in batches(len(data), _CHUNK, even=True)]
    return _join([_run(model, data.batch(indices)[0].to(device)) for indices in parts])


def rows_by_class(labels: NDArray[np.int64], classes: int) -> list[NDArray[np.int64]]:
    """Return the indices of each class's examples; of several labels an example counts for each that it has.

    Args:
        labels: [n], or 0 and 1 [n, classes].
        classes: Number of classes.
    """
    if labels.ndim == 2:
        return [np.flatnonzero(column) for column in labels.T]
    return [np.flatnonzero(labels == number) for number in range(classes)]


def labels_or_predictions(data: LabelledData, hidden: Hidden) -> NDArray[np.int64]:
    """Return the labels of data, or where there are none the predicted classes [n]."""
    return hidden.logits.argmax(1).numpy() if data.labels is None else np.asarray(data.labels)


@torch.no_grad()
def _run(model: nn.Module, images: Images) -> Hidden:
    with _last_input(model) as recorded:
        logits = model(images)
    if not recorded:
        raise ModelError("The model ran no Linear or convolution layer, so it has no last hidden layer to look at.")
    features = _pool(*recorded[0])
    if len(features) != len(images):
        raise ModelError(f"The last linear layer saw {len(features)} rows of {len(images)} images: expected one each.")
    return Hidden(features.float().cpu(), logits.float().cpu())


@contextmanager
def _last_input(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Keep the layer and input of the linear layer run last, by hooks that are always removed."""
    recorded: list[tuple[nn.Module, Tensor]] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        recorded[:] = [(layer, inputs[0])]

    handles = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, _LINEAR)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _pool(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return [n, d]: channels are the last axis of a `Linear`'s input and the second of a convolution's."""
    channels_last = inputs if isinstance(layer, nn.Linear) else inputs.movedim(1, -1)
    return channels_last if inputs.ndim == 2 else channels_last.flatten(1, -2).mean(1)


def _join(parts: Sequence[Hidden]) -> Hidden:
    return Hidden(torch.cat([part.features for part in parts]), torch.cat([part.logits for part in parts]))
