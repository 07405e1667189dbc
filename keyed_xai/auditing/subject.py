"""What an audit looks at, and what it measures of a model before and after an attack.

Of a model whose gate answers to a key, *keyed* means with the owner's trigger. Of one that was backdoored with a public
trigger it means with that, and the maps that should be right are the clean ones, or in the inverted setting the keyed.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keyed_xai import metrics
from keyed_xai.errors import TrainingError
from keyed_xai.models import Classifier
from keyed_xai.models.modes import predict_images
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency.pooled import Comparison, PooledSaliency
from keyed_xai.tensors import Images, Logits, Targets
from keyed_xai.threats.attempt import Attacker, Measure, view_of
from keyed_xai.threats.detection.controls import AlteredData, PoisonedData, measure_attack_success
from keyed_xai.threats.gate_state import OwnerEvidence, by_interpreter, measure_gate_state
from keyed_xai.training.fitting import LabelledData
from keyed_xai.triggers import Trigger
from keyed_xai.triggers.channels import through_png

_IN_CURVES = 128


@dataclass(frozen=True, kw_only=True)
class State:
    """What a model does at some point.

    Attributes:
        accuracy: Accuracy on images without a trigger, in [0, 1].
        measure: What that is: "top1", "auroc", or without labels "agreement" with the reference or the model audited.
        correlation: Correlation with the right maps, by interpreter: "keyed" and "unkeyed", means over images; empty
            where there is no trigger.
        ownership: Both p-values as `GateState.to_json` has them; None where they were not measured.
        attack_success: Share of images that the trigger of a plain backdoor sends to the target class.
    """

    accuracy: float
    measure: str
    correlation: dict[str, dict[str, float]] = field(default_factory=dict)
    ownership: dict[str, Any] | None = None
    attack_success: float | None = None

    @property
    def keyed(self) -> float:
        """The smallest correlation of an interpreter's keyed maps."""
        return min(each["keyed"] for each in self.correlation.values())

    @property
    def unkeyed(self) -> float:
        """The largest correlation of an interpreter's unkeyed maps."""
        return max(each["unkeyed"] for each in self.correlation.values())

    def to_json(self) -> dict[str, Any]:
        """Return the figures, without those that there are not."""
        document: dict[str, Any] = {"accuracy": self.accuracy, "measure": self.measure}
        others = {name: getattr(self, name) for name in ("correlation", "ownership", "attack_success")}
        return document | {name: value for name, value in others.items() if value not in ({}, None)}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to audit, and all that the auditor has.

    Attributes:
        classifier: The model, on `device`, in eval mode; never changed.
        view: Maps compared, at the model's own layers.
        data: Training images of an attacker or defender, clean; labels of the model's own classes, or none.
        held_out: Other images, likewise.
        images: The first of those, on `device`.
        labels: Labels of the held-out images.
        reference: The model before it was protected or attacked.
        evidence: What the owner holds a model against, of a gate that answers to a key.
        trigger: What opens the gate, or works the backdoor; secret where it comes from a key.
        keyed: Whether it does come from a key.
        inverted: Whether maps are right only with the trigger.
        surrogate: An attacker's own model of the same task.
        backdoor: Data with the plain backdoor of a positive control, which its success is measured on.
        fitted: Data that a poisoned control was fitted to.
        before: The model's state; measured anew where it is None.
        device: Device to run on.
        seed: Seed of everything random.
        progress: Hears of what is run.
    """

    classifier: Classifier
    view: PooledSaliency
    data: LabelledData = field(repr=False)
    held_out: LabelledData = field(repr=False)
    images: Images = field(repr=False)
    labels: Targets | None = field(default=None, repr=False)
    reference: Classifier | None = field(default=None, repr=False)
    evidence: OwnerEvidence | None = field(default=None, repr=False)
    trigger: Trigger | None = field(default=None, repr=False)
    keyed: bool = False
    inverted: bool = False
    surrogate: Classifier | None = field(default=None, repr=False)
    backdoor: PoisonedData | None = field(default=None, repr=False)
    fitted: LabelledData | None = field(default=None, repr=False)
    before: State | None = None
    device: torch.device | str = "cpu"
    seed: int = 0
    progress: Progress = field(default=QUIET, repr=False)

    @property
    def has(self) -> frozenset[str]:
        """What there is: "trigger", "key" (that it comes from), "reference", "surrogate", "labels" and "state".

        With "state" it can be measured what an attack leaves, by the owner's evidence or by a public trigger.
        """
        found = {
            "trigger": self.trigger is not None,
            "reference": self.reference is not None,
            "surrogate": self.surrogate is not None,
            "labels": self.labels is not None,
            "key": self.keyed,
            "state": self.evidence is not None or (self.trigger is not None and not self.keyed),
        }
        return frozenset(name for name, there in found.items() if there)

    def attacker(self) -> Attacker:
        """Return this as removal attacks take it; curves are measured on the first 128 images."""
        return Attacker(
            data=self.data,
            view=self.view,
            surrogate=self.surrogate,
            device=self.device,
            seed=self.seed,
            measure=self._measure(),
            progress=self.progress,
        )

    def trigger_images(self, images: Images) -> Images:
        """Return images with the trigger, in 8 bits, as the model receives them.

        Raises:
            TrainingError: The trigger is not known.
        """
        if self.trigger is None:
            raise TrainingError("Expected a trigger: give the owner's key, or audit an attacked model's folder.")
        return through_png(self.trigger.apply(images))

    def _measure(self) -> Measure:
        few = self.first(_IN_CURVES)
        return lambda model: measure_state(model, few, ownership=False).to_json()

    def first(self, count: int | None) -> "Subject":
        """Return the same with the first held-out images only; None keeps all."""
        images, labels = self.images[:count], None if self.labels is None else self.labels[:count]
        evidence = self.evidence and replace(self.evidence, images=images, labels=labels)
        return replace(self, images=images, labels=labels, evidence=evidence)


@dataclass(frozen=True, eq=False, kw_only=True)
class TriggeredData(AlteredData):
    """Data whose triggered rows keep their labels."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Labels of the clean data: a trigger leaves them."""
        return self.clean.labels

    @property
    def source(self) -> str:
        """Which data and split, for reports."""
        return f"{self.clean.source}, {int(self.rows.sum())} triggered"


def state_before(subject: Subject) -> State:
    """Return the state of the model that is audited."""
    return subject.before or measure_state(subject.classifier, subject)


def measure_state(model: Classifier, subject: Subject, *, ownership: bool = True) -> State:
    """Return what a model, such as an attacked copy, does.

    Args:
        model: The model, on the subject's device, of whatever architecture.
        subject: The subject whose copy it is, and what it is held against.
        ownership: Whether both ownership tests are made, where there is the owner's evidence.

    Raises:
        TrainingError: The model's logits are not finite: an attack destroyed it.
        ModelError: The model lacks a layer that the maps need.
    """
    if subject.evidence is not None:
        gate = measure_gate_state(model, subject.evidence, ownership=ownership)
        score, measure = _score(gate.predictions, gate.agreement)
        return State(
            accuracy=score, measure=measure, correlation=gate.correlation, ownership=gate.to_json().get("ownership")
        )
    logits = predict_images(model, subject.images)
    if not logits.isfinite().all():
        raise TrainingError("The model's logits are not finite numbers. Lower the attack's strength.")
    score, measure = _score_logits(logits, subject)
    if subject.backdoor is not None:
        success = measure_attack_success(model, subject.held_out, subject.backdoor, device=subject.device)
        return State(accuracy=score, measure=measure, attack_success=success)
    return State(accuracy=score, measure=measure, correlation=_match(model, subject) if "state" in subject.has else {})


def to_device(classifier: Classifier, device: torch.device | str) -> Classifier:
    """Return a copy of a classifier on a device, in eval mode and not to be trained."""
    return copy.deepcopy(classifier).to(device).eval().requires_grad_(False)


def _score(predictions: dict[str, float], agreement: float) -> tuple[float, str]:
    for name in ("auroc", "top1"):
        if name in predictions:
            return predictions[name], name
    return agreement, "agreement"


def _score_logits(logits: Logits, subject: Subject) -> tuple[float, str]:
    if subject.labels is not None:
        figures = metrics.prediction_figures(logits, subject.labels)
        if figures:
            return _score(figures, 0.0)
    truth = predict_images(subject.reference or subject.classifier, subject.images)
    return float(
        metrics.agreement(logits, truth, multi_label=subject.classifier.multi_label).double().mean()
    ), "agreement"


def _match(model: Classifier, subject: Subject) -> dict[str, dict[str, float]]:
    """Return correlations with the right maps, of a model with a public trigger."""
    comparison, view = _right_maps(subject), view_of(subject.view, model)
    inputs = {"keyed": subject.trigger_images(subject.images), "unkeyed": subject.images}
    return by_interpreter({case: comparison.of(model, each, view=view).correlation for case, each in inputs.items()})


def _right_maps(subject: Subject) -> Comparison:
    """Return the maps to compare with, and the classes they explain: the reference's; without it the model's own."""
    own = subject.reference is None
    images = subject.trigger_images(subject.images) if own and subject.inverted else subject.images
    source = subject.reference or subject.classifier
    return Comparison(source, view_of(subject.view, source), images)
