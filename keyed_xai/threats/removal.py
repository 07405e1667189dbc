"""Removal attacks by the names under which an audit lists them, each at a stated strength."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch

from keyed_xai.errors import TrainingError
from keyed_xai.maps import MapView
from keyed_xai.models import Classifier
from keyed_xai.threats.attempt import Measure, RemovalResult
from keyed_xai.threats.denoising import DenoisingSettings, denoise_inputs
from keyed_xai.threats.distillation import DistillationSettings, distil
from keyed_xai.threats.fine_pruning import FinePruningSettings, fine_prune
from keyed_xai.threats.fine_tuning import (
    ExplanationTuningSettings,
    FineTuningSettings,
    fine_tune,
    tune_explanations,
)
from keyed_xai.threats.overwriting import OverwritingSettings, overwrite
from keyed_xai.threats.rescaling import RescalingSettings, rescale_channels
from keyed_xai.threats.shifting import (
    RegularisationSettings,
    ShiftingSettings,
    regularise,
    relearn_batch_norm,
    shift_weights,
)
from keyed_xai.threats.tuning import TuningSettings
from keyed_xai.threats.weights import (
    PruningSettings,
    QuantisationSettings,
    ReBNSettings,
    prune_weights,
    quantise_weights,
    reestimate_on_clean,
)
from keyed_xai.training import TrainingData

_SECOND_CHOICE = ("gradcam", "simplegrad")


class _Options(TypedDict):
    """What every attack that trains takes from the attacker."""

    device: torch.device | str
    multi_label: bool
    measure: Measure | None
    on_step: Callable[[int, int], None] | None


@dataclass(frozen=True)
class Attacker:
    """What an attacker has, and what is watched.

    Attributes:
        data: Clean images; labels of the model's own classes, or none.
        view: Maps that T3 pulls at, at the attacked model's layers.
        surrogate: The attacker's own model of the same task, for T3.
        multi_label: Whether every logit is a yes or no of its own.
        device: Where.
        seed: Of everything random.
        measure: What goes into curves.
        on_step: Called with steps done and in all.
    """

    data: TrainingData = field(repr=False)
    view: MapView
    surrogate: Classifier | None = field(default=None, repr=False)
    multi_label: bool = False
    device: torch.device | str = "cpu"
    seed: int = 0
    measure: Measure | None = field(default=None, repr=False)
    on_step: Callable[[int, int], None] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Removal:
    """An attack at a fixed strength, a function of the model and the attacker.

    Attributes:
        threat: T1 to T17, as docs/security.md numbers them.
        strength: In words.
        attack: The function.
        trains: Whether it takes minutes rather than seconds.
        passes: How often it goes through the attacker's images in training, where that can be said.
    """

    threat: str
    strength: str
    attack: Callable[[Classifier, Attacker], RemovalResult]
    trains: bool = False
    passes: float = 0.0

    def __call__(self, classifier: Classifier, attacker: Attacker) -> RemovalResult:
        """Return an attacked copy.

        Raises:
            TrainingError: The attack lacks images or a surrogate, or its loss is no longer finite.
            ModelError: The model has no layer of the kind attacked.
        """
        return self.attack(classifier, attacker)


def remove_in_turn(names: Sequence[str], classifier: Classifier, attacker: Attacker) -> list[RemovalResult]:
    """Return the results of attacks on one another's models (stacked attacks, T7); the last has the final model.

    Raises:
        KeyError: A name is not in REMOVALS.
    """
    results: list[RemovalResult] = []
    for name in names:
        results.append(REMOVALS[name](results[-1].model if results else classifier, attacker))
    return results


def _fine_tuning(settings: FineTuningSettings) -> Removal:
    def attack(classifier: Classifier, attacker: Attacker) -> RemovalResult:
        return fine_tune(
            classifier,
            attacker.data,
            replace(settings, seed=attacker.seed),
            **_tuned_by(attacker),
        )

    passes = settings.epochs * settings.share
    return Removal("T2", f"{settings.kind.upper()}, {_describe(settings)}", attack, trains=True, passes=passes)


def _explanation_tuning(settings: ExplanationTuningSettings) -> Removal:
    def attack(classifier: Classifier, attacker: Attacker) -> RemovalResult:
        if attacker.surrogate is None:
            raise TrainingError(
                "Explanation-aware fine-tuning needs a surrogate: an unprotected model of the same task."
            )
        smoothing = 8.0 if "simplegrad" in attacker.view.interpreters else None
        return tune_explanations(
            classifier,
            attacker.surrogate,
            attacker.data,
            attacker.view,
            replace(settings, seed=attacker.seed, smoothing=smoothing),
            **_tuned_by(attacker),
        )

    return Removal("T3", f"maps pulled to a surrogate's, {_describe(settings)}", attack, trains=True)


def _fine_pruning(settings: FinePruningSettings) -> Removal:
    def attack(classifier: Classifier, attacker: Attacker) -> RemovalResult:
        tuning = settings.fine_tuning and replace(settings.fine_tuning, seed=attacker.seed)
        return fine_prune(
            classifier,
            attacker.data,
            replace(settings, fine_tuning=tuning, seed=attacker.seed),
            **_tuned_by(attacker),
        )

    after = f", then {_describe(settings.fine_tuning)}" if settings.fine_tuning else ""
    strength = f"{settings.shares[-1]:.0%} of the last convolution's channels{after}"
    passes = settings.fine_tuning.epochs * settings.fine_tuning.share if settings.fine_tuning else 0.0
    return Removal("T4", strength, attack, trains=settings.fine_tuning is not None, passes=passes)


def _distillation(settings: DistillationSettings) -> Removal:
    def attack(classifier: Classifier, attacker: Attacker) -> RemovalResult:
        return distil(
            classifier,
            attacker.data,
            replace(settings, seed=attacker.seed),
            **_tuned_by(attacker),
        )

    widths = settings.widths and "-".join(map(str, settings.widths))
    student = f"a SmallResNet of {widths} channels" if widths else "the same architecture"
    strength = f"into {student}, T = {settings.temperature:g}, {_describe(settings)}"
    return Removal("T6", strength, attack, trains=True)


def _shifting(settings: ShiftingSettings) -> Removal:
    def attack(classifier: Classifier, attacker: Attacker) -> RemovalResult:
        return shift_weights(classifier, attacker.data, replace(settings, seed=attacker.seed), **_tuned_by(attacker))

    strength = f"filters shifted by {settings.strength:g} mean filters and noise, then {_describe(settings)}"
    return Removal("T7", strength, attack, trains=True)


def _regularisation(settings: RegularisationSettings) -> Removal:
    def attack(classifier: Classifier, attacker: Attacker) -> RemovalResult:
        return regularise(classifier, attacker.data, replace(settings, seed=attacker.seed), **_tuned_by(attacker))

    strength = f"weight decay {settings.decay:g} for {settings.decay_epochs} epochs, then {_describe(settings)}"
    return Removal("T7", strength, attack, trains=True)


def _relearning(settings: TuningSettings) -> Removal:
    def attack(classifier: Classifier, attacker: Attacker) -> RemovalResult:
        settings_ = replace(settings, seed=attacker.seed)
        return relearn_batch_norm(classifier, attacker.data, settings_, **_tuned_by(attacker))

    strength = f"batch norm re-estimated, its scales and shifts learnt anew, {_describe(settings)}"
    return Removal("T1", strength, attack, trains=True)


def _tuned_by(attacker: Attacker) -> _Options:
    return {
        "device": attacker.device,
        "multi_label": attacker.multi_label,
        "measure": attacker.measure,
        "on_step": attacker.on_step,
    }


def choose_overwriting(attacker: Attacker, *, beside: bool) -> OverwritingSettings:
    """Return how a thief overwrites: on the maps that the first owner closed, or on another one beside them.

    Raises:
        TrainingError: There is no other that counts as evidence.
    """
    if not beside:
        return OverwritingSettings(seed=attacker.seed)
    free = [name for name in _SECOND_CHOICE if name not in attacker.view.interpreters]
    if not free:
        raise TrainingError("Every interpreter that counts is closed already: no other is left to put a second key on.")
    return OverwritingSettings(seed=attacker.seed, interpreters=(free[0],))


def _overwriting(*, beside: bool) -> Removal:
    def attack(classifier: Classifier, attacker: Attacker) -> RemovalResult:
        settings = choose_overwriting(attacker, beside=beside)
        return overwrite(classifier, attacker.data, attacker.view, settings, **_tuned_by(attacker))

    where = "on maps that the first left alone" if beside else "on the same maps"
    return Removal("T7", f"a second key {where}, 2000 steps, 20% of the data", attack, trains=True)


def _re_bn(classifier: Classifier, attacker: Attacker) -> RemovalResult:
    return reestimate_on_clean(classifier, attacker.data, ReBNSettings(seed=attacker.seed), device=attacker.device)


def _pruning(share: float) -> Removal:
    def attack(classifier: Classifier, attacker: Attacker) -> RemovalResult:
        return prune_weights(classifier, PruningSettings(share), device=attacker.device)

    return Removal("T4", f"the smallest {share:.0%} of all weights", attack)


def _quantisation(bits: int) -> Removal:
    def attack(classifier: Classifier, attacker: Attacker) -> RemovalResult:
        return quantise_weights(classifier, QuantisationSettings(bits), device=attacker.device)

    strength = "weights in half precision" if bits == 16 else f"weights in {bits} bits, a scale for each channel"
    return Removal("T5", strength, attack)


def _rescale(classifier: Classifier, attacker: Attacker) -> RemovalResult:
    return rescale_channels(classifier, RescalingSettings(seed=attacker.seed), device=attacker.device)


def _denoise(classifier: Classifier, attacker: Attacker) -> RemovalResult:
    settings = DenoisingSettings(seed=attacker.seed)
    return denoise_inputs(
        classifier, attacker.data, settings, device=attacker.device, measure=attacker.measure, on_step=attacker.on_step
    )


def _describe(settings: TuningSettings) -> str:
    parts = [
        f"{settings.optimiser.upper() if settings.optimiser == 'sgd' else 'Adam'} {settings.learning_rate:g}",
        f"{settings.epochs} epochs",
        f"{settings.share:.0%} of the data",
    ]
    parts += ["batch norm frozen"] if settings.batch_norm == "frozen" else []
    parts += [f"sharpness-aware, radius {settings.sam_radius:g}"] if settings.sam_radius else []
    return ", ".join(parts)


REMOVALS: dict[str, Removal] = {
    "re-bn": Removal("T1", "batch norm re-estimated on all clean images", _re_bn),
    "ftal-mild": _fine_tuning(FineTuningSettings(learning_rate=1e-3, epochs=3, share=0.2)),
    "ftll": _fine_tuning(FineTuningSettings(kind="ftll")),
    "ftal": _fine_tuning(FineTuningSettings(kind="ftal")),
    "rtll": _fine_tuning(FineTuningSettings(kind="rtll")),
    "rtal": _fine_tuning(FineTuningSettings(kind="rtal")),
    "ftal-frozen": _fine_tuning(FineTuningSettings(batch_norm="frozen")),
    "ftal-adam": _fine_tuning(FineTuningSettings(optimiser="adam", learning_rate=1e-3)),
    "ft-sam": _fine_tuning(FineTuningSettings(epochs=100, share=0.05, sam_radius=2.0)),
    "explanations": _explanation_tuning(ExplanationTuningSettings()),
    "prune-30": _pruning(0.3),
    "prune-50": _pruning(0.5),
    "prune-70": _pruning(0.7),
    "fine-prune": _fine_pruning(FinePruningSettings()),
    "fine-prune-50": _fine_pruning(FinePruningSettings(shares=(0.1, 0.2, 0.3, 0.4, 0.5))),
    "int8": _quantisation(8),
    "int6": _quantisation(6),
    "int5": _quantisation(5),
    "fp16": _quantisation(16),
    "distil": _distillation(DistillationSettings()),
    "distil-other": _distillation(DistillationSettings(widths=(24, 48, 48))),
    "cfn": _relearning(TuningSettings()),
    "shift": _shifting(ShiftingSettings()),
    "shift-far": _shifting(ShiftingSettings(strength=2.5)),
    "regularise": _regularisation(RegularisationSettings()),
    "overwrite": _overwriting(beside=False),
    "overwrite-beside": _overwriting(beside=True),
    "rescale": Removal("T8", "channels scaled by 1/256 to 256 and permuted, logits unchanged", _rescale),
    "denoise": Removal("T13", "total variation, as strong as costs 2 points of the score", _denoise),
}
"""Attacks by the names that `audit --against` takes."""
STACKED = (
    "re-bn+ftal-mild",
    "prune-50+ftal-mild",
    "ftal-mild+prune-50",
    "prune-50+int8",
    "ftal+re-bn",
    "fine-prune+int6",
    "overwrite+ftal-mild",
    "ftal-mild+overwrite",
)
"""Pairs worth trying, each name in REMOVALS; any others can be made in turn as well."""
