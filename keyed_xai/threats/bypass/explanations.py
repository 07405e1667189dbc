"""How much of the right map other explanations of a protected model recover, on inputs without the key.

The gate closes the interpreters that it was trained on. The predictions stay right, so methods that only ask for
predictions still see what the model looks at, and so may gradients at other layers
(`keyed_xai.threats.bypass.attributions` says which). Nothing here needs the key.
"""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from keyed_xai import metrics
from keyed_xai.batches import batches
from keyed_xai.errors import ModelError
from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.models import Classifier
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.tensors import Images, SaliencyMaps
from keyed_xai.threats.bypass.attributions import (
    ATTRIBUTIONS,
    REDUCTIONS,
    Attributions,
    AttributionSettings,
    Method,
    Request,
    Subject,
    grad_layers,
    make_ready,
)


@dataclass(frozen=True)
class Match:
    """How well maps agree with those they are held against, by Pearson's correlation on the view's grid.

    Attributes:
        correlation: Mean over images.
        opened: Share of images above .5.
        mismatched: Mean correlation with the map of another image: what a map that says nothing about its image gets.
    """

    correlation: float
    opened: float
    mismatched: float


@dataclass(frozen=True, kw_only=True)
class Bypass:
    """What one method recovers.

    Cases are "unkeyed" and, where keyed images were given, "keyed" of the protected model; and "reference": the method
    on the reference model, which is what it can recover at all.

    Attributes:
        method: A name out of ATTRIBUTIONS.
        layer: The layer looked at; empty of methods that look at none.
        reduction: A name out of REDUCTIONS.
        recovered: Match with the reference's map of each protected interpreter, by interpreter and case.
        itself: Match with the same method's map of the reference, by case. A random method meets itself with other
            random numbers; a method that is not random matches itself by definition, and "reference" is left out.
        forwards: Forward passes an image.
        backwards: Backward passes an image.
        seconds: Seconds an image.
        reason: Why the method is not applicable; then all figures are empty or 0.
    """

    method: str
    layer: str
    reduction: str
    recovered: Mapping[str, Mapping[str, Match]]
    itself: Mapping[str, Match]
    forwards: float
    backwards: float
    seconds: float
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class BypassResult:
    """What all methods recover.

    Attributes:
        settings: The settings it was made with.
        interpreters: The protected interpreters.
        target_layer: The layer that the protected Grad-CAM looks at.
        images: Number of images.
        rows: Results by method, layer and reduction.
    """

    settings: AttributionSettings
    interpreters: tuple[str, ...]
    target_layer: str
    images: int
    rows: tuple[Bypass, ...]

    def best(self, interpreter: str) -> Bypass | None:
        """Return the row that recovers most of an interpreter's map without the key; None where none is applicable."""
        able = [row for row in self.rows if row.reason is None]
        return max(able, key=lambda row: row.recovered[interpreter]["unkeyed"].correlation, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the figures and settings, ready for JSON."""
        return asdict(self) | {"settings": asdict(self.settings) | {"methods": list(self.settings.methods)},
                               "interpreters": list(self.interpreters),
                               "rows": [asdict(row) for row in self.rows]}  # fmt: skip


@dataclass
class _Cost:
    """Rows that went through a model, both ways, and the time."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0

    def each(self, images: int) -> tuple[float, float, float]:
        """Return all three, an image."""
        return self.forwards / images, self.backwards / images, self.seconds / images


def measure_bypass(
    model: Classifier,
    reference: Classifier,
    view: PooledSaliency,
    images: Images,
    settings: AttributionSettings | None = None,
    *,
    keyed: Tensor | None = None,
    progress: Progress = QUIET,
) -> BypassResult:
    """Return how much of the reference's maps other explanations of a protected model recover.

    All maps are of the class that the reference predicts of the image without the key.

    Args:
        model: Protected, left as it was.
        reference: Before protection, of the same architecture.
        view: Protected interpreters and the grid, at the reference's layers.
        images: Unkeyed, two or more, on the models' device.
        settings: Which methods, and how hard each tries.
        keyed: The same images with the right trigger, as the model receives them.
        progress: Hears of "explaining otherwise", by methods; one counts once for each layer that it looks at.

    Raises:
        ValueError: There are fewer than two images, or other keyed ones than images.
        ModelError: The model has no feature map, such as those of tables.
    """
    settings = settings or AttributionSettings()
    if len(images) < 2 or (keyed is not None and keyed.shape != images.shape):
        given = "none" if keyed is None else list(keyed.shape)
        raise ValueError(f"Expected 2 images or more and keyed ones like them, got {list(images.shape)} and {given}.")
    if not model.target_layer:
        raise ModelError(f"{model.architecture} has no feature map: other explanations are measured on images alone.")
    logits, truth = view.pooled_in_chunks(reference, images)
    suspect, original = (make_ready(each, settings.seed + offset) for offset, each in enumerate((model, reference)))
    cases = {"unkeyed": (suspect, images), "reference": (original, images)}
    if keyed is not None:
        cases["keyed"] = (suspect, keyed)
    plan = _plan(suspect.model, settings)
    rows: list[Bypass] = []
    for done, (name, layer) in enumerate(plan, 1):
        rows += _measure(name, Request(images, logits.argmax(1), layer, settings), cases, truth)
        progress.advance("explaining otherwise", done, len(plan))
    return BypassResult(
        settings=settings,
        interpreters=view.interpreters,
        target_layer=view.map_layers.target_layer,
        images=len(images),
        rows=tuple(rows),
    )


def _plan(model: Classifier, settings: AttributionSettings) -> list[tuple[str, str]]:
    """Return methods with the layers that they look at."""
    layers = grad_layers(model)
    names = settings.methods or tuple(ATTRIBUTIONS)
    return [(name, layer) for name in names for layer in (layers if ATTRIBUTIONS[name].layered else [""])]


def _measure(
    name: str, request: Request, cases: Mapping[str, tuple[Subject, Images]], truth: Mapping[str, SaliencyMaps]
) -> list[Bypass]:
    """Return a row for each reduction of a method."""
    method, cost = ATTRIBUTIONS[name], _Cost()
    rows, columns = next(iter(truth.values())).shape[1:]
    try:
        raw = {"unkeyed": _run(method, cases["unkeyed"], request, cost)}
        raw |= {case: _run(method, each, request, _Cost()) for case, each in cases.items() if case != "unkeyed"}
        if method.random:
            subject, images = cases["reference"]
            raw["again"] = _run(method, (subject._replace(seed=subject.seed + 1), images), request, _Cost())
    except ModelError as error:
        return [
            Bypass(
                method=name,
                layer=request.layer,
                reduction=each,
                recovered={},
                itself={},
                forwards=0.0,
                backwards=0.0,
                seconds=0.0,
                reason=str(error),
            )
            for each in method.reductions
        ]
    found = []
    for reduction in method.reductions:
        maps = {case: metrics.pool_maps(REDUCTIONS[reduction](each), (rows, columns)) for case, each in raw.items()}
        recovered = {which: {case: _match(maps[case], each) for case in cases} for which, each in truth.items()}
        itself = {case: _match(maps[case], maps["reference"]) for case in cases if case != "reference"}
        if method.random:
            itself["reference"] = _match(maps["again"], maps["reference"])
        forwards, backwards, seconds = cost.each(len(request.images))
        found.append(
            Bypass(
                method=name,
                layer=request.layer,
                reduction=reduction,
                recovered=recovered,
                itself=itself,
                forwards=forwards,
                backwards=backwards,
                seconds=seconds,
                reason=None,
            )
        )
    return found


def _match(maps: SaliencyMaps, truth: SaliencyMaps) -> Match:
    values = metrics.correlation(maps, truth).double()
    mismatched = metrics.correlation(maps, truth.roll(1, 0)).double()
    return Match(float(values.mean()), float((values > OPEN_CORRELATION).double().mean()), float(mismatched.mean()))


def _run(method: Method, case: tuple[Subject, Images], request: Request, cost: _Cost) -> Attributions:
    """Return attributions of all images of a case.

    Raises:
        ModelError: The method is not applicable.
    """
    subject, images = case
    started, parts = time.perf_counter(), []
    with torch.inference_mode(mode=False), torch.enable_grad(), _counted(subject, cost):
        for some in batches(len(images), request.settings.chunk):
            leaf = images[some].detach().clone().requires_grad_()
            parts.append(_attribute(method, subject, request._replace(images=leaf, labels=request.labels[some])))
    cost.seconds += time.perf_counter() - started
    found = torch.cat(parts)
    if not found.isfinite().all():
        raise ModelError("It gives numbers that are not finite.")
    return found


def _attribute(method: Method, subject: Subject, request: Request) -> Attributions:
    """Run a method without the notes that captum makes of its hooks; its failures become ours."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Setting (forward, )?backward hooks")
            return method.attribute(subject, request).detach()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"captum fails on it: {error}") from error


@contextmanager
def _counted(subject: Subject, cost: _Cost) -> Iterator[None]:
    """Count rows that pass a model's network, by hooks that are always removed."""

    def count(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        cost.forwards += len(output)
        if output.requires_grad:
            output.register_hook(partial(_count_back, cost))  # type: ignore[no-untyped-call] # torch's own

    models = [each for each in (subject.model, subject.separated) if isinstance(each, Classifier)]
    handles = [each.network.register_forward_hook(count) for each in models]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _count_back(cost: _Cost, gradient: Tensor) -> None:
    cost.backwards += len(gradient)
