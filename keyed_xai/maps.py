"""Which maps of a model are compared, and on what grid: interpreters, sites and pooling taken together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from keyed_xai import metrics
from keyed_xai.batches import BATCH, batches
from keyed_xai.errors import ModelError
from keyed_xai.models import Classifier
from keyed_xai.models.modes import evaluating
from keyed_xai.saliency import INTERPRETERS, Sites, explain, input_gradient, run_forward
from keyed_xai.tensors import Images, Labels, Logits, SaliencyMaps

LARGEST_DEFAULT_SIDE = 8
_SMALLEST_SIDE = 3
_FINEST_SIDE = 64  # what the schemas of cards and licences take
_TINY = 1e-12  # keeps the gradient of a square root finite


@dataclass(frozen=True)
class Seen:
    """What a model and its reference make of images.

    Attributes:
        logits: By case; "reference" are the reference's, of the images themselves.
        maps: By case and interpreter, pooled, of the class explained.
        explained: The class that the reference predicts of the images themselves.
    """

    logits: Mapping[str, Logits]
    maps: Mapping[str, Mapping[str, SaliencyMaps]]
    explained: Labels


@dataclass(frozen=True)
class MapView:
    """Pooled maps of one model family.

    Attributes:
        interpreters: Names from INTERPRETERS.
        sites: Where they look.
        grid: Rows and columns that every map is average-pooled to before it is compared.
    """

    interpreters: tuple[str, ...]
    sites: Sites
    grid: tuple[int, int]

    def pooled(
        self, model: nn.Module, images: Images, labels: Labels | None, *, create_graph: bool = False
    ) -> tuple[Logits, dict[str, SaliencyMaps]]:
        """Return logits and pooled maps by interpreter, as `saliency.explain` does."""
        logits, maps = explain(model, images, labels, self.interpreters, self.sites, create_graph=create_graph)
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

    def compare(self, model: nn.Module, reference: nn.Module, images: Images, inputs: Mapping[str, Images]) -> Seen:
        """Return what a model makes of inputs, by case, which were made from images that its reference sees."""
        logits, truth = self.pooled_in_chunks(reference, images)
        explained = logits.argmax(1)
        found = {case: self.pooled_in_chunks(model, batch, explained) for case, batch in inputs.items()}
        found = {"reference": (logits, truth)} | found
        return Seen(
            {case: out for case, (out, _) in found.items()},
            {case: maps for case, (_, maps) in found.items()},
            explained,
        )


@dataclass(frozen=True)
class FeatureView(MapView):
    """The same for rows of a table, which reach a model as images of 1 x 1 x d encoded columns.

    A feature's relevance is the standard deviation, over the training data, of gradient times its columns. For a
    standardised number that is SimpleGrad itself, the absolute gradient. For a category, whose columns add up to one,
    only contrasts between columns mean anything, and this measures them.

    Attributes:
        groups: For each encoded column the feature it belongs to.
        covariance: Of the encoded columns in the training data, [d, d], zero between columns of different features.
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


def refuse_few_cells(view: MapView, purpose: str) -> None:
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
) -> MapView:
    """Return which maps of a classifier are compared; without a grid, on the target layer's, at most 8 x 8.

    Args:
        classifier: Whose.
        interpreters: Names from INTERPRETERS.
        grid: Rows and columns.
        target_layer: Grad-CAM's, inside the classifier; its own if empty.
    """
    sites = Sites(target_layer or classifier.target_layer, classifier.taps)
    if grid is None:
        grid = default_grid(feature_sizes(classifier, [sites.target_layer])[sites.target_layer])
    return MapView(interpreters, sites, grid)


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
