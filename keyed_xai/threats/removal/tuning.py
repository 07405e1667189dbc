"""Training a copy of a model on an attacker's images: the loop that fine-tuning and distillation share."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from keyed_xai.errors import TrainingError
from keyed_xai.models import Classifier
from keyed_xai.models.layout import SafeConvolutions
from keyed_xai.tensors import Images, Targets
from keyed_xai.threats.attempt import Attacker, RemovalResult, copy_model, measured, predict
from keyed_xai.training.batch_norm import set_batch_norm
from keyed_xai.training.fitting import seeded
from keyed_xai.training.objective import prediction_loss

LossOf = Callable[[Images, Targets | None, Tensor], Tensor]
"""Loss of a batch, a scalar, from images, labels, and the rows of the images among those used, [n]."""
_MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How an attacker trains.

    Attributes:
        optimiser: "sgd" with momentum .9, or "adam".
        learning_rate: Its rate, constant.
        epochs: Passes over the attacker's images.
        share: Share of the images that the attacker has.
        batch_size: Images a step, or up to twice as many, so that no batch is small.
        batch_norm: "trained" has statistics follow the attacker's images; "frozen" keeps them.
        sam_radius: Radius of adaptive sharpness-aware steps (FT-SAM: Zhu et al., ICCV 2023, radius 2); 0 takes plain
            steps.
        seed: Seed of the share, the order of images and dropout.
    """

    optimiser: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.01
    epochs: int = 10
    share: float = 1 / 3
    batch_size: int = 64
    batch_norm: Literal["trained", "frozen"] = "trained"
    sam_radius: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges and names."""
        for name in ("learning_rate", "epochs", "share", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.share > 1 or self.sam_radius < 0:
            raise ValueError(
                f"Expected a share of at most 1 and no negative sam_radius: {self.share}, {self.sam_radius}"
            )
        known = {"optimiser": ("sgd", "adam"), "batch_norm": ("trained", "frozen")}
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name}: expected one of {', '.join(names)}; got {getattr(self, name)!r}")


def tune(
    model: Classifier,
    parameters: Sequence[nn.Parameter],
    attacker: Attacker,
    indices: NDArray[np.int64],
    loss_of: LossOf,
    settings: TuningSettings,
    *,
    after_step: Callable[[Classifier], None] | None = None,
) -> RemovalResult:
    """Train some of a model's parameters in place and return it, in eval mode, with a row for every epoch from 0.

    Args:
        model: The model, on the attacker's device.
        parameters: The parameters trained.
        attacker: Has the images; the curve has what he measures besides the mean loss.
        indices: Indices of the images used; `settings.share` has been drawn already.
        loss_of: Loss of a batch.
        settings: How to fine-tune.
        after_step: Called with the model after each step, such as to keep pruned weights at zero.

    Raises:
        TrainingError: The loss is no longer finite.
    """
    optimiser, device = _make_optimiser(parameters, settings), attacker.device
    batches = max(1, len(indices) // settings.batch_size)
    curve: list[dict[str, Any]] = [{"epoch": 0} | measured(attacker.measure, model)]
    seconds = 0.0
    for epoch in range(settings.epochs):
        started, losses = time.perf_counter(), []
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(indices))
        with seeded(settings.seed * 1_000_003 + epoch, device), _training_mode(model, settings), SafeConvolutions():
            for number, rows in enumerate(np.array_split(order, batches)):
                images, labels = attacker.data.batch(indices[rows])
                labels = None if labels is None else labels.to(device)
                batch = (images.to(device), labels, torch.from_numpy(rows).to(device))
                losses.append(_step(optimiser, parameters, loss_of, batch, settings))
                if after_step is not None:
                    after_step(model)
                attacker.progress.advance("tuning", epoch * batches + number + 1, settings.epochs * batches)
        seconds += time.perf_counter() - started
        curve.append({"epoch": epoch + 1, "loss": sum(losses) / batches} | measured(attacker.measure, model))
    return RemovalResult(
        model=model, settings=asdict(settings), figures={"images": len(indices)}, curve=curve, seconds=seconds
    )


def loss_of_predictions(
    model: Classifier, teacher: Classifier, attacker: Attacker, indices: NDArray[np.int64]
) -> LossOf:
    """Return the loss of a model's predictions: of labels, or of the teacher's answers."""
    taught = predict(copy_model(teacher, attacker.device), attacker, indices)

    def loss_of(images: Images, labels: Targets | None, rows: Tensor) -> Tensor:
        return prediction_loss(model(images), taught[rows], labels, multi_label=teacher.multi_label).mean()

    return loss_of


@contextmanager
def _training_mode(model: Classifier, settings: TuningSettings) -> Iterator[None]:
    model.train()
    if settings.batch_norm == "frozen":
        set_batch_norm(model, training=False)
    try:
        yield
    finally:
        model.eval()


def _make_optimiser(parameters: Sequence[nn.Parameter], settings: TuningSettings) -> torch.optim.Optimizer:
    if settings.optimiser == "adam":
        return torch.optim.Adam(parameters, settings.learning_rate)
    return torch.optim.SGD(parameters, settings.learning_rate, momentum=_MOMENTUM)


def _step(
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    loss_of: LossOf,
    batch: tuple[Images, Targets | None, Tensor],
    settings: TuningSettings,
) -> float:
    """Take one step and return the loss before it."""
    loss = loss_of(*batch)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if settings.sam_radius:
        with _at_sharpest_point(parameters, gradients, settings.sam_radius):
            gradients = torch.autograd.grad(loss_of(*batch), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    if not math.isfinite(float(loss.detach())):
        raise TrainingError("The attacker's loss is no longer finite. Lower the attack's learning rate.")
    return float(loss.detach())


@contextmanager
def _at_sharpest_point(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], radius: float
) -> Iterator[None]:
    """Move weights to where the loss is highest nearby, within `radius` in units of each weight's own size.

    Source: Kwon et al. 2021, ASAM, equation 8: radius * w^2 g / |w g|, as FT-SAM takes it.
    """
    moved = [(w, g) for w, g in zip(parameters, gradients, strict=True) if g is not None]
    norm = torch.stack([(w.detach() * g).square().sum() for w, g in moved]).sum().sqrt() + 1e-12
    before = [w.detach().clone() for w, _ in moved]
    with torch.no_grad():
        for w, g in moved:
            w.add_(w.square() * g, alpha=radius / float(norm))
    try:
        yield
    finally:
        with torch.no_grad():
            for (w, _), value in zip(moved, before, strict=True):
                w.copy_(value)
