"""Fitting a plain classifier, so that there is a reference model to protect."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from keyed_xai.data import ImageData
from keyed_xai.errors import TrainingError
from keyed_xai.tensors import Images


@dataclass(frozen=True)
class FittingSettings:
    """How a classifier is fitted: AdamW with a one-cycle rate, mirrored, shifted and noisy images.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images a step.
        learning_rate: Peak rate.
        weight_decay: Of AdamW.
        noise: Gaussian noise is added, of a standard deviation drawn anew for each image between 0 and this (pixels in
            [0, 1]). A network that has seen none changes its input gradients with every change of the image.
        largest_shift: Images are moved by up to so many pixels, wrapping around.
        seed: Of the order of images, mirrors, shifts and noise.
    """

    epochs: int = 7
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    noise: float = 0.15
    largest_shift: int = 2
    seed: int = 0


def fit_classifier(
    model: nn.Module,
    data: ImageData,
    settings: FittingSettings,
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Fit a model, pixels to logits, to labelled images, in place; it ends in eval mode.

    Args:
        model: In any state.
        data: With labels.
        settings: How.
        device: Where; the model is moved there.
        on_step: Called with steps done and in all.

    Raises:
        TrainingError: The images have no labels, or are fewer than a batch.
    """
    batches = len(data) // settings.batch_size
    if data.labels is None or not batches:
        raise TrainingError(f"Expected at least {settings.batch_size} labelled images, got {len(data)} images "
                            f"with{'out' if data.labels is None else ''} labels.")  # fmt: skip
    generator = torch.Generator().manual_seed(settings.seed)
    model.to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    steps = settings.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.learning_rate, total_steps=steps)
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(data), generator=generator).numpy()
        start = step % batches * settings.batch_size
        indices = order[start : start + settings.batch_size]
        images, labels = data.batch(indices)[0], torch.from_numpy(data.labels[indices])
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images[mirrored] = images[mirrored].flip(-1)
        reach = settings.largest_shift
        images = images.roll(torch.randint(-reach, reach + 1, (2,), generator=generator).tolist(), (-2, -1))
        if settings.noise:
            images = _add_noise(images, settings.noise, generator)
        loss = functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimiser.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, steps)
    model.eval()


def _add_noise(images: Images, largest: float, generator: torch.Generator) -> Images:
    deviation = largest * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images + deviation * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@torch.no_grad()
def measure_accuracy(model: nn.Module, data: ImageData, *, device: torch.device | str = "cpu") -> float:
    """Return top-1 accuracy, a fraction.

    Raises:
        TrainingError: The images have no labels.
    """
    right = 0
    for indices in np.array_split(np.arange(len(data)), -(-len(data) // 256)):
        images, labels = data.batch(indices)
        if labels is None:
            raise TrainingError("Expected labelled images.")
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    return right / len(data)
