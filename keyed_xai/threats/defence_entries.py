"""Backdoor defences as entries of an audit."""

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from keyed_xai.errors import TrainingError
from keyed_xai.fitting import LabelledData
from keyed_xai.names import name_class
from keyed_xai.threats.activation_clustering import ClusteringSettings, cluster_pairs, cluster_training_data
from keyed_xai.threats.entries import Entry, Observation, Outcome
from keyed_xai.threats.neural_cleanse import CleanseSettings, cleanse
from keyed_xai.threats.spectral_signatures import SpectralSettings, find_spectral_outliers
from keyed_xai.threats.subject import Subject, TriggeredData

_PAIRS = 320
_TRIGGERED_SHARE = 0.1
_CLEARLY, _HARDLY = 0.5, 0.3


def _neural_cleanse(subject: Subject, settings: CleanseSettings) -> Observation:
    result = cleanse(
        subject.classifier,
        subject.data,
        replace(settings, seed=subject.seed),
        multi_label=subject.multi_label,
        device=subject.device,
        on_step=subject.on_step,
    )
    if not result.conclusive:
        return Observation("not applicable", "Of fewer than three classes none can be an outlier.")
    names = subject.classifier.label_names or subject.data.classes
    flagged = ", ".join(name_class(index, names) for index in result.flagged)
    found = f"{flagged} stands out" if flagged else "no class stands out"
    sentence = f"Anomaly index {result.anomaly_index:.2f}, where 2 is suspicious: {found} by a small patch."
    return Observation("flagged" if flagged else "left alone", sentence, figures=result.to_json())


def _cluster_pairs(subject: Subject) -> Observation:
    images = subject.images[:_PAIRS]
    settings = ClusteringSettings(reduction="pca", seed=subject.seed)
    result = cluster_pairs(subject.classifier, images, subject.trigger_images(images), settings, device=subject.device)
    found = result.within_classes or result.together
    outcomes: dict[str, Outcome] = {"separable": "flagged", "in between": "unclear", "overlapping": "left alone"}
    sentence = (
        f"Two clusters mistake {100 * found.rate:.1f} % of {found.pairs} clean and as many triggered images for the "
        f"other kind (separable under 5 %, overlapping over 30 %): {found.band}."
    )
    return Observation(outcomes[found.band], sentence, figures=result.to_json())


def _cluster_data(subject: Subject) -> Observation:
    data = subject.fitted or subject.data
    result = cluster_training_data(
        subject.classifier, data, ClusteringSettings(seed=subject.seed), device=subject.device
    )
    if not result.classes:
        return Observation("not applicable", "No class has more images than there are dimensions to cluster in.")
    suspicious, classes = len(result.suspicious), len(result.classes)
    sentence = f"{suspicious} of {classes} classes have a small cluster that stands apart."
    return Observation("flagged" if suspicious else "left alone", sentence, figures=result.to_json())


def _spectral_signatures(subject: Subject) -> Observation:
    data, rows = _with_triggered_rows(subject)
    result = find_spectral_outliers(subject.classifier, data, SpectralSettings(), poisoned=rows, device=subject.device)
    found, share = result.poisoned_removed_share or 0.0, result.removed_share
    sentence = f"Of the triggered images {100 * found:.1f} % are among the {100 * share:.1f} % of all that stand out."
    outcome: Outcome = "flagged" if found >= _CLEARLY else "left alone" if found <= _HARDLY else "unclear"
    return Observation(outcome, sentence, figures=result.to_json())


def _with_triggered_rows(subject: Subject) -> tuple[LabelledData, NDArray[np.bool_]]:
    """Return data as a control was fitted to them, else a tenth of them with the trigger; and which rows have it."""
    if subject.fitted is not None and subject.backdoor is not None:
        return subject.fitted, subject.backdoor.rows
    if subject.trigger is None:
        raise TrainingError("Expected a trigger: give the owner's key, or audit an attacked model's folder.")
    rows = np.zeros(len(subject.data), np.bool_)
    rows[np.random.default_rng(subject.seed).permutation(len(rows))[: round(_TRIGGERED_SHARE * len(rows))]] = True
    return TriggeredData(subject.data, rows, subject.trigger), rows


_TRIGGER = frozenset({"trigger"})
DEFENCES: dict[str, Entry] = {
    "neural-cleanse": Entry(
        "defences",
        "T17",
        "Neural Cleanse",
        "smallest patch for every class, up to 60 rounds, index over 2",
        partial(_neural_cleanse, settings=CleanseSettings()),
        slow=True,
        controlled=True,
    ),
    "activation-clustering": Entry(
        "defences",
        "T17",
        "Activation Clustering of known pairs",
        "trigger known; 10 principal components, 2-means in each class, up to 320 clean and triggered images",
        _cluster_pairs,
        _TRIGGER,
        controlled=True,
    ),
    "activation-clusters": Entry(
        "defences",
        "T17",
        "Activation Clustering of training data",
        "10 independent components, 2-means in each class, silhouette over .15 and under 35 % of the class",
        _cluster_data,
        controlled=True,
    ),
    "spectral-signatures": Entry(
        "defences",
        "T17",
        "Spectral Signatures",
        "trigger known; a tenth of the images triggered, those above the 85th percentile of a class",
        _spectral_signatures,
        _TRIGGER,
        controlled=True,
    ),
}
"""Name to entry; fine-pruning and denoising, which change the model or its inputs, are among the removal attacks."""
