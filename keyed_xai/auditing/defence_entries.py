"""Backdoor defences as entries of an audit."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyed_xai.auditing.entries import Entry, Examination, Observation, Outcome
from keyed_xai.auditing.subject import Subject, TriggeredData
from keyed_xai.errors import TrainingError
from keyed_xai.reporting.names import name_class
from keyed_xai.threats.detection.activation_clustering import (
    OVERLAPPING,
    SEPARABLE,
    ClusteringSettings,
    cluster_pairs,
    cluster_training_data,
)
from keyed_xai.threats.detection.neural_cleanse import LARGEST_INDEX, CleanseSettings, cleanse
from keyed_xai.threats.detection.spectral_signatures import SpectralSettings, find_spectral_outliers
from keyed_xai.training.fitting import LabelledData


@dataclass(frozen=True, kw_only=True)
class _Signatures:
    """How Spectral Signatures are put to the test.

    Attributes:
        search: Their own settings.
        triggered: Share of clean training images that are given the trigger.
        clearly: Share of the triggered images that must stand out to be noticed.
        hardly: Share that goes unnoticed.
    """

    search: SpectralSettings = field(default_factory=SpectralSettings)
    triggered: float = 0.1
    clearly: float = 0.5
    hardly: float = 0.3


def _neural_cleanse(subject: Subject, settings: CleanseSettings) -> Observation:
    result = cleanse(
        subject.classifier,
        subject.data,
        settings,
        device=subject.device,
        progress=subject.progress,
    )
    if not result.conclusive:
        return Observation(outcome="not applicable", sentence="Of fewer than three classes none can be an outlier.")
    names = subject.classifier.label_names or subject.data.classes
    flagged = ", ".join(name_class(index, names) for index in result.flagged)
    found = f"{flagged} stands out" if flagged else "no class stands out"
    sentence = (
        f"Anomaly index {result.anomaly_index:.2f}, where {LARGEST_INDEX:g} is suspicious: {found} by a small patch."
    )
    return Observation(outcome="flagged" if flagged else "left alone", sentence=sentence, figures=result.to_json())


def _cluster_pairs(subject: Subject, settings: ClusteringSettings) -> Observation:
    triggered = subject.trigger_images(subject.images)
    result = cluster_pairs(subject.classifier, subject.images, triggered, settings, device=subject.device)
    found = result.within_classes or result.together
    outcomes: dict[str, Outcome] = {"separable": "flagged", "in between": "unclear", "overlapping": "left alone"}
    sentence = (
        f"Two clusters mistake {100 * found.rate:.1f} % of {found.pairs} clean and as many triggered images for the "
        f"other kind (separable under {100 * SEPARABLE:g} %, overlapping over {100 * OVERLAPPING:g} %): {found.band}."
    )
    return Observation(outcome=outcomes[found.band], sentence=sentence, figures=result.to_json())


def _cluster_data(subject: Subject, settings: ClusteringSettings) -> Observation:
    data = subject.fitted or subject.data
    result = cluster_training_data(subject.classifier, data, settings, device=subject.device)
    if not result.classes:
        return Observation(
            outcome="not applicable", sentence="No class has more images than there are dimensions to cluster in."
        )
    suspicious, classes = len(result.suspicious), len(result.classes)
    sentence = f"{suspicious} of {classes} classes have a small cluster that stands apart."
    return Observation(outcome="flagged" if suspicious else "left alone", sentence=sentence, figures=result.to_json())


def _spectral_signatures(subject: Subject, settings: _Signatures) -> Observation:
    data, rows = _with_triggered_rows(subject, settings.triggered)
    result = find_spectral_outliers(subject.classifier, data, settings.search, poisoned=rows, device=subject.device)
    found, share = result.poisoned_removed_share or 0.0, result.removed_share
    sentence = f"Of the triggered images {100 * found:.1f} % are among the {100 * share:.1f} % of all that stand out."
    outcome: Outcome = (
        "flagged" if found >= settings.clearly else "left alone" if found <= settings.hardly else "unclear"
    )
    return Observation(outcome=outcome, sentence=sentence, figures=result.to_json())


def _with_triggered_rows(subject: Subject, share: float) -> tuple[LabelledData, NDArray[np.bool_]]:
    """Return data as a control was fitted to them, else a share of them with the trigger; and which rows have it."""
    if subject.fitted is not None and subject.backdoor is not None:
        return subject.fitted, subject.backdoor.rows
    if subject.trigger is None:
        raise TrainingError("Expected a trigger: give the owner's key, or audit an attacked model's folder.")
    rows = np.zeros(len(subject.data), np.bool_)
    rows[np.random.default_rng(subject.seed).permutation(len(rows))[: round(share * len(rows))]] = True
    return TriggeredData(clean=subject.data, rows=rows, trigger=subject.trigger), rows


def _describe(settings: ClusteringSettings) -> str:
    return f"{settings.dimensions} {_COMPONENTS[settings.reduction]} components, 2-means in each class"


_COMPONENTS = {"ica": "independent", "pca": "principal"}

DEFENCES: dict[str, Entry[Any]] = {
    "neural-cleanse": Examination(
        title="Neural Cleanse",
        threat="T17",
        group="defences",
        settings=CleanseSettings(),
        words=lambda s: f"smallest patch for every class, up to {s.rounds} rounds, index over {LARGEST_INDEX:g}",
        examine=_neural_cleanse,
        bounds=(LARGEST_INDEX,),
        slow=True,
        controlled=True,
    ),
    "activation-clustering": Examination(
        title="Activation Clustering of known pairs",
        threat="T17",
        group="defences",
        settings=ClusteringSettings(reduction="pca"),
        words=lambda s: f"trigger known; {_describe(s)}, clean and triggered images",
        examine=_cluster_pairs,
        images=320,
        bounds=(SEPARABLE, OVERLAPPING),
        needs=frozenset({"trigger"}),
        controlled=True,
    ),
    "activation-clusters": Examination(
        title="Activation Clustering of training data",
        threat="T17",
        group="defences",
        settings=ClusteringSettings(),
        words=lambda s: f"{_describe(s)}, silhouette over {s.silhouette:g} and under {s.small:.0%} of the class",
        examine=_cluster_data,
        controlled=True,
    ),
    "spectral-signatures": Examination(
        title="Spectral Signatures",
        threat="T17",
        group="defences",
        settings=_Signatures(),
        words=lambda s: (
            f"trigger known; {s.triggered:.0%} of the images triggered, those above the "
            f"{s.search.percentile:g}th percentile of a class"
        ),
        examine=_spectral_signatures,
        needs=frozenset({"trigger"}),
        controlled=True,
    ),
}
"""Name to entry; fine-pruning and denoising, which change the model or its inputs, are among the removal attacks."""
