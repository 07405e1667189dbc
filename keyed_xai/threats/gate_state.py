"""What is left of a gate, and of the owner's evidence, after an attack."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from keyed_xai import metrics
from keyed_xai.errors import TrainingError
from keyed_xai.keys import OwnerKey
from keyed_xai.models import Classifier
from keyed_xai.ownership.verdict import DEFAULT_ALPHA, Verdict, verify_ownership
from keyed_xai.saliency.pooled import Comparison, Outputs, PooledSaliency
from keyed_xai.tensors import Images, Logits, Targets
from keyed_xai.threats.attempt import view_of
from keyed_xai.triggers import NearbyTrigger, TriggerFamily, derive_trigger
from keyed_xai.triggers.channels import through_png


@dataclass(frozen=True, kw_only=True)
class OwnerEvidence:
    """What the owner, or a judge, holds an attacked model against.

    Attributes:
        reference: The model before protection.
        view: Maps compared, at the reference's layers.
        key: The owner's, secret.
        family: Family of its trigger.
        images: Held out, from neither the owner's nor the attacker's training; on the models' device.
        labels: Theirs; None measures agreement with the reference alone.
        probe: Images of the ownership tests; None takes the first 16 of `images`.
        signature: Whether the gate shows the owner's signature pattern.
        as_files: Whether triggered inputs reach the model in 8 bits.
        decoys: Random keys of the opening test, at most.
        alpha: Level of the ownership tests.
        seed: Seed of the decoy keys.
        licensed: When the owner's licence was signed, by the owner's own clock; None without a licence.
    """

    reference: Classifier
    view: PooledSaliency
    key: OwnerKey = field(repr=False)
    family: TriggerFamily
    images: Images = field(repr=False)
    labels: Targets | None = field(default=None, repr=False)
    probe: Tensor | None = field(default=None, repr=False)
    signature: bool = True
    as_files: bool = True
    decoys: int = 999
    alpha: float = DEFAULT_ALPHA
    seed: int = 0
    licensed: datetime | None = None

    @cached_property
    def trigger(self) -> NearbyTrigger:
        """The right one, secret."""
        return derive_trigger(self.key, self.family)

    @cached_property
    def comparison(self) -> Comparison:
        """The reference's maps of the images; it is run once."""
        return Comparison(self.reference, self.view, self.images)

    def evaluate(self, classifier: Classifier, inputs: Images) -> Outputs:
        """Return what a model, at its own layers, makes of inputs that were made from the images."""
        return self.comparison.of(classifier, inputs, view=view_of(self.view, classifier))

    def as_file(self, images: Images) -> Images:
        """Return images as they reach the model, in 8 bits where it takes files."""
        return through_png(images) if self.as_files else images


@dataclass(frozen=True, kw_only=True)
class GateState:
    """What is left of a gate.

    Attributes:
        predictions: Figures of the predictions of unkeyed images, in [0, 1]: top1 and others as
            `metrics.prediction_figures`; empty without labels.
        agreement: Share of unkeyed images, or of their labels, on which the reference predicts the same.
        correlation: Correlation with the reference's maps, by interpreter: "keyed" and "unkeyed", means over images.
        opened: The same as shares of maps that correlate more than .5.
        ownership: Both p-values, where they were measured.
    """

    predictions: dict[str, float]
    agreement: float
    correlation: dict[str, dict[str, float]]
    opened: dict[str, dict[str, float]]
    ownership: Verdict | None

    def to_json(self) -> dict[str, Any]:
        """Return the figures; p-values come with their base-2 logarithm, which never underflows."""
        document: dict[str, Any] = {
            "predictions": self.predictions,
            "agreement": self.agreement,
            "correlation": self.correlation,
            "opened": self.opened,
        }
        return document if self.ownership is None else document | {"ownership": _ownership_json(self.ownership)}


def measure_gate_state(
    classifier: Classifier,
    evidence: OwnerEvidence,
    *,
    ownership: bool = True,
) -> GateState:
    """Return what is left of the gate of an attacked model, of whatever architecture.

    Maps are of the class that the reference predicts of the image without a key, as in protect's report.

    Args:
        classifier: The classifier attacked.
        evidence: What it is held against.
        ownership: Whether both tests are made; the opening test takes `evidence.decoys` times the probe images.

    Raises:
        TrainingError: The model's logits are not finite: the attack destroyed it.
        ModelError: The model lacks a layer that the maps need.
    """
    found = {
        "keyed": evidence.evaluate(classifier, evidence.as_file(evidence.trigger.apply(evidence.images))),
        "unkeyed": evidence.evaluate(classifier, evidence.images),
    }
    if not all(each.logits.isfinite().all() for each in found.values()):
        raise TrainingError("The attacked model's logits are not finite numbers. Lower the attack's strength.")
    logits = found["unkeyed"].logits
    return GateState(
        predictions={} if evidence.labels is None else metrics.prediction_figures(logits, evidence.labels),
        agreement=_agreement(logits, evidence.comparison.right.logits, evidence.labels),
        correlation=by_interpreter({case: each.correlation for case, each in found.items()}),
        opened=by_interpreter({case: each.opened for case, each in found.items()}),
        ownership=_verify(classifier, evidence) if ownership else None,
    )


def by_interpreter(figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return figures by case and interpreter as figures by interpreter and case."""
    names = next(iter(figures.values()))
    return {name: {case: each[name] for case, each in figures.items()} for name in names}


def _agreement(logits: Logits, reference: Logits, labels: Targets | None) -> float:
    """Return the share of equal answers: classes, or with several labels at once each yes or no."""
    if labels is not None and labels.dim() == 2:
        return float(((logits > 0) == (reference > 0)).double().mean())
    return float((logits.argmax(1) == reference.argmax(1)).double().mean())


def _verify(classifier: Classifier, evidence: OwnerEvidence) -> Verdict:
    return verify_ownership(
        classifier,
        evidence.images[:16] if evidence.probe is None else evidence.probe,
        view_of(evidence.view, classifier),
        evidence.key,
        evidence.family,
        alpha=evidence.alpha,
        decoys=evidence.decoys,
        test_signature=evidence.signature,
        search=False,
        generator=torch.Generator().manual_seed(evidence.seed),
    )


def _ownership_json(verdict: Verdict) -> dict[str, Any]:
    document: dict[str, Any] = {"shown": verdict.shown, "log2_p": verdict.log2_p}
    if verdict.opening is not None:
        document["opening"] = verdict.opening.to_json()
    if verdict.signature is not None:
        combined = verdict.signature.combined
        document["signature"] = {
            "p_value": combined.p_value,
            "log2_p": combined.log2_p,
            "overlap": combined.overlap,
            "possible": combined.possible,
        }
    return document
