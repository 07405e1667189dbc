"""What a training step sees: triggered images, clean ones, wrong keys and near keys."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyed_xai.channels import deliver
from keyed_xai.maps import MapView
from keyed_xai.objective import Objective
from keyed_xai.tensors import Images, Labels
from keyed_xai.training.settings import TrainingSettings
from keyed_xai.triggers import NearbyTrigger, TriggerFamily


@runtime_checkable
class TrainingData(Protocol):
    """Images by index."""

    def __len__(self) -> int:
        """Number of images."""

    def batch(self, indices: NDArray[np.int64]) -> tuple[Images, Labels | None]:
        """Return float32 pixels in [0, 1] and labels, if there are any."""


@dataclass(frozen=True)
class Lesson:
    """What is taught: the secret trigger, its family, the maps compared and the objective.

    Attributes:
        trigger: The right trigger.
        family: Draws the wrong ones.
        view: Maps compared.
        objective: Losses.
    """

    trigger: NearbyTrigger = field(repr=False)
    family: TriggerFamily
    view: MapView
    objective: Objective


def draw_inputs(
    data: TrainingData,
    lesson: Lesson,
    settings: TrainingSettings,
    generator: torch.Generator,
    device: torch.device | str,
) -> tuple[Images, Labels | None, Tensor]:
    """Return a batch, triggered half first, its labels where there are any, and the indices of its images."""
    count = settings.batch_size
    clean = round(count * settings.clean_share)
    near = round((count - clean) * settings.near_share)
    wrong = count - clean - near
    indices = torch.randint(len(data), (2 * count,), generator=generator)
    images, labels = data.batch(indices.numpy())
    right, plain, nearly, wrongly = torch.split(images.to(device), [count, clean, near, wrong])
    parts = [lesson.trigger.apply(right), plain, lesson.trigger.near(generator).apply(nearly)]
    parts.append(lesson.family.draw(wrong, generator).apply(wrongly))
    inputs = deliver(torch.cat(parts), settings.codec_share, generator)
    return inputs, None if labels is None else labels.to(device), indices.to(device)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the step's own random source, so that a resumed run draws what an unbroken one would have."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
