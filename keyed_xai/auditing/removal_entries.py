"""Removal attacks by the names under which an audit lists them, each at a stated strength."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from keyed_xai.auditing.entries import Entry, Observation, S, judge_copy, with_seed
from keyed_xai.auditing.subject import Subject
from keyed_xai.errors import TrainingError
from keyed_xai.models import Classifier
from keyed_xai.ownership.rulings import DatedClaim, rule_on_claims
from keyed_xai.threats.attempt import Attacker, RemovalResult
from keyed_xai.threats.removal.denoising import DenoisingSettings, denoise_inputs
from keyed_xai.threats.removal.distillation import DistillationSettings, distil
from keyed_xai.threats.removal.fine_pruning import FinePruningSettings, fine_prune
from keyed_xai.threats.removal.fine_tuning import (
    ExplanationTuningSettings,
    FineTuningSettings,
    fine_tune,
    tune_explanations,
)
from keyed_xai.threats.removal.overwriting import Dispute, OverwritingSettings, measure_dispute, overwrite
from keyed_xai.threats.removal.rescaling import RescalingSettings, rescale_channels
from keyed_xai.threats.removal.shifting import (
    RegularisationSettings,
    ShiftingSettings,
    regularise,
    relearn_batch_norm,
    shift_weights,
)
from keyed_xai.threats.removal.tuning import TuningSettings
from keyed_xai.threats.removal.weights import (
    PruningSettings,
    QuantisationSettings,
    ReBNSettings,
    prune_weights,
    quantise_weights,
    reestimate_on_clean,
)

_SECOND_CHOICE = ("gradcam", "simplegrad")


@dataclass(frozen=True, kw_only=True)
class Removal(Entry[S]):
    """An attack on a model, which may leave no gate, no mark or no backdoor in the copy.

    Attributes:
        attack: Returns an attacked copy.
    """

    group: str = "removal"
    needs: frozenset[str] = frozenset({"state"})
    attack: Callable[[Classifier, Attacker, S], RemovalResult]

    def __call__(self, classifier: Classifier, attacker: Attacker) -> RemovalResult:
        """Return an attacked copy.

        Raises:
            TrainingError: The attack lacks images or a surrogate, or its loss is no longer finite.
            ModelError: The model has no layer of the kind attacked.
        """
        return self.attack(classifier, attacker, with_seed(self.settings, attacker.seed))

    def run(self, subject: Subject) -> Observation:
        """Return what is left in an attacked copy."""
        result = self(subject.classifier, subject.attacker())
        return judge_copy(subject, result.model, figures=result.figures, curve=result.curve)


@dataclass(frozen=True, kw_only=True)
class SecondKey(Removal[OverwritingSettings]):
    """A second owner's key put on a model."""

    def run(self, subject: Subject) -> Observation:
        """Return what is left, with both claims and whose the model is."""
        result = self(subject.classifier, subject.attacker())
        observation = judge_copy(subject, result.model, figures=result.figures, curve=result.curve)
        if subject.evidence is None:
            return observation
        taken = replace(with_seed(self.settings, subject.seed), interpreters=tuple(result.figures["interpreters"]))
        dispute = measure_dispute(result.model, subject.classifier, subject.evidence, taken)
        return _rule(observation, dispute, subject.evidence.licensed)


@dataclass(frozen=True, kw_only=True)
class Stack(Entry[tuple[str, ...]]):
    """Attacks on one another's models (T7); the settings are their names in REMOVALS."""

    @property
    def identity(self) -> str:
        """All that a finding rests on besides the model, the data and the names."""
        return repr([REMOVALS[name].identity for name in self.settings])

    def run(self, subject: Subject) -> Observation:
        """Return what is left after the last."""
        results = remove_in_turn(self.settings, subject.classifier, subject.attacker())
        figures = {"stages": [each.figures for each in results]}
        return judge_copy(subject, results[-1].model, figures=figures, curve=results[-1].curve)


def stack(names: Sequence[str]) -> Stack:
    """Return attacks by names in REMOVALS as one.

    Raises:
        KeyError: A name is not in REMOVALS.
    """
    return Stack(
        title=", then ".join(REMOVALS[name].title for name in names),
        threat="T7",
        group="removal",
        settings=tuple(names),
        words=lambda stages: "; then ".join(REMOVALS[name].strength for name in stages),
        needs=frozenset[str]().union(*(REMOVALS[name].needs for name in names)),
        slow=True,
    )


def remove_in_turn(names: Sequence[str], classifier: Classifier, attacker: Attacker) -> list[RemovalResult]:
    """Return the results of attacks on one another's models; the last has the final model.

    Raises:
        KeyError: A name is not in REMOVALS.
    """
    results: list[RemovalResult] = []
    for name in names:
        results.append(REMOVALS[name](results[-1].model if results else classifier, attacker))
    return results


def _rule(observation: Observation, dispute: Dispute, licensed: datetime | None) -> Observation:
    """Return an observation with what both owners can claim and whose the model is."""
    second = dispute.second.ownership
    claims = (
        DatedClaim("the first owner", dispute.first_shown, licensed),
        DatedClaim("the second owner", second is not None and second.shown, datetime.now(UTC)),
    )
    ruling = rule_on_claims(*claims)
    stolen = bool(observation.before and (observation.before.ownership or {}).get("shown"))
    shown = ["shown" if claim.shown else "not shown" for claim in claims]
    keyed = min(each["keyed"] for each in dispute.second.correlation.values())
    sentence = (
        f"{observation.sentence} With the pattern behind the second key's gate "
        f"(2^{dispute.behind.combined.log2_p:.0f}) the first claim is {shown[0]}; the second is {shown[1]} (keyed maps "
        f"{keyed:.2f}). {ruling.reason} The model that the second owner must call his original "
        f"{'shows' if stolen else 'does not show'} the first claim."
    )
    figures = observation.figures | {
        "dispute": dispute.to_json(),
        "claims": [{"owner": c.owner, "shown": c.shown, "time": c.time and c.time.isoformat()} for c in claims],
        "ruling": {"owner": ruling.owner, "proven": ruling.proven, "reason": ruling.reason},
    }
    outcome = observation.outcome if not claims[0].shown or observation.outcome != "removed" else "maps damaged"
    return replace(observation, outcome=outcome, sentence=sentence, figures=figures)


def _fine_tuning(title: str, settings: FineTuningSettings, *, slow: bool = True) -> Removal[FineTuningSettings]:
    return Removal(
        title=title,
        threat="T2",
        settings=settings,
        words=lambda s: f"{s.kind.upper()}, {_describe(s)}",
        attack=fine_tune,
        slow=slow,
    )


def _pruning(share: float) -> Removal[PruningSettings]:
    return Removal(
        title=f"Pruning {100 * share:.0f} %",
        threat="T4",
        settings=PruningSettings(share),
        words=lambda s: f"the smallest {s.share:.0%} of all weights",
        attack=lambda classifier, attacker, s: prune_weights(classifier, s, device=attacker.device),
    )


def _describe_fine_pruning(settings: FinePruningSettings) -> str:
    after = f", then {_describe(settings.fine_tuning)}" if settings.fine_tuning else ""
    return f"{settings.shares[-1]:.0%} of the last convolution's channels{after}"


def _quantisation(title: str, bits: int) -> Removal[QuantisationSettings]:
    return Removal(
        title=title,
        threat="T5",
        settings=QuantisationSettings(bits),
        words=lambda s: (
            "weights in half precision" if s.bits == 16 else f"weights in {s.bits} bits, a scale for each channel"
        ),
        attack=lambda classifier, attacker, s: quantise_weights(classifier, s, device=attacker.device),
    )


def _distillation(title: str, settings: DistillationSettings) -> Removal[DistillationSettings]:
    return Removal(title=title, threat="T6", settings=settings, words=_describe_distillation, attack=distil, slow=True)


def _describe_distillation(settings: DistillationSettings) -> str:
    widths = settings.widths and "-".join(map(str, settings.widths))
    student = f"a SmallResNet of {widths} channels" if widths else "the same architecture"
    return f"into {student}, T = {settings.temperature:g}, {_describe(settings)}"


def _shifting(title: str, settings: ShiftingSettings) -> Removal[ShiftingSettings]:
    return Removal(
        title=title,
        threat="T7",
        settings=settings,
        words=lambda s: f"filters shifted by {s.strength:g} mean filters and noise, then {_describe(s)}",
        attack=shift_weights,
        slow=True,
    )


def _overwrite_beside(classifier: Classifier, attacker: Attacker, settings: OverwritingSettings) -> RemovalResult:
    """Return a copy with a second key on maps that the first owner left alone.

    Raises:
        TrainingError: There are none that count as evidence.
    """
    closed = attacker.view.interpreters if attacker.view else ()
    free = [name for name in _SECOND_CHOICE if name not in closed]
    if not free:
        raise TrainingError("Every interpreter that counts is closed already: no other is left to put a second key on.")
    return overwrite(classifier, attacker, replace(settings, interpreters=(free[0],)))


def _describe_overwriting(settings: OverwritingSettings, *, where: str) -> str:
    return f"a second key {where}, {settings.training.steps} steps, {settings.share:.0%} of the data"


def _describe(settings: TuningSettings) -> str:
    parts = [
        f"{settings.optimiser.upper() if settings.optimiser == 'sgd' else 'Adam'} {settings.learning_rate:g}",
        f"{settings.epochs} epochs",
        f"{settings.share:.0%} of the data",
    ]
    parts += ["batch norm frozen"] if settings.batch_norm == "frozen" else []
    parts += [f"sharpness-aware, radius {settings.sam_radius:g}"] if settings.sam_radius else []
    return ", ".join(parts)


REMOVALS: dict[str, Removal[Any]] = {
    "re-bn": Removal(
        title="Batch norm re-estimated",
        threat="T1",
        settings=ReBNSettings(),
        words=lambda s: f"batch norm re-estimated on clean images, {s.share:.0%} of the data",
        attack=lambda classifier, attacker, s: reestimate_on_clean(
            classifier, attacker.data, s, device=attacker.device
        ),
    ),
    "ftal-mild": _fine_tuning(
        "Fine-tuning, mild", FineTuningSettings(learning_rate=1e-3, epochs=3, share=0.2), slow=False
    ),
    "ftll": _fine_tuning("Fine-tuning the last layer", FineTuningSettings(kind="ftll"), slow=False),
    "ftal": _fine_tuning("Fine-tuning all layers", FineTuningSettings(kind="ftal"), slow=False),
    "rtll": _fine_tuning("Retraining the last layer", FineTuningSettings(kind="rtll")),
    "rtal": _fine_tuning("Retraining head, tuning all layers", FineTuningSettings(kind="rtal")),
    "ftal-frozen": _fine_tuning("Fine-tuning, batch norm frozen", FineTuningSettings(batch_norm="frozen")),
    "ftal-adam": _fine_tuning("Fine-tuning with Adam", FineTuningSettings(optimiser="adam", learning_rate=1e-3)),
    "ft-sam": _fine_tuning("Sharpness-aware fine-tuning", FineTuningSettings(epochs=100, share=0.05, sam_radius=2.0)),
    "explanations": Removal(
        title="Explanation-aware fine-tuning",
        threat="T3",
        settings=ExplanationTuningSettings(),
        words=lambda s: f"maps pulled to a surrogate's, {_describe(s)}",
        attack=tune_explanations,
        needs=frozenset({"state", "surrogate"}),
        slow=True,
    ),
    "prune-30": _pruning(0.3),
    "prune-50": _pruning(0.5),
    "prune-70": _pruning(0.7),
    "fine-prune": Removal(
        title="Fine-pruning",
        threat="T4",
        group="defences",
        also=("removal",),
        settings=FinePruningSettings(),
        words=_describe_fine_pruning,
        attack=fine_prune,
        controlled=True,
    ),
    "fine-prune-50": Removal(
        title="Fine-pruning half the channels",
        threat="T4",
        settings=FinePruningSettings(shares=(0.1, 0.2, 0.3, 0.4, 0.5)),
        words=_describe_fine_pruning,
        attack=fine_prune,
        slow=True,
    ),
    "int8": _quantisation("8-bit weights", 8),
    "int6": _quantisation("6-bit weights", 6),
    "int5": _quantisation("5-bit weights", 5),
    "fp16": _quantisation("Half precision", 16),
    "distil": _distillation("Distillation", DistillationSettings()),
    "distil-other": _distillation("Distillation, another network", DistillationSettings(widths=(24, 48, 48))),
    "cfn": Removal(
        title="Batch norm relearnt",
        threat="T1",
        settings=TuningSettings(),
        words=lambda s: f"batch norm re-estimated, its scales and shifts learnt anew, {_describe(s)}",
        attack=relearn_batch_norm,
        slow=True,
    ),
    "shift": _shifting("Shifting filters", ShiftingSettings()),
    "shift-far": _shifting("Shifting filters, far", ShiftingSettings(strength=2.5)),
    "regularise": Removal(
        title="Weight decay",
        threat="T7",
        settings=RegularisationSettings(),
        words=lambda s: f"weight decay {s.decay:g} for {s.decay_epochs} epochs, then {_describe(s)}",
        attack=regularise,
        slow=True,
    ),
    "overwrite": SecondKey(
        title="Overwriting with a second key",
        threat="T7",
        settings=OverwritingSettings(),
        words=partial(_describe_overwriting, where="on the same maps"),
        attack=overwrite,
        slow=True,
    ),
    "overwrite-beside": SecondKey(
        title="A second key beside the first",
        threat="T7",
        settings=OverwritingSettings(),
        words=partial(_describe_overwriting, where="on maps that the first left alone"),
        attack=_overwrite_beside,
        slow=True,
    ),
    "rescale": Removal(
        title="Rescaling channels",
        threat="T8",
        settings=RescalingSettings(),
        words=lambda s: (
            f"channels scaled by 1/{2**s.largest_exponent} to {2**s.largest_exponent}"
            f"{' and permuted' if s.permute else ''}, logits unchanged"
        ),
        attack=lambda classifier, attacker, s: rescale_channels(classifier, s, device=attacker.device),
    ),
    "denoise": Removal(
        title="Denoising inputs",
        threat="T13",
        group="defences",
        also=("removal",),
        settings=DenoisingSettings(),
        words=lambda s: f"total variation, as strong as costs {100 * s.loss:g} points of the score",
        attack=denoise_inputs,
        controlled=True,
    ),
}
"""Removal attacks by the names that `audit --against` takes."""
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
