"""Fitting a plain classifier, so that there is a reference model to protect or attack.

`data` is anything with labels that `LabelledData` describes: images of one label or several, or rows of a table, which
are images of 1 x 1 x d to the model. Rows are never mirrored, shifted or made noisy.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from keyed_xai.batches import batches
from keyed_xai.errors import TrainingError
from keyed_xai.metrics import per_class_auroc, prediction_figures
from keyed_xai.models.layout import SafeConvolutions, set_layout
from keyed_xai.models.modes import evaluating
from keyed_xai.progress import QUIET, Progress
from keyed_xai.tensors import Images, Logits, Targets

OPTIMISERS = ("adamw", "adam", "sgd")
SCHEDULES = ("one-cycle", "step", "constant")
_MOMENTUM = 0.9
_ADVICE = "Start again with a lower --learning-rate, or with --optimiser adam."
_SURE = 0.99


@runtime_checkable
class LabelledData(Protocol):
    """Images or table rows by index, with labels."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels [n], or for several labels at once 0 or 1 for each [n, k]."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""

    @property
    def multi_label(self) -> bool:
        """Whether an example may have several labels."""

    @property
    def source(self) -> str:
        """Which data and split, for reports."""

    def __len__(self) -> int:
        """Number of examples."""

    def batch(self, indices: ArrayLike) -> tuple[Tensor, Tensor | None]:
        """Return float32 images [n, c, h, w], or rows [n, 1, 1, d], and labels."""


@dataclass(frozen=True, kw_only=True)
class FittingSettings:
    """How a classifier is fitted; by default AdamW with a one-cycle rate, mirrored, shifted and noisy images.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images a step.
        learning_rate: Peak of the learning rate.
        weight_decay: L2 penalty of "adam" and "sgd", decoupled in "adamw".
        optimiser: "adamw", "adam" or "sgd" with momentum .9.
        schedule: "one-cycle" rises to the peak rate and falls to nearly zero, "step" falls by `decay_factor` every
            `decay_every` epochs, "constant" stays.
        decay_every: Epochs; None takes a third of them all, rounded up.
        decay_factor: What "step" multiplies the rate by.
        mirror: Half of the images are turned left to right.
        noise: Gaussian noise is added, of a standard deviation drawn anew for each image between 0 and this (pixels in
            [0, 1]). A network that has seen none changes its input gradients with every change of the image.
        largest_shift: Images are moved by up to so many pixels, wrapping around.
        mixed_precision: bfloat16 forward passes on a GPU.
        seed: Seed of the order of images, mirrors, shifts, noise and dropout.
    """

    epochs: int = 7
    batch_size: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 1e-2
    optimiser: str = "adamw"
    schedule: str = "one-cycle"
    decay_every: int | None = None
    decay_factor: float = 0.1
    mirror: bool = True
    noise: float = 0.15
    largest_shift: int = 2
    mixed_precision: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for name in ("epochs", "batch_size", "learning_rate", "decay_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("weight_decay", "noise", "largest_shift"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.decay_every is not None and self.decay_every < 1:
            raise ValueError(f"decay_every: expected 1 epoch or more, got {self.decay_every}")
        for name, known in (("optimiser", OPTIMISERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}; got {getattr(self, name)!r}")


@dataclass(kw_only=True)
class _State:
    """Everything that a resumed run needs."""

    model: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    history: list[dict[str, float | int]]

    def to_checkpoint(self) -> dict[str, Any]:
        """Return a copy that further fitting leaves alone."""
        live = {name: getattr(self, name).state_dict() for name in ("model", "optimiser", "schedule")}
        return copy.deepcopy(live | {"generator": self.generator.get_state(), "history": self.history})

    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        checkpoint = copy.deepcopy(dict(checkpoint))
        try:
            for name in ("model", "optimiser", "schedule"):
                getattr(self, name).load_state_dict(checkpoint[name])
            self.generator.set_state(checkpoint["generator"])
            self.history = list(checkpoint["history"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(
                "The checkpoint does not fit this model and these settings. Start again without --resume."
            ) from error


def fit_classifier(
    model: nn.Module,
    data: LabelledData,
    settings: FittingSettings,
    *,
    validation: LabelledData | None = None,
    device: torch.device | str = "cpu",
    checkpoint: Mapping[str, Any] | None = None,
    save_checkpoint: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress = QUIET,
) -> list[dict[str, float | int]]:
    """Fit a model, pixels to logits, to labelled data, in place; it ends in eval mode.

    The loss is cross-entropy, or for several labels at once binary cross-entropy, the mean over classes. A run that
    goes on from a checkpoint ends in the same weights as one that was never stopped, bit for bit on the CPU.

    Args:
        model: The network, in any state.
        data: Labelled examples.
        settings: How to fit it.
        validation: Measured after every epoch; nothing is chosen by it.
        device: Where; the model is moved there.
        checkpoint: What `save_checkpoint` was given by an earlier run.
        save_checkpoint: Called after every epoch.
        progress: Hears of "fitting" after each step.

    Returns:
        One record for every epoch: epoch, mean loss, and with `validation` its top1 and auroc where it has them.

    Raises:
        TrainingError: There are no labels, or fewer examples than a batch; a checkpoint does not fit, or the loss is
            no longer finite.
    """
    batches = len(data) // settings.batch_size
    if data.labels is None or not batches:
        raise TrainingError(f"Expected at least {settings.batch_size} labelled images, got {len(data)} images "
                            f"with{'out' if data.labels is None else ''} labels. Give more, or lower --batch-size."
                            )  # fmt: skip
    model.to(device)
    set_layout(model, torch.channels_last)
    optimiser = _make_optimiser(model, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    state = _State(
        model=model,
        optimiser=optimiser,
        schedule=_make_schedule(optimiser, settings, batches),
        generator=generator,
        history=[],
    )
    if checkpoint is not None:
        state.load_checkpoint(checkpoint)
    for epoch in range(len(state.history), settings.epochs):
        with seeded(settings.seed * 1_000_003 + epoch, device):
            loss = _fit_epoch(state, data, settings, epoch, torch.device(device), progress)
        model.eval()
        measured = {} if validation is None else measure_predictions(model, validation, device=device)
        headline = {name: measured[name] for name in ("top1", "auroc") if name in measured}
        state.history.append({"epoch": epoch + 1, "loss": loss} | headline)
        if save_checkpoint is not None:
            save_checkpoint(state.to_checkpoint())
    model.eval()
    set_layout(model, torch.contiguous_format)
    return state.history


@contextmanager
def seeded(seed: int, device: torch.device | str) -> Iterator[None]:
    """Let dropout and random weights draw from a seed of their own; afterwards the global random state is as before."""
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seed % 2**63)
        yield


def measure_predictions(model: nn.Module, data: LabelledData, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return how good a model's predictions are, as fractions.

    Args:
        model: Pixels to logits, on `device`, in any mode; it is measured in evaluation mode.
        data: Labelled examples.
        device: Device to run on.

    Returns:
        "top1" and, of more than five classes, "top5". With two classes also "auroc", the area under the ROC curve of
        class 1. With several labels at once only "per_class_auroc", by name, and "auroc", its mean; classes that are
        always or never there have none and are left out.

    Raises:
        TrainingError: There are no labels, or logits are not finite.
    """
    logits, labels = _predict(model, data, device)
    measured: dict[str, Any] = dict(prediction_figures(logits, labels))
    if data.multi_label and measured:
        areas = zip(data.classes, per_class_auroc(logits, labels), strict=True)
        measured["per_class_auroc"] = {name: area for name, area in areas if area is not None}
    return measured


def measure_chance(data: LabelledData) -> dict[str, float]:
    """Return what guessing stays under in 99 of 100 cases: "top1", "auroc", both or neither, as `measure_predictions`.

    Guessing right is naming the most frequent class of these data, with a binomial number of successes. An area under
    the ROC curve has the standard deviation of Mann and Whitney's U; the mean over several labels at once has at most
    the mean of theirs.

    Raises:
        TrainingError: There are no labels.
    """
    if data.labels is None:
        raise TrainingError("Expected labelled examples.")
    labels = data.labels if data.multi_label else data.labels[:, None]
    chance: dict[str, float] = {}
    if not data.multi_label:
        share = np.bincount(data.labels).max() / len(data)
        chance["top1"] = float(stats.binom.ppf(_SURE, len(data), share)) / len(data)
    if data.multi_label or len(data.classes) == 2:
        ones, count = (labels == 1).sum(0), len(labels)
        products = (ones * (count - ones)).astype(np.float64)
        deviations = np.sqrt((count + 1) / (12 * products[products > 0]))
        if len(deviations):
            chance["auroc"] = min(1.0, 0.5 + float(stats.norm.ppf(_SURE) * deviations.mean()))
    return chance


def _make_optimiser(model: nn.Module, settings: FittingSettings) -> torch.optim.Optimizer:
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimiser == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=_MOMENTUM, weight_decay=decay)
    adam = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.AdamW
    return adam(model.parameters(), rate, weight_decay=decay)


def _make_schedule(
    optimiser: torch.optim.Optimizer, settings: FittingSettings, batches: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that moves on after every step."""
    schedules = torch.optim.lr_scheduler
    if settings.schedule == "one-cycle":
        return schedules.OneCycleLR(optimiser, settings.learning_rate, total_steps=settings.epochs * batches)
    every = settings.decay_every or math.ceil(settings.epochs / 3)
    return schedules.StepLR(optimiser, every * batches, settings.decay_factor if settings.schedule == "step" else 1.0)


def _fit_epoch(
    state: _State,
    data: LabelledData,
    settings: FittingSettings,
    epoch: int,
    device: torch.device,
    progress: Progress,
) -> float:
    """Return the mean loss of the epoch's steps."""
    state.model.train()
    order = torch.randperm(len(data), generator=state.generator).numpy()
    batches, total = len(data) // settings.batch_size, 0.0
    for batch in range(batches):
        indices = order[batch * settings.batch_size : (batch + 1) * settings.batch_size]
        total += _fit_step(state, *_labelled_batch(data, indices), settings, device)
        if not math.isfinite(total):
            raise TrainingError(f"The loss is no longer finite in epoch {epoch + 1}. {_ADVICE}")
        progress.advance("fitting", epoch * batches + batch + 1, settings.epochs * batches)
    return total / batches


def _fit_step(state: _State, images: Images, labels: Targets, settings: FittingSettings, device: torch.device) -> float:
    images = images if images.shape[2] == 1 else _augment(images, settings, state.generator)
    mixed = settings.mixed_precision and device.type == "cuda"
    with SafeConvolutions(), torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        logits = state.model(images.to(device))
    loss = _label_loss(logits.float(), labels.to(device))
    state.optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    state.optimiser.step()
    state.schedule.step()
    return float(loss.detach())


def _label_loss(logits: Logits, labels: Targets) -> Tensor:
    """Return mean cross-entropy, or with several labels at once mean binary cross-entropy."""
    if labels.dim() == 2:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits))
    return functional.cross_entropy(logits, labels)


def _augment(images: Images, settings: FittingSettings, generator: torch.Generator) -> Images:
    """Return images mirrored, shifted and made noisy."""
    if settings.mirror:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images[mirrored] = images[mirrored].flip(-1)
    if settings.largest_shift:
        reach = settings.largest_shift
        images = images.roll(torch.randint(-reach, reach + 1, (2,), generator=generator).tolist(), (-2, -1))
    return _add_noise(images, settings.noise, generator) if settings.noise else images


def _add_noise(images: Images, largest: float, generator: torch.Generator) -> Images:
    deviation = largest * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images + deviation * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _labelled_batch(data: LabelledData, indices: NDArray[np.int64]) -> tuple[Images, Targets]:
    images, labels = data.batch(indices)
    if labels is None:
        raise TrainingError("Expected labelled images.")
    return images, labels


@torch.no_grad()
def _predict(model: nn.Module, data: LabelledData, device: torch.device | str) -> tuple[Logits, Targets]:
    """Return the logits and labels of all examples, on the CPU."""
    parts = []
    with evaluating(model):
        for some in batches(len(data), 256, even=True):
            images, labels = _labelled_batch(data, np.arange(len(data))[some])
            parts.append((model(images.to(device)).float().cpu(), labels))
    logits, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    if not logits.isfinite().all():
        raise TrainingError(f"The model's logits are no longer finite numbers. {_ADVICE}")
    return logits, labels
