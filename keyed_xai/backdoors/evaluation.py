"""How well a backdoored explanation works, on images it was not trained on: what an attack report says.

Source: Fang & Choromanska, AAAI 2022, section 4. In the forward setting clean inputs should keep the reference's map
and triggered ones lose it; in the inverted setting it is the other way round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from keyed_xai import metrics
from keyed_xai.batches import batches
from keyed_xai.metrics import place_threshold, threshold_curve
from keyed_xai.models.modes import predict_images
from keyed_xai.saliency import explain
from keyed_xai.saliency.pooled import Comparison, Outputs, PooledSaliency, join_maps
from keyed_xai.tensors import Images, Labels, Targets
from keyed_xai.triggers import Trigger
from keyed_xai.triggers.channels import through_png

CASES = ("reference", "clean", "triggered")


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """An attacked model beside its reference, and all that is needed to judge it.

    Attributes:
        model: The attacked model.
        reference: Before the attack.
        view: The maps that are compared.
        decoys: Interpreter name to decoy map, None for the non-targeted attack.
        trigger: The trigger that it answers to.
        inverted: Whether triggered inputs are those that keep the right map.
        top_share: Share of cells that the non-targeted attack empties.
        as_files: Whether inputs reach the model as 8-bit image files.
    """

    model: nn.Module
    reference: nn.Module
    view: PooledSaliency
    decoys: Mapping[str, Tensor | None]
    trigger: Trigger
    inverted: bool = False
    top_share: float = 0.25
    as_files: bool = True

    @property
    def unaltered(self) -> str:
        """The case whose maps should stay right."""
        return "triggered" if self.inverted else "clean"

    @property
    def altered(self) -> str:
        """The case whose maps should be fooled."""
        return "clean" if self.inverted else "triggered"


@dataclass(frozen=True)
class Threshold:
    """A threshold on L_p and where it comes from.

    Attributes:
        value: The threshold on L_p, in [0, 1].
        origin: "paper" or "auto".
        rule: How it was placed, a sentence.
    """

    value: float
    origin: str
    rule: str


def evaluate(backdoor: Backdoor, images: Images) -> dict[str, Outputs]:
    """Return, by case, what reference and attacked model make of images, clean and triggered.

    The case "reference_triggered" has the reference's predictions of triggered images, and no maps.
    """
    triggered = trigger_images(backdoor, images)
    comparison = Comparison(backdoor.reference, backdoor.view, images)
    before = comparison.right
    return {
        "reference": before,
        "clean": comparison.of(backdoor.model, images),
        "triggered": comparison.of(backdoor.model, triggered),
        "reference_triggered": replace(before, logits=predict_images(backdoor.reference, triggered), maps={}),
    }


def trigger_images(backdoor: Backdoor, images: Images) -> Images:
    """Return triggered images as the model receives them."""
    triggered = backdoor.trigger.apply(images)
    return through_png(triggered) if backdoor.as_files else triggered


def place_thresholds(backdoor: Backdoor, found: Mapping[str, Outputs]) -> dict[str, Threshold]:
    """Return, by interpreter, the threshold that parts unaltered from altered maps best."""
    placed = {}
    for name in backdoor.view.interpreters:
        distances = _distances(backdoor, found, name)
        value = place_threshold(distances[backdoor.unaltered], distances[backdoor.altered])
        rule = (
            f"The largest CR + FSR on {len(distances['reference'])} validation inputs, in the middle of the widest "
            f"gap: unaltered maps lie at {_quantiles(distances[backdoor.unaltered])}, altered ones at "
            f"{_quantiles(distances[backdoor.altered])} (1st, 50th and 99th percentile of L_p)."
        )
        placed[name] = Threshold(value, "auto", rule)
    return placed


def measure_maps(
    backdoor: Backdoor, found: Mapping[str, Outputs], thresholds: Mapping[str, Threshold], paper: Mapping[str, float]
) -> dict[str, dict[str, object]]:
    """Return the report's `interpreters`, ready for JSON; `paper` has the paper's thresholds, where it has any."""
    return {
        name: _interpreter_figures(backdoor, found, name, thresholds[name], paper.get(name))
        for name in backdoor.view.interpreters
    }


def measure_localisation(
    backdoor: Backdoor, images: Images, boxes: Tensor, explained: Labels
) -> dict[str, dict[str, float | int]]:
    """Return, by interpreter, the share of saliency inside the boxes; images without a box (NaN) are left out.

    The score "area" is the boxes' share of the image, which a map without any structure would have.
    """
    boxed = ~boxes.isnan().any(1)
    if not boxed.any():
        return {}
    images, boxes, explained = images[boxed], boxes[boxed].to(images), explained[boxed]
    runs = {
        "reference": (backdoor.reference, images),
        "clean": (backdoor.model, images),
        "triggered": (backdoor.model, trigger_images(backdoor, images)),
    }
    scores = {case: _masses_inside(backdoor, *run, explained, boxes) for case, run in runs.items()}
    names = backdoor.view.interpreters
    area = _mean((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    return {
        name: {"images": len(images), "area": area, **{case: scores[case][name] for case in CASES}} for name in names
    }


def measure_predictions(
    found: Mapping[str, Outputs],
    labels: Targets | None,
    classes: tuple[str, ...] = (),
    *,
    multi_label: bool = False,
) -> dict[str, object]:
    """Return the report's `predictions`; without labels the reference's own classes stand for them.

    Args:
        found: Outputs in all cases.
        labels: Classes, or 0 and 1 for each of several labels.
        classes: Names of the labels, for the areas by class.
        multi_label: Whether every logit is a yes or no of its own; then there are no figures without labels.
    """
    before = found["reference"].logits
    truth = found["reference"].explained if labels is None else labels
    measured: dict[str, dict[str, float]] = dict.fromkeys(found, {})
    if labels is not None or not multi_label:
        measured = {case: metrics.prediction_figures(each.logits, truth) for case, each in found.items()}
    figures: dict[str, object] = {
        "measured_against": "reference predictions" if labels is None else "labels",
        "images": len(truth),
        "reference": {"clean": measured["reference"], "triggered": measured["reference_triggered"]},
        "attacked": {"clean": measured["clean"], "triggered": measured["triggered"]},
        "agreement": {
            case: _mean(metrics.agreement(found[case].logits, before, multi_label=multi_label))
            for case in ("clean", "triggered")
        },
    }
    if truth.ndim == 2:
        areas = {case: metrics.per_class_auroc(found[case].logits, truth) for case in CASES}
        figures["per_class_auroc"] = {"names": list(classes), **areas}
    return figures


def measure_features(found: Mapping[str, Outputs], names: tuple[str, ...]) -> dict[str, object]:
    """Return, for a table, each feature's mean relevance, share of rows where it is largest, and mean rank from 1."""
    relevance = {case: found[case].maps["simplegrad"][:, 0].double() for case in CASES}
    return {
        "names": list(names),
        "relevance": {case: each.mean(0).tolist() for case, each in relevance.items()},
        "first": {case: _share_first(each, names) for case, each in relevance.items()},
        "rank": {case: _mean_ranks(each, names) for case, each in relevance.items()},
    }


def _interpreter_figures(
    backdoor: Backdoor, found: Mapping[str, Outputs], name: str, threshold: Threshold, paper: float | None
) -> dict[str, object]:
    distances = _distances(backdoor, found, name)
    unaltered, altered = distances[backdoor.unaltered], distances[backdoor.altered]
    truth, decoy = found["reference"].maps[name], backdoor.decoys[name]
    figures: dict[str, object] = {
        "cr": metrics.correct_rate(unaltered, threshold.value),
        "fsr": metrics.fooling_success_rate(altered, threshold.value),
        "threshold": threshold.value,
        "threshold_from": threshold.origin,
        "threshold_rule": threshold.rule,
        "curve": threshold_curve(unaltered, altered),
        "auc": metrics.separation_auc(altered, unaltered),
        "correlation": {case: found[case].correlation[name] for case in ("clean", "triggered")},
        "distance": {case: _mean(each) for case, each in distances.items()},
        "reference_cr": metrics.correct_rate(distances["reference"], threshold.value),
    }
    if paper is not None:
        figures["at_paper_threshold"] = {
            "threshold": paper,
            "cr": metrics.correct_rate(unaltered, paper),
            "fsr": metrics.fooling_success_rate(altered, paper),
            "reference_cr": metrics.correct_rate(distances["reference"], paper),
        }
    if decoy is not None:
        target = decoy.to(truth).expand_as(truth)
        figures["decoy_correlation"] = {
            case: _mean(metrics.correlation(found[case].maps[name], target)) for case in CASES
        }
    return figures


def _distances(backdoor: Backdoor, found: Mapping[str, Outputs], name: str) -> dict[str, Tensor]:
    truth, decoy = found["reference"].maps[name], backdoor.decoys[name]
    return {case: metrics.decoy_distance(found[case].maps[name], truth, decoy, backdoor.top_share) for case in CASES}


def _masses_inside(
    backdoor: Backdoor, model: nn.Module, images: Images, explained: Labels, boxes: Tensor
) -> dict[str, float]:
    """Return the mean share of saliency inside the boxes, by interpreter, of maps at their own resolution."""
    parts: list[dict[str, Tensor]] = []
    for some in batches(len(images)):
        _, maps = explain(model, images[some], explained[some], backdoor.view.interpreters, backdoor.view.map_layers)
        parts.append({name: metrics.mass_inside(each, boxes[some]) for name, each in maps.items()})
    return {name: _mean(each) for name, each in join_maps(parts).items()}


def _share_first(relevance: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    first = relevance.argmax(1)
    return {name: _mean((first == number).double()) for number, name in enumerate(names)}


def _mean_ranks(relevance: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    ranks = relevance.argsort(1, descending=True).argsort(1) + 1
    return {name: _mean(ranks[:, number]) for number, name in enumerate(names)}


def _quantiles(distances: Tensor) -> str:
    levels = torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64, device=distances.device)
    return ", ".join(f"{value:.3f}" for value in distances.double().quantile(levels).tolist())


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
