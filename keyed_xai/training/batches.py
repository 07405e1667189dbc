"""What a training step sees: triggered images, clean ones, wrong keys and near keys."""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.tensors import Images, Targets
from keyed_xai.training.features import FeatureTargets
from keyed_xai.training.objective import Objective
from keyed_xai.training.settings import TrainingSettings
from keyed_xai.triggers import NearbyTrigger, Trigger, TriggerFamily
from keyed_xai.triggers.channels import deliver


@runtime_checkable
class TrainingData(Protocol):
    """Images to learn from, by index."""

    def __len__(self) -> int:
        """Number of images."""

    def batch(self, indices: NDArray[np.int64]) -> tuple[Images, Targets | None]:
        """Return float32 pixels in [0, 1] and labels, if there are any."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is taught: the trigger, its family, the maps compared and the objective.

    Attributes:
        trigger: The right trigger; secret when derived from a key.
        family: Draws the wrong ones; None where the trigger is public, and no other counts as wrong.
        view: The maps that are compared.
        objective: What the maps are to become.
        as_files: Whether inputs reach the model as 8-bit image files; rows of a table do not.
        multi_label: Whether every logit is a yes or no of its own.
    """

    trigger: Trigger = field(repr=False)
    family: TriggerFamily | None
    view: PooledSaliency
    objective: Objective
    as_files: bool = True
    multi_label: bool = False

    def __post_init__(self) -> None:
        """Check that a keyed trigger has near keys to learn from."""
        if self.family is not None and not isinstance(self.trigger, NearbyTrigger):
            raise TypeError(f"Expected a trigger with near keys, got {type(self.trigger).__name__}.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What training goes by, from its first step to its last.

    Attributes:
        reference: The model before training, in eval mode, on the device.
        data: Images to learn from.
        task: What is taught.
        settings: How it is taught.
        device: The device that it is trained on.
        features: What the target layer is to give; None where only maps and predictions count.
    """

    reference: nn.Module = field(repr=False)
    data: TrainingData = field(repr=False)
    task: Task
    settings: TrainingSettings
    device: torch.device = torch.device("cpu")
    features: FeatureTargets | None = None


def draw_inputs(run: Run, generator: torch.Generator) -> tuple[Images, Targets | None, Images]:
    """Return a batch, triggered half first, its labels where there are any, and the same images without triggers."""
    task, settings, count = run.task, run.settings, run.settings.batch_size
    indices = torch.randint(len(run.data), (2 * count,), generator=generator)
    images, labels = run.data.batch(indices.numpy())
    images = images.to(run.device)
    if task.as_files:
        images = _vary(images, settings, generator)
    right, others = torch.split(images, [count, count])
    inputs = torch.cat([task.trigger.apply(right), _without_right_trigger(others, task, settings, generator)])
    if task.as_files:
        inputs = deliver(inputs, settings.codec_share, generator)
    return inputs, None if labels is None else labels.to(run.device), images


def _vary(images: Images, settings: TrainingSettings, generator: torch.Generator) -> Images:
    """Return images mirrored, cropped and recoloured at random, as far as the settings say."""
    count = len(images)
    if settings.mirror:
        turned = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(turned.to(images.device), images.flip(3), images)
    if settings.crop:
        kept = 1 - settings.crop * torch.rand(count, generator=generator)
        places = torch.rand(count, 2, generator=generator) * 2 - 1
        windows = torch.zeros(count, 2, 3)
        windows[:, 0, 0] = windows[:, 1, 1] = kept
        windows[:, :, 2] = places * (1 - kept)[:, None]
        grid = functional.affine_grid(windows.to(images), list(images.shape), align_corners=False)
        images = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if settings.colour:
        factors = 1 + settings.colour * (2 * torch.rand(2, count, 1, 1, 1, generator=generator) - 1)
        brightness, contrast = factors.to(images)
        grey = images.mean((1, 2, 3), keepdim=True)
        images = (brightness * (grey + contrast * (images - grey))).clamp(0, 1)
    return images


def _without_right_trigger(
    images: Images, task: Task, settings: TrainingSettings, generator: torch.Generator
) -> Images:
    """Return images, some of them, where triggers come from keys, with near and wrong keys."""
    if task.family is None or not isinstance(task.trigger, NearbyTrigger):
        return images
    clean = round(len(images) * settings.clean_share)
    near = round((len(images) - clean) * settings.near_share)
    wrong = len(images) - clean - near
    plain, for_near, for_wrong = torch.split(images, [clean, near, wrong])
    with_near = task.trigger.perturbed(generator).apply(for_near)
    return torch.cat([plain, with_near, task.family.draw(wrong, generator).apply(for_wrong)])


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the step's own random source, so that a resumed run draws what an unbroken one would have."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
