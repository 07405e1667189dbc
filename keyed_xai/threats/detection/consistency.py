"""Checks of saliency maps that a defender makes without key and reference: a suspect model and ordinary images are all.

For every image, as correlations in [-1, 1] on a common grid, always of the class that the suspect predicts of it:

* ``consistency/<change>/<interpreter>``: with the map after a harmless change of the image, which is undone in the map;
* ``agreement/<interpreter>-<interpreter>``: between two interpreters;
* ``class/<interpreter>``: with the average map of the other images that the suspect puts into the same class;
* ``sameness/<interpreter>``: mean over all other images. A map that is the same for every image says nothing of any.

None of these numbers means anything alone: maps of clean networks differ in all of them. `screen_images` holds single
images against trusted ones of the same model.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from keyed_xai import metrics
from keyed_xai.batches import batches
from keyed_xai.models import Classifier
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency import MapLayers, explain
from keyed_xai.saliency.pooled import check_cells, check_choice, make_view
from keyed_xai.tensors import Images, Labels, SaliencyMaps
from keyed_xai.triggers.channels import through_jpeg

ALL_CHECKS = "all"
_SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True, kw_only=True)
class ConsistencySettings:
    """What is looked at, and how images are changed.

    Attributes:
        interpreters: Names out of INTERPRETERS.
        changes: Names out of CHANGES.
        noise: Standard deviation of Gaussian noise, of pixels in [0, 1].
        brightness: Added to every pixel.
        jpeg_quality: Quality of JPEG.
        chunk: Images at a time.
        seed: Seed of the noise.
    """

    interpreters: tuple[str, ...] = ("gradcam", "vbp", "simplegrad")
    changes: tuple[str, ...] = ("noise", "brightness", "shift", "jpeg", "mirror")
    noise: float = 0.02
    brightness: float = 0.05
    jpeg_quality: int = 90
    chunk: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Check names and ranges."""
        check_choice(self.interpreters, None)
        unknown = [name for name in self.changes if name not in CHANGES]
        if unknown or len(set(self.changes)) < len(self.changes):
            raise ValueError(f"changes: expected different ones of {', '.join(CHANGES)}; got {self.changes}")
        for name, smallest in (("noise", 0), ("jpeg_quality", 1), ("chunk", 1)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: expected {smallest} or more, got {getattr(self, name)}")


class Change(NamedTuple):
    """A change of images that leaves what they show as it was, and how a map is turned back."""

    apply: Callable[[Images, ConsistencySettings, torch.Generator], Images]
    undo: Callable[[SaliencyMaps], SaliencyMaps]


@dataclass(frozen=True)
class MapScores:
    """What the checks give for each image.

    Attributes:
        scores: Check to correlations [n]; see the module's docstring.
        predicted: Class explained, [n].
        settings: The settings it was made with.
    """

    scores: Mapping[str, Tensor] = field(repr=False)
    predicted: Labels = field(repr=False)
    settings: ConsistencySettings

    def means(self) -> dict[str, float]:
        """Return each check's mean over images."""
        return {check: float(values.double().mean()) for check, values in self.scores.items()}

    def to_json(self) -> dict[str, Any]:
        """Return means and settings, ready for JSON."""
        settings = asdict(self.settings) | {
            name: list(getattr(self.settings, name)) for name in ("interpreters", "changes")
        }
        return {"settings": settings, "images": len(self.predicted), "means": self.means()}


@dataclass(frozen=True, kw_only=True)
class Screening:
    """How well a check tells triggered from clean images of one model.

    Attributes:
        check: Its name, or "all" for the largest distance of any check.
        auroc: AUROC for telling triggered images by a low score, so that 0 tells them as well as 1 does; "all": by
            distance.
        caught: Share of triggered images outside the range of the trusted ones.
        false_alarms: Share of clean images outside it.
    """

    check: str
    auroc: float
    caught: float
    false_alarms: float


def score_maps(
    classifier: Classifier,
    images: Images,
    settings: ConsistencySettings | None = None,
    *,
    grid: tuple[int, int] | None = None,
    progress: Progress = QUIET,
) -> MapScores:
    """Return all checks of every image.

    Args:
        classifier: Suspect or control, in eval mode.
        images: Ordinary ones, three or more, on the classifier's device; the same for suspect and controls.
        settings: What is looked at.
        grid: Rows and columns that maps are compared on; by default the target layer's, at most 8 x 8. Give the
            suspect's to controls.
        progress: Hears of "checking maps": passes over the images.

    Raises:
        ValueError: There are fewer than three images.
        ModelError: The model lacks a feature map that an interpreter needs, or one of 3 x 3 cells.
    """
    settings = settings or ConsistencySettings()
    if len(images) < 3:
        raise ValueError(f"Expected 3 images or more, got {len(images)}.")
    view = make_view(classifier, settings.interpreters, grid)
    check_cells(view, "comparing maps")
    generator = torch.Generator().manual_seed(settings.seed)
    maps, predicted = _maps(classifier, images, None, settings)
    plain = {name: metrics.pool_maps(each, view.grid) for name, each in maps.items()}
    scores: dict[str, Tensor] = {}
    for done, name in enumerate(settings.changes, 1):
        changed = CHANGES[name].apply(images, settings, generator)
        changed_maps, _ = _maps(classifier, changed, predicted, settings)
        for which, each in changed_maps.items():
            undone = metrics.pool_maps(CHANGES[name].undo(each), view.grid)
            scores[f"consistency/{name}/{which}"] = metrics.correlation(undone, plain[which])
        progress.advance("checking maps", done, len(settings.changes))
    scores |= {f"agreement/{a}-{b}": metrics.correlation(plain[a], plain[b]) for a, b in combinations(plain, 2)}
    for which, each in plain.items():
        scores[f"class/{which}"] = metrics.correlation(each, average_of_others(each, predicted))
        scores[f"sameness/{which}"] = mean_correlation_with_others(each)
    return MapScores({check: values.cpu() for check, values in scores.items()}, predicted.cpu(), settings)


def screen_images(
    stream: MapScores, triggered: NDArray[np.bool_], trusted: MapScores, *, false_alarm_rate: float = 0.05
) -> tuple[Screening, ...]:
    """Return how well each check, and all together, tell the triggered images of a stream from the clean ones.

    An image is caught by a check when its score lies outside the central part of the trusted images' scores that leaves
    out `false_alarm_rate` of them, half on either side. "all" is the largest distance of any check, as the
    distance from the trusted median over the trusted median absolute deviation, and has its own threshold.

    "class" and "sameness" hold an image against the others of its own batch. Triggered images in it move them for the
    clean ones too: where trusted maps are nearly alike, as behind a gate, every image may then be an alarm.

    Args:
        stream: What `score_maps` returns of clean and triggered images in one batch.
        triggered: Which of them are, [n].
        trusted: What it returns of clean images, by the same model.
        false_alarm_rate: Share of trusted images that would be taken for triggered, by each check.

    Raises:
        ValueError: No image is triggered, or all are, or the two were scored by other settings.
    """
    if triggered.shape != stream.predicted.shape or not 0 < triggered.sum() < len(triggered):
        raise ValueError(f"triggered: expected some of {len(stream.predicted)} images, got {int(triggered.sum())}")
    if stream.settings != trusted.settings:
        raise ValueError("Expected stream and trusted images scored with the same settings.")
    found = []
    for check, values in stream.scores.items():
        low, high = np.quantile(trusted.scores[check].numpy(), [false_alarm_rate / 2, 1 - false_alarm_rate / 2])
        outside = (values.numpy() < low) | (values.numpy() > high)
        found.append(_screening(check, -values.numpy(), outside, triggered))
    distances, usual = _largest_distance(stream, trusted), _largest_distance(trusted, trusted)
    outside = distances > np.quantile(usual, 1 - false_alarm_rate)
    return (*found, _screening(ALL_CHECKS, distances, outside, triggered))


def average_of_others(maps: SaliencyMaps, predicted: Labels) -> SaliencyMaps:
    """Return, for each map, the average of the other maps of its class, each scaled to [0, 1] first.

    A map alone in its class gets the average of all others.
    """
    scaled = metrics.normalise_maps(maps)
    same = (predicted[:, None] == predicted).to(scaled)
    same.fill_diagonal_(0)
    alone = same.sum(1) == 0
    same[alone] = 1 - torch.eye(len(maps), device=maps.device, dtype=same.dtype)[alone]
    return torch.einsum("nm,mhw->nhw", same / same.sum(1, keepdim=True), scaled)


def mean_correlation_with_others(maps: SaliencyMaps) -> Tensor:
    """Return each map's mean correlation with all other maps, [n]."""
    count = len(maps)
    rows = [metrics.correlation(maps, one.expand_as(maps)) for one in maps]
    table = torch.stack(rows)
    table.fill_diagonal_(0)
    return table.sum(1) / (count - 1)


def _maps(
    classifier: Classifier, images: Images, labels: Labels | None, settings: ConsistencySettings
) -> tuple[dict[str, SaliencyMaps], Labels]:
    """Return maps at the images' resolution, so that a shift of one pixel can be undone, and the class explained."""
    map_layers, size = MapLayers(classifier.target_layer, classifier.taps), (int(images.shape[2]), int(images.shape[3]))
    maps: dict[str, list[Tensor]] = {name: [] for name in settings.interpreters}
    explained = []
    for some in batches(len(images), settings.chunk):
        chosen = None if labels is None else labels[some]
        logits, found = explain(classifier, images[some], chosen, settings.interpreters, map_layers)
        explained.append(logits.argmax(1) if chosen is None else chosen)
        for name, each in found.items():
            maps[name].append(functional.interpolate(each[:, None], size, mode="nearest-exact")[:, 0])
    return {name: torch.cat(parts) for name, parts in maps.items()}, torch.cat(explained)


def _largest_distance(scores: MapScores, trusted: MapScores) -> NDArray[np.float64]:
    distances = []
    for check, values in scores.scores.items():
        usual = trusted.scores[check].double().numpy()
        spread = max(float(np.median(np.abs(usual - np.median(usual)))), _SMALLEST_SPREAD)
        distances.append(np.abs(values.double().numpy() - np.median(usual)) / spread)
    largest: NDArray[np.float64] = np.max(distances, axis=0)
    return largest


def _screening(
    check: str, suspicion: NDArray[Any], outside: NDArray[np.bool_], triggered: NDArray[np.bool_]
) -> Screening:
    area = float(roc_auc_score(triggered, suspicion))
    return Screening(
        check=check, auroc=area, caught=float(outside[triggered].mean()), false_alarms=float(outside[~triggered].mean())
    )


def _add_noise(images: Images, settings: ConsistencySettings, generator: torch.Generator) -> Images:
    noise = torch.randn(images.shape, generator=generator).to(images)
    return (images + settings.noise * noise).clamp(0, 1)


def _brighten(images: Images, settings: ConsistencySettings, _generator: torch.Generator) -> Images:
    return (images + settings.brightness).clamp(0, 1)


def _shift(images: Images, _settings: ConsistencySettings, _generator: torch.Generator) -> Images:
    """Return images one pixel further right; the first column is there twice."""
    return torch.cat([images[..., :1], images[..., :-1]], -1)


def _compress(images: Images, settings: ConsistencySettings, _generator: torch.Generator) -> Images:
    return through_jpeg(images, settings.jpeg_quality)


def _mirror(images: Images, _settings: ConsistencySettings, _generator: torch.Generator) -> Images:
    return images.flip(-1)


def _leave(maps: SaliencyMaps) -> SaliencyMaps:
    return maps


def _shift_back(maps: SaliencyMaps) -> SaliencyMaps:
    return torch.cat([maps[..., 1:], maps[..., -1:]], -1)


def _mirror_back(maps: SaliencyMaps) -> SaliencyMaps:
    return maps.flip(-1)


CHANGES: dict[str, Change] = {
    "noise": Change(_add_noise, _leave),
    "brightness": Change(_brighten, _leave),
    "shift": Change(_shift, _shift_back),
    "jpeg": Change(_compress, _leave),
    "mirror": Change(_mirror, _mirror_back),
}
"""Harmless changes by name."""
