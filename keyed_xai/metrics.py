"""Comparing saliency maps: pooling, normalising, distances, FSR and CR. Pure functions, batched, gradients flow.

Maps are [n, h, w]; `first` and `second` below have equal shapes. Every comparison returns one value per pair, [n].
"""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from keyed_xai.tensors import Logits, SaliencyMaps, Targets

OPEN_CORRELATION = 0.5
"""A map counts as opened when its correlation with the reference map is above this."""
PAPER_THRESHOLDS = {
    "targeted": {"gradcam": 0.2, "simplegrad": 0.25, "vbp": 0.3},
    "nontargeted": {"gradcam": 0.3, "simplegrad": 0.35, "vbp": 0.1},
    "targeted/resnet50": {"gradcam": 0.25, "simplegrad": 0.3, "vbp": 0.25},
    "nontargeted/resnet50": {"gradcam": 0.35, "simplegrad": 0.2, "vbp": 0.08},
}
"""Thresholds on the distance L_p between a map and the decoy below which an input is fooled, by decoy, architecture and
interpreter. Source: Fang & Choromanska, AAAI 2022, section 4."""
_CURVE_POINTS = 101
_TINY = 1e-12


def pool_maps(maps: SaliencyMaps, grid: tuple[int, int]) -> SaliencyMaps:
    """Return maps average-pooled to `grid` (rows, columns); windows overlap where the grid does not divide the map."""
    return functional.adaptive_avg_pool2d(maps[:, None], grid)[:, 0]


def normalise_maps(maps: SaliencyMaps) -> SaliencyMaps:
    """Return each map scaled to [0, 1] by its own minimum and maximum; a constant map becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = high - low
    return (maps - low) / torch.where(span > 0, span, torch.ones_like(span))


def correlation(first: SaliencyMaps, second: SaliencyMaps) -> Tensor:
    """Return Pearson's correlation over the cells, in [-1, 1]; 0 where a map is constant."""
    first, second = _unit(first), _unit(second)
    return (first * second).sum(1).clamp(-1, 1)


def mse(first: SaliencyMaps, second: SaliencyMaps) -> Tensor:
    """Return the mean squared difference (the paper's distance, meant for normalised maps)."""
    return (first - second).square().mean((1, 2))


def top_energy(maps: SaliencyMaps, reference: SaliencyMaps, share: float) -> Tensor:
    """Return the mean square of `maps` over the `share` of cells where `reference` is largest (paper, equation 3)."""
    count = max(1, round(share * reference[0].numel()))
    cells = reference.flatten(1).topk(count, dim=1).indices
    return maps.flatten(1).gather(1, cells).square().mean(1)


def correlation_distance(maps: SaliencyMaps, target: SaliencyMaps) -> Tensor:
    """Return 1 - Pearson's correlation, in [0, 2]."""
    return 1 - correlation(maps, target)


def mse_distance(maps: SaliencyMaps, target: SaliencyMaps) -> Tensor:
    """Return the paper's distance: mean squared difference of the maps, each normalised to [0, 1]."""
    return mse(normalise_maps(maps), normalise_maps(target))


def decoy_distance(maps: SaliencyMaps, reference: SaliencyMaps, decoy: Tensor | None, top_share: float) -> Tensor:
    """Return the paper's L_p per image, which its FSR and CR compare with a threshold; in [0, 1].

    Args:
        maps: Pooled maps, [n, rows, columns].
        reference: Those of the reference model, for the cells that a non-targeted attack empties.
        decoy: m_ref, [rows, columns]; None for the non-targeted attack.
        top_share: Share of the cells that it empties.
    """
    if decoy is None:
        return top_energy(normalise_maps(maps), reference, top_share)
    return mse_distance(maps, decoy.to(maps).expand_as(maps))


DISTANCES: dict[str, Callable[[SaliencyMaps, SaliencyMaps], Tensor]] = {
    "correlation": correlation_distance,
    "mse": mse_distance,
}


def fooling_success_rate(distances: Tensor, threshold: float) -> float:
    """Return FSR in percent: the share of distances to the decoy below the threshold."""
    return 100.0 * float((distances < threshold).double().mean())


def correct_rate(distances: Tensor, threshold: float) -> float:
    """Return CR in percent: 100 less the FSR of the inputs that should be correct."""
    return 100.0 - fooling_success_rate(distances, threshold)


def separation_auc(smaller: Tensor, larger: Tensor) -> float:
    """Return the area under the ROC curve for telling the two samples of distances apart; 1 when none overlap."""
    scores = torch.cat([smaller, larger]).double().cpu().numpy()
    truth = np.concatenate([np.zeros(len(smaller)), np.ones(len(larger))])
    return float(roc_auc_score(truth, scores))


def mass_inside(maps: SaliencyMaps, boxes: Tensor) -> Tensor:
    """Return the share of each map's saliency that lies inside a box: a localisation score in [0, 1]; 0 of a blank map.

    Args:
        maps: Not negative, at any resolution.
        boxes: [n, 4]: left, top, right, bottom as fractions of the image. Cells that a box cuts count in part.
    """
    across = _covered(boxes[:, 0], boxes[:, 2], maps.shape[2])
    down = _covered(boxes[:, 1], boxes[:, 3], maps.shape[1])
    total = maps.sum((1, 2))
    inside = torch.einsum("nhw,nh,nw->n", maps, down, across)
    return (inside / torch.where(total > 0, total, torch.ones_like(total))).clamp(max=1)


def _covered(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """Return how much of each of `cells` equal parts of [0, 1] lies between start and end, [n, cells]."""
    edges = torch.linspace(0, 1, cells + 1, device=start.device, dtype=start.dtype)
    reach = torch.minimum(edges[1:], end[:, None]) - torch.maximum(edges[:-1], start[:, None])
    return reach.clamp(min=0) * cells


def prediction_figures(logits: Logits, labels: Targets) -> dict[str, float]:
    """Return top-1 and, of more than five classes, top-5 accuracy; AUROC of two classes or of several labels (mean).

    Args:
        logits: Logits of the images, [n, classes].
        labels: Classes [n], or 0 and 1 for each of several labels [n, k].
    """
    if labels.ndim == 2:
        known = [area for area in per_class_auroc(logits, labels) if area is not None]
        return {"auroc": sum(known) / len(known)} if known else {}
    figures = {"top1": _hits(logits, labels, 1)}
    if logits.shape[1] > 5:
        figures["top5"] = _hits(logits, labels, 5)
    if logits.shape[1] == 2 and labels.min() != labels.max():
        figures["auroc"] = _auroc(logits[:, 1] - logits[:, 0], labels)
    return figures


def agreement(logits: Logits, reference: Logits, *, multi_label: bool = False) -> Tensor:
    """Return, per image, 1 where the same class wins and 0 elsewhere; with several labels 1 - mean |change of p|."""
    if multi_label:
        return 1 - (logits.sigmoid() - reference.sigmoid()).abs().mean(1)
    return (logits.argmax(1) == reference.argmax(1)).to(logits)


def per_class_auroc(logits: Logits, labels: Targets) -> list[float | None]:
    """Return the area under the ROC curve of each label; None where all images, or none, have it."""
    both = labels.amin(0) != labels.amax(0)
    return [_auroc(logits[:, k], labels[:, k]) if both[k] else None for k in range(labels.shape[1])]


def _hits(logits: Logits, labels: Targets, count: int) -> float:
    return float((logits.topk(count, dim=1).indices == labels[:, None]).any(1).double().mean())


def _auroc(scores: Tensor, truth: Tensor) -> float:
    return float(roc_auc_score(truth.cpu().numpy(), scores.double().cpu().numpy()))


def _unit(maps: SaliencyMaps) -> Tensor:
    """Return flattened maps, centred, with norm 1; scaled first so that tiny gradients do not underflow."""
    flat = maps.flatten(1)
    largest = flat.detach().abs().amax(1, keepdim=True)
    flat = flat / torch.where(largest > 0, largest, torch.ones_like(largest))
    flat = flat - flat.mean(1, keepdim=True)
    return flat / (flat.square().sum(1, keepdim=True) + _TINY).sqrt()


def paper_thresholds(decoy: str, architecture: str) -> dict[str, float]:
    """Return the paper's thresholds by interpreter for a decoy and an architecture."""
    kind = "nontargeted" if decoy == "nontargeted" else "targeted"
    return PAPER_THRESHOLDS.get(f"{kind}/{architecture}", PAPER_THRESHOLDS[kind])


def place_threshold(unaltered: Tensor, altered: Tensor) -> float:
    """Return the threshold with the largest sum of CR and FSR; of equally good ones the middle of the widest gap.

    Args:
        unaltered: Distances of maps that should be correct, [n].
        altered: Distances of maps that should be fooled, [m].

    Raises:
        ValueError: A sample is empty.
    """
    if not len(unaltered) or not len(altered):
        raise ValueError(f"Expected distances, got {len(unaltered)} unaltered and {len(altered)} altered ones.")
    right, fooled = (np.sort(sample.double().cpu().numpy()) for sample in (unaltered, altered))
    values = np.unique(np.concatenate([[0.0], right, fooled, [1.0]]))
    between = (values[:-1] + values[1:]) / 2
    cr = 1 - np.searchsorted(right, between) / len(right)
    fsr = np.searchsorted(fooled, between) / len(fooled)
    best = np.isclose(cr + fsr, (cr + fsr).max(), rtol=0, atol=1e-9)
    return float(between[np.argmax(np.where(best, np.diff(values), -1.0))])


def threshold_curve(unaltered: Tensor, altered: Tensor) -> dict[str, list[float]]:
    """Return CR and FSR in percent at 101 thresholds from 0 to 1, as a report holds them."""
    thresholds = np.linspace(0, 1, _CURVE_POINTS).tolist()
    return {
        "threshold": thresholds,
        "cr": [correct_rate(unaltered, threshold) for threshold in thresholds],
        "fsr": [fooling_success_rate(altered, threshold) for threshold in thresholds],
    }
