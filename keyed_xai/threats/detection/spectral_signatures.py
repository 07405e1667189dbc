"""Spectral Signatures: poisoned rows stand out along the top singular vector of their class's representations.

Source: Tran, Li and Madry 2018, algorithm 1. Of each class (by label) the last hidden features are centred, and a
row's score is the square of its projection on their top right singular vector. Rows above the 85th percentile of their
class are removed: one and a half times the 10 % that the attacker is taken to have poisoned. The paper then fits a new
network to the rest, which we leave to the caller. A share of every class is always removed, so that removal by itself
says nothing: what counts is how many of the poisoned rows are among those removed.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from keyed_xai import metrics
from keyed_xai.threats.detection.features import Features, labels_or_predictions, read_hidden_of_data, rows_by_class
from keyed_xai.training.fitting import LabelledData


@dataclass(frozen=True)
class SpectralSettings:
    """How much is removed.

    Attributes:
        percentile: Rows of a class whose score is above this percentile of its scores are removed.
    """

    percentile: float = 85.0

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile: expected 0 to 100, got {self.percentile}")


@dataclass(frozen=True, kw_only=True)
class ClassSpectrum:
    """What was found in one class.

    Attributes:
        label: Number of the class.
        rows: Number of the class's rows.
        removed: How many of them were.
        poisoned: How many are poisoned.
        poisoned_removed: How many are both.
        auc: Area under the ROC curve for telling poisoned rows by their score; None where all rows, or none, are.
    """

    label: int
    rows: int
    removed: int
    poisoned: int
    poisoned_removed: int
    auc: float | None


@dataclass(frozen=True, kw_only=True)
class SpectralResult:
    """What was found, and removed, in all classes.

    Attributes:
        settings: The settings it was made with.
        classes: Those with rows.
        removed: bool [n]; with several labels at once a row is removed when it is in any of its classes.
        poisoned: bool [n], as given; None where it is not known.
    """

    settings: SpectralSettings
    classes: tuple[ClassSpectrum, ...]
    removed: NDArray[np.bool_] = field(repr=False)
    poisoned: NDArray[np.bool_] | None = field(repr=False)

    @property
    def removed_share(self) -> float:
        """Share of all rows removed."""
        return float(self.removed.mean())

    @property
    def poisoned_removed_share(self) -> float | None:
        """Share of the poisoned rows removed; by chance it is the share of all rows. None where there are none."""
        if self.poisoned is None or not self.poisoned.any():
            return None
        return float(self.removed[self.poisoned].mean())

    def to_json(self) -> dict[str, Any]:
        """Return the figures and settings, ready for JSON."""
        return {
            "settings": asdict(self.settings),
            "rows": len(self.removed),
            "removed_share": self.removed_share,
            "poisoned": None if self.poisoned is None else int(self.poisoned.sum()),
            "poisoned_removed_share": self.poisoned_removed_share,
            "classes": [asdict(each) for each in self.classes],
        }


def find_spectral_outliers(
    model: nn.Module,
    data: LabelledData,
    settings: SpectralSettings | None = None,
    *,
    poisoned: NDArray[np.bool_] | None = None,
    device: torch.device | str = "cpu",
) -> SpectralResult:
    """Return which rows of the data that a model was fitted to the defence removes.

    Args:
        model: Pixels to logits, in eval mode, on `device`.
        data: The data, with the labels it was fitted to; without labels the predicted class counts.
        settings: How much is removed.
        poisoned: bool [n], which rows have a trigger, where that is known.
        device: Where to run the model.

    Raises:
        TrainingError: There are no rows.
        ModelError: The model has no linear layer.
        ValueError: `poisoned` does not have one entry for each row.
    """
    settings = settings or SpectralSettings()
    if poisoned is not None and poisoned.shape != (len(data),):
        raise ValueError(f"Expected poisoned of shape {(len(data),)}, got {poisoned.shape}.")
    hidden = read_hidden_of_data(model, data, device=device)
    removed, classes = np.zeros(len(data), np.bool_), []
    for label, rows in enumerate(rows_by_class(labels_or_predictions(data, hidden), hidden.logits.shape[1])):
        if len(rows):
            scores = spectral_scores(hidden.features[rows]).numpy()
            out = scores > np.percentile(scores, settings.percentile)
            removed[rows[out]] = True
            known = np.zeros(len(rows), np.bool_) if poisoned is None else poisoned[rows]
            classes.append(_describe(label, scores, out, known))
    return SpectralResult(settings=settings, classes=tuple(classes), removed=removed, poisoned=poisoned)


def spectral_scores(features: Features) -> Tensor:
    """Return each row's squared projection, after centring, on the top right singular vector: float64 [n]."""
    centred = features.double() - features.double().mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    scores: Tensor = (centred @ directions[0]).square()
    return scores


def _describe(
    label: int, scores: NDArray[np.float64], removed: NDArray[np.bool_], poisoned: NDArray[np.bool_]
) -> ClassSpectrum:
    auc = None
    if poisoned.any() and not poisoned.all():
        auc = metrics.separation_auc(torch.from_numpy(scores[~poisoned]), torch.from_numpy(scores[poisoned]))
    return ClassSpectrum(
        label=label,
        rows=len(scores),
        removed=int(removed.sum()),
        poisoned=int(poisoned.sum()),
        poisoned_removed=int((removed & poisoned).sum()),
        auc=auc,
    )
