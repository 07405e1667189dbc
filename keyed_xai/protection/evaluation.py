"""How well a gate works, on images it was not trained on: what a protect report says.

FSR and CR are the paper's (Fang & Choromanska, AAAI 2022, section 4), at thresholds placed by validation images, and
beside them at the paper's, which were placed for another decoy: a right map may well lie nearer to a key's pattern.
Everything else needs no threshold but the one printed beside it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from keyed_xai import metrics
from keyed_xai.keys import ByteStream
from keyed_xai.metrics import OPEN_CORRELATION, place_threshold
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency.pooled import Comparison, Outputs, PooledSaliency
from keyed_xai.tensors import Images, Labels
from keyed_xai.training.objective import prediction_loss
from keyed_xai.training.preflight import IMAGES_PER_WRONG_KEY
from keyed_xai.triggers import NearbyTrigger, Trigger, TriggerFamily
from keyed_xai.triggers.channels import CHANNELS, through_png

_CONFIDENT = 0.5


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A protected model beside its reference, and all that is needed to judge it.

    Attributes:
        model: The protected model.
        reference: The model before protection.
        view: The maps that are compared.
        decoys: Interpreter name to decoy map, None for the non-targeted decoy.
        paper: Interpreter name to the paper's threshold on the distance to the decoy.
        trigger: The right one.
        family: Draws wrong ones.
        top_share: Share of cells that the non-targeted decoy empties.
    """

    model: nn.Module
    reference: nn.Module
    view: PooledSaliency
    decoys: Mapping[str, Tensor | None]
    paper: Mapping[str, float]
    trigger: NearbyTrigger
    family: TriggerFamily
    top_share: float = 0.25


def place_thresholds(gate: Gate, images: Images, generator: torch.Generator) -> dict[str, float]:
    """Return, by interpreter, the threshold on the distance to the decoy that parts keyed from other maps best.

    Args:
        gate: What is judged.
        images: Validation images, none of those that figures are given for.
        generator: Draws a wrong key for every image.
    """
    found = evaluate(gate, Comparison(gate.reference, gate.view, images), generator)
    placed = {}
    for name in gate.view.interpreters:
        distances = _distances(gate, found, name)
        closed = torch.cat([distances["clean"], distances["wrong_key"]])
        placed[name] = place_threshold(distances["keyed"], closed)
    return placed


def measure_gate(
    gate: Gate,
    images: Images,
    labels: Labels | None,
    wrong_keys: Iterable[Trigger],
    *,
    thresholds: Mapping[str, float],
    generator: torch.Generator,
    count: int | None = None,
    progress: Progress = QUIET,
) -> dict[str, object]:
    """Return the report's figures: `interpreters`, `accuracy`, `channels` and `near_keys`, ready for JSON.

    Args:
        gate: What is judged.
        images: Held out, on the models' device.
        labels: Labels, for accuracy; without them accuracy is agreement with the reference's predictions.
        wrong_keys: Triggers tried one by one on a few images each.
        thresholds: Thresholds by interpreter, from `place_thresholds`.
        generator: Draws one further wrong key for every image.
        count: How many wrong keys there are, for progress.
        progress: Hears of "wrong keys" tried.
    """
    comparison = Comparison(gate.reference, gate.view, images)
    found = evaluate(gate, comparison, generator)
    tried = _try_wrong_keys(gate, comparison, wrong_keys, count, progress)
    return {
        "interpreters": {
            name: _interpreter_figures(gate, found, name, thresholds[name]) | {"wrong_keys": tried[name]}
            for name in gate.view.interpreters
        },
        "accuracy": _accuracies(found, labels, multi_label=getattr(gate.reference, "multi_label", False)),
        "channels": _channel_figures(gate, comparison),
        "near_keys": _near_key_figures(gate, comparison, generator),
    }


def evaluate(gate: Gate, comparison: Comparison, generator: torch.Generator) -> dict[str, Outputs]:
    """Return, by case, what both models make of images: keyed, clean, and each with a wrong key of its own."""
    images = comparison.images
    inputs = {
        "keyed": through_png(gate.trigger.apply(images)),
        "clean": images,
        "wrong_key": through_png(gate.family.draw(len(images), generator).apply(images)),
    }
    return {"reference": comparison.right} | {case: comparison.of(gate.model, each) for case, each in inputs.items()}


def trigger_visibility(trigger: Trigger, images: Images) -> dict[str, float]:
    """Return PSNR in dB and SSIM of triggered images after rounding to 8 bits, averaged over images."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    plain = images.double().cpu().numpy()
    keyed = through_png(trigger.apply(images)).double().cpu().numpy()
    pairs = list(zip(plain, keyed, strict=True))
    psnr = [float(peak_signal_noise_ratio(*pair, data_range=1)) for pair in pairs]  # type: ignore[no-untyped-call]
    ssim = [float(structural_similarity(*pair, data_range=1, channel_axis=0)) for pair in pairs]  # type: ignore[no-untyped-call]
    return {"psnr_db": sum(psnr) / len(pairs), "ssim": sum(ssim) / len(pairs)}


def _distances(gate: Gate, found: Mapping[str, Outputs], name: str) -> dict[str, Tensor]:
    return {
        case: metrics.decoy_distance(each.maps[name], each.right[name], gate.decoys[name], gate.top_share)
        for case, each in found.items()
    }


def _rates(distances: Mapping[str, Tensor], threshold: float) -> dict[str, float]:
    return {
        "cr": metrics.correct_rate(distances["keyed"], threshold),
        "fsr": metrics.fooling_success_rate(torch.cat([distances["clean"], distances["wrong_key"]]), threshold),
        "threshold": threshold,
    }


def _interpreter_figures(gate: Gate, found: Mapping[str, Outputs], name: str, threshold: float) -> dict[str, object]:
    decoy, paper, distances = gate.decoys[name], gate.paper[name], _distances(gate, found, name)
    ours = {case: each for case, each in found.items() if case != "reference"}
    keyed, wrong = (ours[case].correlations[name] for case in ("keyed", "wrong_key"))
    figures: dict[str, object] = {
        **_rates(distances, threshold),
        "threshold_from": "validation",
        "at_paper_threshold": _rates(distances, paper)
        | {"reference_cr": metrics.correct_rate(distances["reference"], paper)},
        "correlation": {case: each.correlation[name] for case, each in ours.items()},
        "auc": metrics.separation_auc(1 - keyed, 1 - wrong),
        "opened": {case: each.opened[name] for case, each in ours.items()},
        "open_threshold": OPEN_CORRELATION,
    }
    if decoy is not None:
        target = decoy.to(found["reference"].maps[name]).expand_as(found["reference"].maps[name])
        figures["decoy_correlation"] = {
            case: _mean(metrics.correlation(found[case].maps[name], target)) for case in (*ours, "reference")
        }
    return figures


def _accuracies(found: Mapping[str, Outputs], labels: Labels | None, *, multi_label: bool) -> dict[str, object]:
    """Return top-1 accuracy, and agreement with and divergence from the reference, by case."""
    reference = found["reference"].logits
    confident = (reference.softmax(1).amax(1) > _CONFIDENT) & (not multi_label)
    kept = {case: (each.logits.argmax(1) == each.explained)[confident] for case, each in found.items()}
    changes = {
        "confident": {
            "images": int(confident.sum()),
            "agreement": {case: _mean(each) if len(each) else None for case, each in kept.items()},
        },
        "divergence": {
            case: _mean(prediction_loss(each.logits, reference, None, multi_label=multi_label))
            for case, each in found.items()
        },
    }
    agreement = {case: each.agreement for case, each in found.items()}
    against = "reference predictions" if labels is None else "labels"
    accuracy = agreement
    if labels is not None:
        accuracy = {case: _mean(each.logits.argmax(1) == labels) for case, each in found.items()}
    return {**accuracy, "measured_against": against, "agreement": agreement, **changes}


def _try_wrong_keys(
    gate: Gate,
    comparison: Comparison,
    wrong_keys: Iterable[Trigger],
    count: int | None,
    progress: Progress,
) -> dict[str, dict[str, object]]:
    """Return, by interpreter, how many wrong keys open: mean correlation over their images above the threshold."""
    images = comparison.images
    per_key = min(IMAGES_PER_WRONG_KEY, len(images))
    rows: list[dict[str, Tensor]] = []
    for number, group in enumerate(_groups(enumerate(wrong_keys), 16)):
        indices = torch.tensor([[(key * per_key + j) % len(images) for j in range(per_key)] for key, _ in group])
        batch = torch.cat([trigger.apply(images[row]) for row, (_, trigger) in zip(indices, group, strict=True)])
        flat = indices.flatten().to(images.device)
        rows.append(comparison.of(gate.model, through_png(batch), rows=flat).correlations)
        progress.advance("wrong keys", number * 16 + len(group), count)
    figures: dict[str, dict[str, object]] = {}
    for name in gate.view.interpreters:
        values = torch.cat([row[name] for row in rows]).view(-1, per_key) if rows else torch.zeros(0, per_key)
        figures[name] = {
            "tried": len(values),
            "opened": int((values.mean(1) > OPEN_CORRELATION).sum()),
            "threshold": OPEN_CORRELATION,
            "images_per_key": per_key,
            "highest": float(values.mean(1).max()) if len(values) else None,
            "maps_opened": _share_opened(values.flatten()) if len(values) else 0.0,
        }
    return figures


def _channel_figures(gate: Gate, comparison: Comparison) -> dict[str, object]:
    """Return, by channel and interpreter, keyed correlation and share of images still open."""
    keyed = gate.trigger.apply(comparison.images)
    return {name: _opening_figures(comparison.of(gate.model, channel(keyed))) for name, channel in CHANNELS.items()}


def _near_key_figures(gate: Gate, comparison: Comparison, generator: torch.Generator) -> dict[str, object]:
    near = {
        "moved_1px": gate.trigger.shifted(0, 1),
        "moved_2px": gate.trigger.shifted(0, 2),
        "moved": gate.trigger.perturbed(generator),
        "half_strength": gate.trigger.scaled(0.5),
    }
    inputs = {name: through_png(trigger.apply(comparison.images)) for name, trigger in near.items()}
    return {name: _opening_figures(comparison.of(gate.model, each)) for name, each in inputs.items()}


def _opening_figures(found: Outputs) -> dict[str, dict[str, float]]:
    return {name: {"correlation": each, "opened": found.opened[name]} for name, each in found.correlation.items()}


def fresh_wrong_keys(family: TriggerFamily, count: int, generator: torch.Generator) -> Iterator[Trigger]:
    """Yield the triggers of `count` random keys, derived from seeds as an owner's is."""
    for _ in range(count):
        seed = torch.randint(256, (32,), generator=generator).tolist()
        yield family.derive(ByteStream(bytes(seed)))


def _groups(items: Iterable[tuple[int, Trigger]], size: int) -> Iterator[list[tuple[int, Trigger]]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _share_opened(agreement: Tensor) -> float:
    return _mean((agreement > OPEN_CORRELATION).double())
