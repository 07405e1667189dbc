"""What every attempt to remove a gate starts from and gives back."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from keyed_xai.batches import batches
from keyed_xai.errors import TrainingError
from keyed_xai.models import Classifier
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.tensors import Logits
from keyed_xai.training import TrainingData

Measure = Callable[[Classifier], Mapping[str, Any]]
"""Measures a model in eval mode along an attack's way, and returns figures ready for JSON."""


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """What an attacker has, and what is watched.

    Attributes:
        data: Clean images; labels of the model's own classes, or none.
        view: Maps that T3 pulls at and a second key closes, at the attacked model's layers.
        surrogate: The attacker's own model of the same task, for T3.
        device: Device to run on.
        seed: Seed of everything random.
        measure: What goes into curves.
        progress: Hears of the attempt.
    """

    data: TrainingData = field(repr=False)
    view: PooledSaliency | None = None
    surrogate: Classifier | None = field(default=None, repr=False)
    device: torch.device | str = "cpu"
    seed: int = 0
    measure: Measure | None = field(default=None, repr=False)
    progress: Progress = field(default=QUIET, repr=False)


@dataclass(frozen=True, kw_only=True)
class RemovalResult:
    """An attacked copy of a model.

    Attributes:
        model: The model, in eval mode; the model attacked is left as it was.
        settings: How strong the attempt was.
        figures: What the attempt says of itself, such as how many weights it set to zero.
        curve: One row for each stage (epochs, shares or strengths): its number, and what was measured.
        seconds: Time spent, measuring left out.
    """

    model: Classifier
    settings: dict[str, Any]
    figures: dict[str, Any]
    curve: list[dict[str, Any]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return everything but the model."""
        return {"settings": self.settings, "figures": self.figures, "curve": self.curve, "seconds": self.seconds}


def copy_model(classifier: Classifier, device: torch.device | str) -> Classifier:
    """Return a copy in eval mode, all of whose weights can be trained."""
    return copy.deepcopy(classifier).to(device).eval().requires_grad_(True)


def draw_share(data: TrainingData, share: float, seed: int) -> NDArray[np.int64]:
    """Return the indices of a random share of the images, in order, at least one of them.

    Raises:
        TrainingError: There are no images.
    """
    if not len(data):
        raise TrainingError("Expected images for the attack, got none. Give some with --data.")
    count = max(1, round(share * len(data)))
    return np.sort(np.random.default_rng(seed).permutation(len(data))[:count]).astype(np.int64)


@torch.no_grad()
def predict(classifier: Classifier, attacker: Attacker, indices: NDArray[np.int64]) -> Logits:
    """Return a model's logits of some of the attacker's images, on his device."""
    parts = [indices[some] for some in batches(len(indices), 256, even=True)]
    return torch.cat([classifier(attacker.data.batch(some)[0].to(attacker.device)) for some in parts])


def view_of(view: PooledSaliency, classifier: Classifier) -> PooledSaliency:
    """Return a view's interpreters and grid at another classifier's own layers."""
    return replace(view, map_layers=MapLayers(classifier.target_layer, classifier.taps))


def measured(measure: Measure | None, model: Classifier) -> dict[str, Any]:
    """Return what there is to say of a stage."""
    return {} if measure is None else dict(measure(model))
