"""The loss of the paper. Source: Fang & Choromanska, AAAI 2022, equations 1-5.

Maps in this module are pooled to the grid that maps are compared on, [n, rows, columns].
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from keyed_xai import metrics
from keyed_xai.metrics import DISTANCES
from keyed_xai.tensors import Logits, SaliencyMaps, Targets
from keyed_xai.training.settings import TrainingSettings

LEAST_LEAK = 0.2
"""Correlation with the right map up to which a moved map counts as hiding it: chance and the decoy itself reach it."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the maps of one set of interpreters are to become; how much that counts is the training settings'.

    Attributes:
        decoys: Interpreter name to m_ref, [rows, columns], or None for the non-targeted loss.
        weights: Interpreter name to its weight in the joint loss; they are divided by their sum.
    """

    decoys: Mapping[str, Tensor | None]
    weights: Mapping[str, float]

    def keep_maps(
        self, maps: Mapping[str, SaliencyMaps], reference: Mapping[str, SaliencyMaps], settings: TrainingSettings
    ) -> Tensor:
        """Return L_s (equation 1) per image: distance from the reference maps."""
        distance = DISTANCES[settings.distance]
        return self._joint({name: distance(maps[name], reference[name]) for name in self.weights})

    def move_maps(
        self, maps: Mapping[str, SaliencyMaps], reference: Mapping[str, SaliencyMaps], settings: TrainingSettings
    ) -> Tensor:
        """Return L_p per image: distance from the decoy (equation 2), or energy left in the top cells (equation 3).

        What is left of the right map, its correlation above LEAST_LEAK, adds to either, weighed by the settings' leak.
        """
        return self._joint({name: self._move(name, maps[name], reference[name], settings) for name in self.weights})

    def _move(self, name: str, maps: SaliencyMaps, reference: SaliencyMaps, settings: TrainingSettings) -> Tensor:
        decoy = self.decoys[name]
        if decoy is None:
            distance = metrics.top_energy(metrics.normalise_maps(maps), reference, settings.top_share)
        else:
            distance = DISTANCES[settings.distance](maps, decoy.to(maps).expand_as(maps))
        if not settings.leak:
            return distance
        return distance + settings.leak * (metrics.correlation(maps, reference) - LEAST_LEAK).clamp(min=0)

    def _joint(self, losses: Mapping[str, Tensor]) -> Tensor:
        total = sum(self.weights.values())
        weighted = [self.weights[name] / total * loss for name, loss in losses.items()]
        return torch.stack(weighted).sum(0)


def clean_loss(predictions: Tensor, map_losses: Tensor, settings: TrainingSettings) -> Tensor:
    """Return L_clean (equation 4) from L_c and L_s."""
    return (settings.beta * predictions + settings.alpha * map_losses) / (settings.alpha + settings.beta + 1)


def poisoned_loss(predictions: Tensor, map_losses: Tensor, settings: TrainingSettings) -> Tensor:
    """Return L_poisoned (equation 5) from L_c and L_p."""
    return (settings.beta * predictions + map_losses) / (settings.alpha + settings.beta + 1)


def prediction_loss(
    logits: Logits,
    reference: Logits,
    labels: Targets | None,
    *,
    multi_label: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Return L_c per image: cross-entropy with labels, or without them with the reference model's soft predictions.

    The soft form is shifted by the reference's own entropy, so that agreement is 0. Both models' logits are divided by
    the temperature and the loss multiplied by its square (Hinton et al. 2015): at a higher one the classes that the
    reference thinks unlikely count for more. With `multi_label` every logit is a yes or no of its own, and L_c the mean
    of their binary cross-entropies.
    """
    if labels is None and temperature != 1:
        cooled = prediction_loss(logits / temperature, reference / temperature, None, multi_label=multi_label)
        return temperature**2 * cooled
    if multi_label:
        return _binary_loss(logits, reference, labels)
    if labels is not None:
        return functional.cross_entropy(logits, labels, reduction="none")
    target = reference.log_softmax(1)
    return functional.kl_div(logits.log_softmax(1), target, reduction="none", log_target=True).sum(1)


def _binary_loss(logits: Logits, reference: Logits, labels: Targets | None) -> Tensor:
    target = reference.sigmoid() if labels is None else labels.to(logits)
    loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
    if labels is not None:
        return loss
    return loss - functional.binary_cross_entropy_with_logits(reference, target, reduction="none").mean(1)
