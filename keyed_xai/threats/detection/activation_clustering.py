"""Activation Clustering: the last hidden layer's features fall into two clusters where some inputs have a trigger.

Source: Chen, Carvalho, Baracaldo, Ludwig, Edwards, Lee, Molloy and Srivastava 2018. Features are reduced to 10
dimensions (independent components; the paper found them better than principal ones) and parted by 2-means.

Two questions are asked of the clusters. *Of known pairs* of clean and triggered inputs, as Fang & Choromanska (AAAI
2022) do with 320 pairs: how many inputs are in the wrong cluster? Under 5 % the two are separable, over 30 % they
overlap. Clusters of all classes together tend to be groups of classes, which says little about triggers, so we part the
pairs of each class by itself too: the stronger test. *Of training data*, one class (by label) at a time and without
knowing which rows are poisoned, as Chen et al. do: does a clearly separate, small cluster stand out? The paper's
costliest analysis, fitting a new network to one of the clusters ("exclusionary reclassification"), is not done.

Measured on small networks fitted to 3,000 images of Fashion-MNIST, with noise (`controls`), one run each. Pairs of a
badnets control, within classes: after "pca" 0 % or 1 % misclustered (without or with shifted images), after "ica" 29 %
and 18 %, so that "pca" is the one for pairs. Its training data: after "ica" the target stood out both times, once alone
and once beside another class; after "pca" beside two others. Networks fitted without noise gave the check of training
data away: classes of a clean one were suspicious, and a blended backdoor's target was not. It is weak evidence alone.
Of our own forward-attacked and protected networks (8 and 4), every one is separable by pairs after "pca".
"""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from keyed_xai.tensors import Images
from keyed_xai.threats.detection.features import (
    Features,
    labels_or_predictions,
    read_hidden,
    read_hidden_of_data,
    rows_by_class,
)
from keyed_xai.training.fitting import LabelledData

REDUCTIONS = ("ica", "pca")
SEPARABLE = 0.05
OVERLAPPING = 0.3
"""The bands of Fang & Choromanska: misclustering rates under the first and over the second."""
_LEAST_SPREAD = 1e-6  # of the largest singular value; what is below is rounding, which whitening would blow up
_ICA_STEPS = 1000
_ICA_TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class ClusteringSettings:
    """How features are parted, and when a cluster of training data is suspicious.

    Attributes:
        reduction: "ica" (FastICA) or "pca".
        dimensions: Dimensions after reduction.
        restarts: Starts of 2-means; the best is taken. After "ica" 10 can miss the best split: all variances are equal.
        silhouette: Chen et al. hold a threshold between .10 and .15 for reasonable.
        small: A smaller cluster with less than this share of a class is small; .35 in the authors' own code, ART.
        silhouette_rows: The silhouette is the mean over at most so many rows, drawn at random.
        seed: Seed of the reduction, the starts of 2-means and the rows.
    """

    reduction: str = "ica"
    dimensions: int = 10
    restarts: int = 100
    silhouette: float = 0.15
    small: float = 0.35
    silhouette_rows: int = 5000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {self.reduction!r}")
        for name, least in (("dimensions", 1), ("restarts", 1), ("silhouette_rows", 3)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Misclustering:
    """How badly two clusters tell clean from triggered inputs.

    Attributes:
        pairs: Number of pairs of a clean and a triggered input.
        rate: Share of inputs in the wrong one of two clusters, in [0, .5], named so that most are in the right one.
    """

    pairs: int
    rate: float

    @property
    def band(self) -> str:
        """Name of the band: "separable", "in between" or "overlapping"."""
        if self.rate < SEPARABLE:
            return "separable"
        return "overlapping" if self.rate > OVERLAPPING else "in between"

    def to_json(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return asdict(self) | {"band": self.band}


@dataclass(frozen=True)
class PairsResult:
    """Whether clean and triggered inputs are apart in the last hidden layer.

    Attributes:
        settings: The settings it was made with.
        together: Over all pairs at once, as Fang & Choromanska.
        by_class: Results by the class that the model predicts of the clean input; classes with fewer pairs than
            dimensions are left out.
    """

    settings: ClusteringSettings
    together: Misclustering
    by_class: dict[int, Misclustering]

    @property
    def within_classes(self) -> Misclustering | None:
        """All classes clustered one by one; None where each has too few pairs."""
        pairs = sum(each.pairs for each in self.by_class.values())
        wrong = sum(each.rate * each.pairs for each in self.by_class.values())
        return Misclustering(pairs, wrong / pairs) if pairs else None

    def to_json(self) -> dict[str, Any]:
        """Return the figures and settings, ready for JSON."""
        within = self.within_classes
        return {
            "settings": asdict(self.settings),
            "together": self.together.to_json(),
            "within_classes": None if within is None else within.to_json(),
            "by_class": {str(label): each.to_json() for label, each in self.by_class.items()},
        }


@dataclass(frozen=True, kw_only=True)
class ClassClusters:
    """The two clusters of one class's training data.

    Attributes:
        label: Label of the class.
        rows: Number of rows.
        silhouette: Mean over the rows, in [-1, 1]; high where the clusters are compact and apart.
        smaller_share: Share of the rows in the smaller cluster, at most .5.
        suspicious: Whether the silhouette is above its threshold and the smaller cluster is small.
    """

    label: int
    rows: int
    silhouette: float
    smaller_share: float
    suspicious: bool


@dataclass(frozen=True)
class ClusteringResult:
    """What clustering says of training data.

    Attributes:
        settings: The settings it was made with.
        classes: Those with more rows than dimensions and features that differ at all; nothing can be said of others.
    """

    settings: ClusteringSettings
    classes: tuple[ClassClusters, ...]

    @property
    def suspicious(self) -> tuple[int, ...]:
        """Labels of the suspicious classes."""
        return tuple(each.label for each in self.classes if each.suspicious)

    def to_json(self) -> dict[str, Any]:
        """Return the figures and settings, ready for JSON."""
        return {
            "settings": asdict(self.settings),
            "suspicious": list(self.suspicious),
            "classes": [asdict(each) for each in self.classes],
        }


def cluster_pairs(
    model: nn.Module,
    clean: Images,
    triggered: Images,
    settings: ClusteringSettings | None = None,
    *,
    device: torch.device | str = "cpu",
) -> PairsResult:
    """Return how well two clusters tell clean inputs from the same inputs with a trigger.

    Args:
        model: Pixels to logits, in eval mode, on `device`.
        clean: At least two images.
        triggered: The same in the same order with the trigger.
        settings: How to cluster.
        device: Where to run the model.

    Raises:
        ValueError: The two differ in shape, or there are fewer than two pairs.
        ModelError: The model has no linear layer.
    """
    settings = settings or ClusteringSettings()
    if clean.shape != triggered.shape or len(clean) < 2:
        raise ValueError(f"Expected 2 or more pairs, got {list(clean.shape)} and {list(triggered.shape)}.")
    plain, changed = (read_hidden(model, images, device=device) for images in (clean, triggered))
    rows_of = rows_by_class(plain.logits.argmax(1).numpy(), plain.logits.shape[1])
    by_class = {
        label: measure_misclustering(plain.features[rows], changed.features[rows], settings)
        for label, rows in enumerate(rows_of)
        if len(rows) >= max(2, settings.dimensions)
    }
    return PairsResult(settings, measure_misclustering(plain.features, changed.features, settings), by_class)


def cluster_training_data(
    model: nn.Module,
    data: LabelledData,
    settings: ClusteringSettings | None = None,
    *,
    device: torch.device | str = "cpu",
) -> ClusteringResult:
    """Return how separate, and how unequal, the two clusters of each class are in the data a model was fitted to.

    Args:
        model: Pixels to logits, in eval mode, on `device`.
        data: The data, with the labels it was fitted to; without labels the predicted class counts.
        settings: How to cluster, and what is suspicious.
        device: Where to run the model.

    Raises:
        TrainingError: There are no rows.
        ModelError: The model has no linear layer.
    """
    settings = settings or ClusteringSettings()
    hidden = read_hidden_of_data(model, data, device=device)
    rows_of = rows_by_class(labels_or_predictions(data, hidden), hidden.logits.shape[1])
    found = (_describe(label, hidden.features[rows], settings) for label, rows in enumerate(rows_of))
    return ClusteringResult(settings, tuple(each for each in found if each is not None))


def measure_misclustering(clean: Features, triggered: Features, settings: ClusteringSettings) -> Misclustering:
    """Return how well two clusters tell clean from triggered features; where all are equal half are misclustered."""
    reduced = reduce_features(torch.cat([clean, triggered]), settings)
    if reduced is None:
        return Misclustering(len(clean), 0.5)
    second = _part(reduced, settings)
    truth = np.arange(len(second)) >= len(clean)
    wrong = float((second != truth).mean())
    return Misclustering(len(clean), min(wrong, 1 - wrong))


def reduce_features(features: Features, settings: ClusteringSettings) -> NDArray[np.float64] | None:
    """Return features in at most `settings.dimensions` dimensions, [n, d]; None where all rows are equal.

    Independent components have unit variance; principal ones keep theirs. Where FastICA has not settled after 1,000
    steps, as on features that are all but Gaussian, its last state is taken.
    """
    from sklearn.decomposition import PCA, FastICA
    from sklearn.exceptions import ConvergenceWarning

    rows = features.double().numpy()
    spread = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    rank = int((spread > _LEAST_SPREAD * max(spread[0], np.abs(rows).max(), np.finfo(np.float64).tiny)).sum())
    dimensions = min(settings.dimensions, rank)
    if not dimensions:
        return None
    if settings.reduction == "pca":
        components: NDArray[np.float64] = PCA(dimensions, random_state=settings.seed).fit_transform(rows)
        return components
    ica = FastICA(
        dimensions, whiten="unit-variance", max_iter=_ICA_STEPS, tol=_ICA_TOLERANCE, random_state=settings.seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        components = ica.fit_transform(rows)
    return components


def _part(reduced: NDArray[np.float64], settings: ClusteringSettings) -> NDArray[np.bool_]:
    """Return which rows are in the second of two clusters, [n]."""
    from sklearn.cluster import KMeans

    means = KMeans(2, n_init=settings.restarts, random_state=settings.seed)
    second: NDArray[np.bool_] = means.fit_predict(reduced) == 1
    return second


def _describe(label: int, features: Features, settings: ClusteringSettings) -> ClassClusters | None:
    from sklearn.metrics import silhouette_score

    if len(features) <= max(2, settings.dimensions):
        return None
    reduced = reduce_features(features, settings)
    if reduced is None:
        return None
    second = _part(reduced, settings)
    share = float(min(second.mean(), 1 - second.mean()))
    sampled = _draw_rows(second, settings)
    silhouette = float(silhouette_score(reduced[sampled], second[sampled]))
    suspicious = silhouette > settings.silhouette and share < settings.small
    return ClassClusters(
        label=label, rows=len(second), silhouette=silhouette, smaller_share=share, suspicious=suspicious
    )


def _draw_rows(second: NDArray[np.bool_], settings: ClusteringSettings) -> NDArray[np.int64]:
    """Return the rows whose silhouette is taken, one of each cluster among them."""
    rows = np.random.default_rng(settings.seed).permutation(len(second))
    firsts = np.array([rows[np.argmax(second[rows] == cluster)] for cluster in (False, True)])
    return np.concatenate([firsts, rows[~np.isin(rows, firsts)]])[: settings.silhouette_rows]
