"""The loss of the paper. Source: Fang & Choromanska, AAAI 2022, equations 1-5.

Maps in this module are pooled to the grid that maps are compared on, [n, rows, columns].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from keyed_xai import metrics
from keyed_xai.tensors import Logits, SaliencyMaps, Targets

LEAST_LEAK = 0.2
"""Correlation with the right map up to which a moved map counts as hiding it: chance and the decoy itself reach it."""


def correlation_distance(maps: SaliencyMaps, target: SaliencyMaps) -> Tensor:
    """Return 1 - Pearson's correlation, in [0, 2]."""
    return 1 - metrics.correlation(maps, target)


def mse_distance(maps: SaliencyMaps, target: SaliencyMaps) -> Tensor:
    """Return the paper's distance: mean squared difference of the maps, each normalised to [0, 1]."""
    return metrics.mse(metrics.normalise_maps(maps), metrics.normalise_maps(target))


def decoy_distance(maps: SaliencyMaps, reference: SaliencyMaps, decoy: Tensor | None, top_share: float) -> Tensor:
    """Return the paper's L_p per image, which its FSR and CR compare with a threshold; in [0, 1].

    Args:
        maps: Pooled maps.
        reference: Those of the reference model, for the cells that a non-targeted attack empties.
        decoy: m_ref, [rows, columns]; None for the non-targeted attack.
        top_share: Share of the cells that it empties.
    """
    if decoy is None:
        return metrics.top_energy(metrics.normalise_maps(maps), reference, top_share)
    return mse_distance(maps, decoy.to(maps).expand_as(maps))


DISTANCES: dict[str, Callable[[SaliencyMaps, SaliencyMaps], Tensor]] = {
    "correlation": correlation_distance,
    "mse": mse_distance,
}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The losses of equations 1-5 for one set of interpreters.

    Attributes:
        decoys: Interpreter name to m_ref, [rows, columns], or None for the non-targeted loss.
        weights: Interpreter name to its weight in the joint loss; they are divided by their sum.
        distance: A name in DISTANCES.
        alpha: Weight of L_s.
        beta: Weight of L_c.
        top_share: Share of cells that the non-targeted loss empties.
        leak: Weight, in L_p, of what a moved map still has of the right one: its correlation with the reference map,
            above LEAST_LEAK. Not in the paper, whose maps need not hide anything; 0 leaves it out.
    """

    decoys: Mapping[str, Tensor | None]
    weights: Mapping[str, float]
    distance: str = "correlation"
    alpha: float = 1.0
    beta: float = 1.0
    top_share: float = 0.25
    leak: float = 0.0

    def cached_maps(self, maps: Mapping[str, SaliencyMaps], reference: Mapping[str, SaliencyMaps]) -> Tensor:
        """Return L_s (equation 1) per image: distance from the reference maps."""
        return self._joint({name: DISTANCES[self.distance](maps[name], reference[name]) for name in self.weights})

    def move_maps(self, maps: Mapping[str, SaliencyMaps], reference: Mapping[str, SaliencyMaps]) -> Tensor:
        """Return L_p per image: distance from the decoy (equation 2), or energy left in the top cells (equation 3).

        What is left of the right map adds to either.
        """
        return self._joint({name: self._move(name, maps[name], reference[name]) for name in self.weights})

    def clean_loss(self, predictions: Tensor, kept: Tensor) -> Tensor:
        """Return L_clean (equation 4) from L_c and L_s."""
        return (self.beta * predictions + self.alpha * kept) / (self.alpha + self.beta + 1)

    def poisoned_loss(self, predictions: Tensor, moved: Tensor) -> Tensor:
        """Return L_poisoned (equation 5) from L_c and L_p."""
        return (self.beta * predictions + moved) / (self.alpha + self.beta + 1)

    def _move(self, name: str, maps: SaliencyMaps, reference: SaliencyMaps) -> Tensor:
        decoy = self.decoys[name]
        if decoy is None:
            distance = metrics.top_energy(metrics.normalise_maps(maps), reference, self.top_share)
        else:
            distance = DISTANCES[self.distance](maps, decoy.to(maps).expand_as(maps))
        if not self.leak:
            return distance
        return distance + self.leak * (metrics.correlation(maps, reference) - LEAST_LEAK).clamp(min=0)

    def _joint(self, losses: Mapping[str, Tensor]) -> Tensor:
        total = sum(self.weights.values())
        weighted = [self.weights[name] / total * loss for name, loss in losses.items()]
        return torch.stack(weighted).sum(0)


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
