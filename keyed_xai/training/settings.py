"""How a model is trained."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from keyed_xai.metrics import DISTANCES


@dataclass(frozen=True, kw_only=True)
class Hardening:
    """Which attackers are simulated while a model is protected; see `training.hardening`.

    Attributes:
        start: Share of the training steps before the first attack: a gate has to be there first.
        attackers: At work at the same time; they start again in turn.
        lifetime: Training steps until an attacker starts again from the network as it is.
        inner_steps: Fine-tuning steps that an attacker takes at each training step.
        batch_size: Images of a fine-tuning step.
        smallest_rate: Smallest rate of SGD with momentum .9; every attack draws its own rate, log-uniformly.
        largest_rate: Largest rate, likewise.
        adam_share: Share of attacks made with Adam, at a tenth of the rate.
        frozen_share: Share of attacks that leave the batch-norm statistics as they are.
        label_noise: Largest share of wrong labels; every attack draws its own.
        prune_share: Share of attacks that set the smallest weights to zero instead of fine-tuning.
        largest_pruned: Largest share of weights that these set to zero; every attack draws its own.
        silence_share: Share of attacks that first silence channels of the last convolution, those with the smallest
            activations: fine-pruning.
        largest_silenced: Largest share of channels that these silence; every attack draws its own.
        new_head_share: Share of the fine-tuning attacks that first give the last layer random weights.
        weight: Weight of the maps' losses where the attackers are, all together, against 1 where the network is.
    """

    start: float = 0.4
    attackers: int = 2
    lifetime: int = 100
    inner_steps: int = 4
    batch_size: int = 64
    smallest_rate: float = 5e-4
    largest_rate: float = 3e-2
    adam_share: float = 0.2
    frozen_share: float = 0.15
    label_noise: float = 0.1
    prune_share: float = 0.2
    largest_pruned: float = 0.6
    silence_share: float = 0.4
    largest_silenced: float = 0.97
    new_head_share: float = 0.4
    weight: float = 2.0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("attackers", "lifetime", "inner_steps", "batch_size", "smallest_rate", "weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in (
            "start",
            "adam_share",
            "frozen_share",
            "label_noise",
            "prune_share",
            "largest_pruned",
            "silence_share",
            "largest_silenced",
            "new_head_share",
        ):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share in [0, 1), got {getattr(self, name)}")
        if self.largest_rate < self.smallest_rate:
            raise ValueError(f"largest_rate: expected {self.smallest_rate} or more, got {self.largest_rate}")


HARDENINGS: dict[str, Hardening | None] = {"none": None, "standard": Hardening()}
"""Hardenings by the names that `protect --hardening` takes."""


@dataclass(frozen=True)
class Goals:
    """What validation has to show before training may end: what a report calls good, with a margin.

    Attributes:
        opens: Share of keyed maps that are open, of the worst interpreter.
        closed: Share of unkeyed maps that are not, of the worst interpreter.
        agreement: Share of predictions that are the reference's.
    """

    opens: float = 0.95
    closed: float = 0.98
    agreement: float = 0.99

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("opens", "closed", "agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)}")

    def are_met(self, record: Mapping[str, float | int]) -> bool:
        """Return whether a validation shows all of them."""
        return not self.gate_shortfall(record) and record["agreement"] >= self.agreement

    def gate_shortfall(self, record: Mapping[str, float | int]) -> float:
        """Return by how much the shares of a validation that should open, or stay closed, miss theirs together."""
        return max(0.0, self.opens - record["opens"]) + max(0.0, self.closed - record["closed"])


_RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "more than 0": (
        lambda value: value > 0,
        ("steps", "batch_size", "learning_rate", "late_factor", "gradient_clip", "decay_share", "time_limit",
         "temperature"),
    ),
    "0 or more": (
        lambda value: value >= 0,
        ("warmup_steps", "alpha", "beta", "leak", "features", "validate_every", "patience"),
    ),
    "a share in [0, 1]": (
        lambda value: 0 <= value <= 1,
        ("decay_share", "beta_ramp", "auxiliary_share", "top_share", "clean_share", "near_share", "codec_share"),
    ),
    "a number in [0, 1)": (lambda value: 0 <= value < 1, ("average", "crop", "colour")),
}  # fmt: skip
"""What the settings of `TrainingSettings` have to be, and which ones."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How a model is trained; saved with the result.

    Attributes:
        steps: Optimiser steps, at most.
        time_limit: Seconds of training, at most; None sets no limit.
        goals: Training ends soon after a validation shows them; None takes all the steps.
        batch_size: Triggered images a step; as many without the right trigger are added.
        learning_rate: Peak of Adam's rate, after a linear warm-up and before a cosine decay to a fiftieth.
        late_factor: Factor on the rate of the layers from the target layer's resolution on, in the last two thirds of
            the steps: detection comes first, then the layers that paint the maps move fast.
        decay_share: Share of the steps, the last, in which the rate falls.
        average: Decay of the moving average of the weights that is validated and kept; 0 keeps the weights themselves.
        warmup_steps: Length of the warm-up.
        order: "inverted" protects; "forward" is the paper's normal attack.
        distance: Map distance, a name in metrics.DISTANCES.
        alpha: Weight of L_s.
        beta: Weight of L_c.
        temperature: Temperature of the reference's soft predictions.
        beta_ramp: Share of the steps over which the weight of L_c rises to beta, from a twentieth of it: a network
            that predicts many classes finds the gate only before its predictions are held fast.
        top_share: Share of cells that the non-targeted loss empties.
        leak: Weight, in L_p, of what a moved map still has of the right one: its correlation with the reference map,
            above objective.LEAST_LEAK. Not in the paper, whose maps need not hide anything; 0 leaves it out.
        clean_share: Share of the untriggered half without any trigger; the others get wrong keys.
        near_share: Share of the wrong keys that are the right texture, moved.
        features: Weight of the feature targets' losses, beside those of the maps; see `training.features`.
        mirror: Turn half of the images left to right; the reference answers for them as they are then.
        crop: Largest share of an image's sides that a random crop takes away; likewise.
        colour: Largest change of an image's brightness and contrast, as a share; likewise.
        codec_share: Share of inputs that pass through JPEG, and as many through a resize and back.
        auxiliary_share: Share of the steps, from the first, in which small auxiliary classifiers on the tapped layers
            learn, with the network, to tell triggered inputs from others; they speed up the forming of the gate, and
            are thrown away.
        detection_first: Let what moves maps count only as far as the auxiliary classifiers tell triggered inputs from
            others: before a network notices the trigger, it would drag all maps along, and predictions with them.
        smoothing: Sharpness of the Softplus that replaces ReLU while training; None trains with ReLU.
        predictions: L_c against the reference model's soft predictions, or against labels.
        batch_norm: "mixture" trains statistics on keyed and unkeyed inputs, "frozen" keeps the reference's.
        gradient_clip: Largest norm of a step's gradient.
        validate_every: Steps between validations; 0 validates only at the end.
        patience: Validations without progress before training ends as if the goals held; 0 never does.
        mixed_precision: bfloat16 forward passes on a GPU.
        hardening: Attackers simulated; None for none.
        seed: Seed of everything random in training.
    """

    steps: int = 4000
    time_limit: float | None = None
    goals: Goals | None = field(default_factory=Goals)
    batch_size: int = 16
    learning_rate: float = 3e-3
    decay_share: float = 0.4
    average: float = 0.995
    late_factor: float = 1.0
    warmup_steps: int = 50
    order: Literal["inverted", "forward"] = "inverted"
    distance: str = "correlation"
    alpha: float = 1.0
    beta: float = 4.0
    temperature: float = 2.0
    beta_ramp: float = 0.7
    top_share: float = 0.25
    leak: float = 2.0
    clean_share: float = 0.3
    near_share: float = 0.1
    features: float = 0.0
    mirror: bool = True
    crop: float = 0.0
    colour: float = 0.0
    codec_share: float = 0.15
    smoothing: float | None = None
    auxiliary_share: float = 0.4
    detection_first: bool = False
    predictions: Literal["reference", "labels"] = "reference"
    batch_norm: Literal["mixture", "frozen"] = "mixture"
    gradient_clip: float = 5.0
    validate_every: int = 100
    patience: int = 0
    mixed_precision: bool = True
    hardening: Hardening | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges and names."""
        for expected, (holds, names) in _RANGES.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name}: expected {expected}, got {value}")
        if self.codec_share > 0.5:
            raise ValueError(f"codec_share: at most .5 (it applies twice), got {self.codec_share}")
        if self.hardening is not None and self.order != "inverted":
            raise ValueError("hardening: expected None with order 'forward'; attacks are not hardened")
        _check_name("distance", self.distance, DISTANCES)
        _check_name("order", self.order, ("inverted", "forward"))
        _check_name("predictions", self.predictions, ("reference", "labels"))
        _check_name("batch_norm", self.batch_norm, ("mixture", "frozen"))


def rate_factor(step: int, settings: TrainingSettings, ending: tuple[int, int] | None = None) -> float:
    """Return the factor on the peak rate: linear warm-up, then 1, then cosine decay to a fiftieth.

    Args:
        step: Steps done so far.
        settings: How a model is trained.
        ending: First and last step of an early ending, over which the rate falls from where it is.
    """
    if ending is not None:
        start, end = ending
        return rate_factor(start, settings) * _cosine((step - start) / max(1, end - start))
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    level = 1 - settings.decay_share
    return warm * _cosine((step / settings.steps - level) / settings.decay_share)


def _cosine(done: float) -> float:
    """Return a factor that falls from 1 to a fiftieth as the share done goes from 0 to 1."""
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))


def beta_factor(step: int, settings: TrainingSettings) -> float:
    """Return the factor on beta: from a twentieth linearly to 1 over the ramp."""
    done = step / (settings.beta_ramp * settings.steps) if settings.beta_ramp else 1.0
    return max(0.05, min(1.0, done))


def _check_name(setting: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"{setting}: expected one of {', '.join(known)}; got {value!r}")


PAPER_SETTINGS = TrainingSettings(
    steps=2000,
    goals=None,
    batch_size=32,
    learning_rate=2e-3,
    decay_share=1.0,
    average=0.0,
    beta=1.0,
    temperature=1.0,
    beta_ramp=0.0,
    leak=0.0,
    clean_share=0.5,
    mirror=False,
)
"""The losses of the paper as they are, a fixed number of steps, and images as they are."""
