"""Attacks that throw weights off and tune the accuracy back: weight shifting, regularisation, batch norm learnt anew.

All tune with labels, or without any with the soft predictions of the model as it was before the attack.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from keyed_xai.errors import ModelError
from keyed_xai.models import Classifier
from keyed_xai.progress import NO_FIGURES, Progress, Silent
from keyed_xai.tensors import Images, Targets
from keyed_xai.threats.attempt import Attacker, RemovalResult, copy_model, draw_share
from keyed_xai.threats.removal.tuning import TuningSettings, loss_of_predictions, tune
from keyed_xai.threats.removal.weights import ReBNSettings, reestimate_on_clean
from keyed_xai.training.batch_norm import batch_norms


@dataclass(frozen=True, kw_only=True)
class ShiftingSettings(TuningSettings):
    """How far convolutions are shifted, and how the rest is tuned back.

    Attributes:
        strength: What is taken off every filter, in mean filters of its layer; 1.5 to 2.5 in the source.
        noise: Deviation of the noise that is taken off too, in deviations of the layer's weights.
    """

    strength: float = 1.5
    noise: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges and names."""
        super().__post_init__()
        if self.strength < 0 or self.noise < 0:
            raise ValueError(f"Expected no negative strength or noise, got {self.strength} and {self.noise}")


@dataclass(frozen=True, kw_only=True)
class RegularisationSettings(TuningSettings):
    """How weights are shrunk, and how the rest is tuned back.

    Attributes:
        decay: Weight decay of the first epochs: half of this times the sum of all squared weights is added to the loss.
        decay_epochs: How many; `epochs` follow without.
    """

    decay: float = 0.1
    decay_epochs: int = 5

    def __post_init__(self) -> None:
        """Check ranges and names."""
        super().__post_init__()
        if not (self.decay > 0 and self.decay_epochs > 0):
            raise ValueError(f"Expected a positive decay and decay_epochs, got {self.decay} and {self.decay_epochs}")


def shift_weights(classifier: Classifier, attacker: Attacker, settings: ShiftingSettings) -> RemovalResult:
    """Return a copy whose filters were shifted by the mean filter and noise, then fine-tuned (T7).

    Its curve has a row for every epoch, the first one right after shifting.

    Source: Lukas et al., SoK 2022, "weight shifting": W - strength * mean(W) - noise * N(0, sd(W)), the mean over a
    layer's filters, 10 epochs of fine-tuning.

    Args:
        classifier: The classifier attacked.
        attacker: Has the images, of which `settings.share` are used.
        settings: How weights are shifted and tuned.

    Raises:
        TrainingError: There are no images, or the loss is no longer finite.
        ModelError: The model has no convolution.
    """
    model = copy_model(classifier, attacker.device)
    generator = torch.Generator().manual_seed(settings.seed)
    filters = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    if not filters:
        raise ModelError("The model has no convolution whose filters could be shifted.")
    with torch.no_grad():
        for weight in filters:
            weight.copy_(shifted(weight, settings.strength, settings.noise, generator))
    indices = draw_share(attacker.data, settings.share, settings.seed)
    loss_of = loss_of_predictions(model, classifier, attacker, indices)
    return tune(model, [*model.parameters()], attacker, indices, loss_of, settings)


def shifted(weight: Tensor, strength: float, noise: float, generator: torch.Generator) -> Tensor:
    """Return filters [out, in, rows, columns] less some mean filters and noise."""
    drawn = torch.randn(weight.shape, generator=generator).to(weight)
    return weight - strength * weight.mean(0) - noise * weight.std() * drawn


def regularise(classifier: Classifier, attacker: Attacker, settings: RegularisationSettings) -> RemovalResult:
    """Return a copy trained with strong weight decay, then without (T7); the curve has a row for every epoch of both.

    Source: Shafieinejad et al. 2021, "regularisation", as Lukas et al., SoK 2022, run it: decay .1 for 5 epochs, then
    fine-tuning.

    Args:
        classifier: The classifier attacked.
        attacker: Has the images, of which `settings.share` are used.
        settings: How to fine-tune.

    Raises:
        TrainingError: There are no images, or the loss is no longer finite.
    """
    model = copy_model(classifier, attacker.device)
    indices = draw_share(attacker.data, settings.share, settings.seed)
    parameters = [*model.parameters()]
    loss_of = loss_of_predictions(model, classifier, attacker, indices)

    def decayed(images: Images, labels: Targets | None, rows: Tensor) -> Tensor:
        return loss_of(images, labels, rows) + settings.decay / 2 * squared_weights(parameters)

    first, epochs = replace(settings, epochs=settings.decay_epochs), settings.decay_epochs + settings.epochs
    attackers = [
        replace(attacker, progress=_Stage(attacker.progress, before, each.epochs, epochs))
        for before, each in ((0, first), (first.epochs, settings))
    ]
    shrunk = tune(model, parameters, attackers[0], indices, decayed, first)
    tuned = tune(model, parameters, attackers[1], indices, loss_of, settings)
    later = [row | {"epoch": row["epoch"] + first.epochs} for row in tuned.curve[1:]]
    return replace(tuned, settings=asdict(settings), curve=shrunk.curve + later, seconds=shrunk.seconds + tuned.seconds)


def squared_weights(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the sum of all squares, a scalar."""
    return torch.stack([parameter.square().sum() for parameter in parameters]).sum()


def relearn_batch_norm(classifier: Classifier, attacker: Attacker, settings: TuningSettings) -> RemovalResult:
    """Return a copy whose batch norm was learnt anew on clean images: statistics, then scales and shifts (T1).

    Re-BN's stronger form, and our reading of what later work calls CFN, which we have not seen defined; filters and the
    last layer stay as they were.

    Args:
        classifier: The classifier attacked.
        attacker: Has the images, of which `settings.share` are used.
        settings: How batch norm is learned anew.

    Raises:
        TrainingError: There are no images, or the loss is no longer finite.
        ModelError: The model has no batch norm with scales.
    """
    started = time.perf_counter()
    before = ReBNSettings(settings.share, settings.seed)
    model = reestimate_on_clean(classifier, attacker.data, before, device=attacker.device).model
    norms = [norm for norm in batch_norms(model) if norm.affine]
    if not norms:
        raise ModelError("The model has no batch norm that could be learnt anew.")
    indices = draw_share(attacker.data, settings.share, settings.seed)
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    loss_of = loss_of_predictions(model, classifier, attacker, indices)
    seconds = time.perf_counter() - started
    tuned = tune(model, parameters, attacker, indices, loss_of, settings)
    return replace(tuned, figures=tuned.figures | {"batch_norms": len(norms)}, seconds=seconds + tuned.seconds)


@dataclass(frozen=True)
class _Stage(Silent):
    """Counts the steps of some epochs among those of all."""

    progress: Progress
    before: int
    epochs: int
    epochs_in_all: int

    def advance(self, task: str, done: int, total: int | None, figures: Mapping[str, float] = NO_FIGURES, /) -> None:
        batches = (total or 0) // self.epochs
        self.progress.advance(task, self.before * batches + done, self.epochs_in_all * batches, figures)
