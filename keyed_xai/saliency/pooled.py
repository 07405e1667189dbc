"""Which maps of a model are compared, and on what grid: interpreters, layers and pooling taken together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from keyed_xai import metrics
from keyed_xai.batches import BATCH, batches
from keyed_xai.errors import ModelError
from keyed_xai.models import Classifier
from keyed_xai.models.modes import evaluating
from keyed_xai.saliency import INTERPRETERS, MapLayers, explain, input_gradient, run_forward
from keyed_xai.tensors import Images, Labels, Logits, SaliencyMaps

LARGEST_DEFAULT_SIDE = 8
_SMALLEST_SIDE = 3
_FINEST_SIDE = 64  # what the schemas of cards and licences take
_TINY = 1e-12  # keeps the gradient of a square root finite


@dataclass(frozen=True)
class PooledSaliency:
    """Pooled maps of one model family.

    Attributes:
        interpreters: Names from INTERPRETERS.
        map_layers: The layers that they look at.
        grid: Rows and columns that every map is average-pooled to before it is compared.
    """

    interpreters: tuple[str, ...]
    map_layers: MapLayers
    grid: tuple[int, int]

    def pooled(
        self, model: nn.Module, images: Images, labels: Labels | None, *, create_graph: bool = False
    ) -> tuple[Logits, dict[str, SaliencyMaps]]:
        """Return logits and pooled maps by interpreter, as `saliency.explain` does."""
        logits, maps = explain(model, images, labels, self.interpreters, self.map_layers, create_graph=create_graph)
        return logits, {name: metrics.pool_maps(each, self.grid) for name, each in maps.items()}

    def pooled_in_chunks(
        self, model: nn.Module, images: Images, labels: Labels | None = None, *, chunk: int = BATCH
    ) -> tuple[Logits, dict[str, SaliencyMaps]]:
        """Return the same without graphs, `chunk` images at a time, on the images' device."""
        parts = [
            self.pooled(model, images[some], None if labels is None else labels[some])
            for some in batches(len(images), chunk)
        ]
        return torch.cat([logits for logits, _ in parts]), join_maps([maps for _, maps in parts])


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model makes of inputs, beside the right maps of the images that the inputs were made from.

    Attributes:
        logits: Logits of the inputs.
        maps: Pooled maps of the inputs, by interpreter, of the classes explained; empty where predictions alone count.
        right: The reference's pooled maps of the images, by interpreter.
        explained: The class that the reference predicts of each image.
    """

    logits: Logits
    maps: Mapping[str, SaliencyMaps]
    right: Mapping[str, SaliencyMaps]
    explained: Labels

    @cached_property
    def correlations(self) -> dict[str, Tensor]:
        """Correlation of each map with the right one, [n] by interpreter; 0 where numbers are not finite."""
        return {name: metrics.correlation(each, self.right[name]).nan_to_num(0) for name, each in self.maps.items()}

    @property
    def correlation(self) -> dict[str, float]:
        """The mean correlation with the right maps, by interpreter."""
        return {name: _mean(each) for name, each in self.correlations.items()}

    @property
    def opened(self) -> dict[str, float]:
        """The share of maps that correlate more than .5 with the right ones, by interpreter."""
        return {name: _mean(each > metrics.OPEN_CORRELATION) for name, each in self.correlations.items()}

    @property
    def agreement(self) -> float:
        """The share of inputs that are predicted as the reference predicts the image."""
        return _mean(self.logits.argmax(1) == self.explained)


@dataclass(frozen=True)
class Comparison:
    """Holds models against a reference: the same images, the classes that it predicts of them, and its maps.

    Attributes:
        reference: Its maps are the right ones.
        view: Maps compared, at the reference's layers.
        images: What the reference sees.
    """

    reference: nn.Module = field(repr=False)
    view: PooledSaliency
    images: Images = field(repr=False)

    @cached_property
    def right(self) -> Outputs:
        """What the reference itself makes of the images; it is run once."""
        logits, maps = self.view.pooled_in_chunks(self.reference, self.images)
        return Outputs(logits=logits, maps=maps, right=maps, explained=logits.argmax(1))

    def of(
        self, model: nn.Module, inputs: Images, *, view: PooledSaliency | None = None, rows: Tensor | None = None
    ) -> Outputs:
        """Return what a model makes of inputs that were made from the images.

        Args:
            model: The model, on the images' device.
            inputs: Such as the images with a trigger.
            view: The same maps at the model's own layers, where these are not the reference's.
            rows: Which image each input was made from; None for one of each image in order.
        """
        right, explained = self.right.maps, self.right.explained
        if rows is not None:
            right, explained = {name: each[rows] for name, each in right.items()}, explained[rows]
        logits, maps = (view or self.view).pooled_in_chunks(model, inputs, explained)
        return Outputs(logits=logits, maps=maps, right=right, explained=explained)


@dataclass(frozen=True, kw_only=True)
class TableSaliency(PooledSaliency):
    """The same for rows of a table, which reach a model as images of 1 x 1 x d encoded columns.

    A feature's relevance is the standard deviation, over the training data, of gradient times its columns. For a
    standardised number that is SimpleGrad itself, the absolute gradient. For a category, whose columns add up to one,
    only contrasts between columns mean anything, and this measures them.

    Attributes:
        groups: Number of the feature that each encoded column belongs to.
        covariance: Covariance of the encoded columns in the training data, [d, d], zero between columns of different
            features.
    """

    groups: tuple[int, ...] = ()
    covariance: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def pooled(
        self, model: nn.Module, images: Images, labels: Labels | None, *, create_graph: bool = False
    ) -> tuple[Logits, dict[str, SaliencyMaps]]:
        """Return logits and the relevance of each feature, {"simplegrad": [n, 1, features]}."""
        with torch.inference_mode(mode=False), torch.enable_grad():
            run = run_forward(model, images, [], input_gradient=True)
            labels = run.logits.argmax(1) if labels is None else labels
            gradient = input_gradient(run.logits, run.images, labels, create_graph=create_graph)[:, 0]
        variance = gradient * (gradient @ self.covariance.to(gradient))
        columns = torch.tensor(self.groups, device=images.device)
        relevance = gradient.new_zeros(len(images), 1, self.grid[1]).index_add(2, columns, variance)
        relevance = (relevance.clamp(min=0) + _TINY).sqrt()
        if create_graph:
            return run.logits, {"simplegrad": relevance}
        return run.logits.detach(), {"simplegrad": relevance.detach()}


def check_choice(interpreters: tuple[str, ...], grid: tuple[int, int] | None) -> None:
    """Check which maps somebody asks for.

    Raises:
        ValueError: There is no interpreter, an unknown one or one twice, or the grid is too small to tell maps apart
            or too fine for a card.
    """
    unknown = [name for name in interpreters if name not in INTERPRETERS]
    if unknown or not interpreters or len(set(interpreters)) < len(interpreters):
        raise ValueError(f"interpreters: expected different names out of {', '.join(INTERPRETERS)}; "
                         f"got {', '.join(interpreters) or 'none'}")  # fmt: skip
    if grid is not None and min(grid) < _SMALLEST_SIDE:
        raise ValueError(f"grid: expected at least {_SMALLEST_SIDE} x {_SMALLEST_SIDE}, got {grid[0]} x {grid[1]}")
    if grid is not None and max(grid) > _FINEST_SIDE:
        raise ValueError(f"grid: expected at most {_FINEST_SIDE} x {_FINEST_SIDE}, got {grid[0]} x {grid[1]}")


def check_cells(view: PooledSaliency, purpose: str) -> None:
    """Check that a target layer has enough cells for a purpose.

    Raises:
        ModelError: It has fewer than 3 x 3.
    """
    if min(view.grid) < _SMALLEST_SIDE:
        raise ModelError(
            f"The target layer has {view.grid[0]} x {view.grid[1]} cells: too few for {purpose}, which needs "
            f"{_SMALLEST_SIDE} x {_SMALLEST_SIDE}. Name an earlier --target-layer or a larger --input-size."
        )


def join_maps(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the maps of several batches as one, by interpreter."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def make_view(
    classifier: Classifier, interpreters: tuple[str, ...], grid: tuple[int, int] | None, *, target_layer: str = ""
) -> PooledSaliency:
    """Return which maps of a classifier are compared; without a grid, on the target layer's, at most 8 x 8.

    Args:
        classifier: The classifier whose maps are compared.
        interpreters: Names from INTERPRETERS.
        grid: Rows and columns.
        target_layer: Grad-CAM's, inside the classifier; its own if empty.
    """
    map_layers = MapLayers(target_layer or classifier.target_layer, classifier.taps)
    if grid is None:
        grid = default_grid(feature_sizes(classifier, [map_layers.target_layer])[map_layers.target_layer])
    return PooledSaliency(interpreters, map_layers, grid)


def feature_sizes(classifier: Classifier, layers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return rows and columns of the feature maps of some layers, named inside the classifier."""
    spec = classifier.input
    blank = torch.full((1, *spec.shape), 0.5, device=classifier.mean.device)
    with evaluating(classifier), torch.no_grad():
        features = run_forward(classifier, blank, layers, input_gradient=False).features
    return {layer: (features[layer].shape[2], features[layer].shape[3]) for layer in layers}


def default_grid(feature_size: tuple[int, int]) -> tuple[int, int]:
    """Return the comparison grid for a target layer of this size: its own, at most 8 x 8.

    A signature pattern on 7 x 7 cells can show 45.8 bits of evidence, on 8 x 8 60.7; a finer one is slow to learn.
    """
    rows, columns = (min(side, LARGEST_DEFAULT_SIDE) for side in feature_size)
    return rows, columns


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
