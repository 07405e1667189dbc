"""What a protected model will be able to prove, settled before training: layer, cells, and how far they reach."""

from dataclasses import dataclass, replace
from math import log2, prod

from keyed_xai.errors import ModelError, TrainingError
from keyed_xai.models import Classifier
from keyed_xai.models.layers import derive_taps, find_target_layer, trace_network
from keyed_xai.ownership.tests import counted_interpreters, overlap_tail, product_tail
from keyed_xai.ownership.verdict import DEFAULT_ALPHA
from keyed_xai.saliency.pooled import PooledSaliency, default_grid, feature_sizes, make_view

SPARE_CELLS = 1
"""Cells of a pattern that may be wrong in a protected model and leave its owner's claim within the default level."""
_DECOYS = 999  # that verify tries by default
_WIDEST = 4  # times the target layer's side: maps of still earlier layers say little about the class
_SEARCH = 2  # what p is multiplied by for the search through re-encodings that may follow


@dataclass(frozen=True)
class Evidence:
    """Where a claim will rest.

    Attributes:
        view: Maps compared; its target layer is the classifier's, or an earlier one with more cells.
        log2_p: Least p-value that `verify` can come to with one cell wrong, base-2 logarithm; 0 without a test.
        sentence: What was chosen and why, where it is another layer; empty otherwise.
    """

    view: PooledSaliency
    log2_p: float
    sentence: str = ""

    @property
    def is_enough(self) -> bool:
        """Whether the claim can be shown at the default level."""
        return self.log2_p <= log2(DEFAULT_ALPHA)


def choose_evidence(
    classifier: Classifier,
    interpreters: tuple[str, ...],
    grid: tuple[int, int] | None,
    *,
    decoy: str = "signature",
    fixed_layer: bool = False,
) -> Evidence:
    """Return the evidence on the classifier's own target layer, or on the last earlier one that has enough cells.

    An earlier layer is taken only where no grid is asked for and the target layer is the one that recognition finds,
    and none with feature maps of more than four times its side.

    Args:
        classifier: The classifier, in any mode; left as it is.
        interpreters: Interpreters whose maps are closed.
        grid: Rows and columns that maps are compared on; None takes the layer's, at most 8 x 8.
        decoy: What closed maps show; only "signature" is evidence by default.
        fixed_layer: Keep the target layer in any case.
    """
    sizes = named_layers(classifier)
    found = _evidence_at(classifier, classifier.target_layer, sizes, interpreters, grid, decoy)
    own = f"network.{find_target_layer(classifier.network, classifier.input)}"
    if found.is_enough or grid is not None or fixed_layer or classifier.target_layer != own:
        return found
    widest = _WIDEST * max(sizes[own])
    for layer in [layer for layer, size in sizes.items() if layer != own and max(size) <= widest]:
        other = _evidence_at(classifier, layer, sizes, interpreters, grid, decoy)
        if other.is_enough:
            few, more = ("{} x {}".format(*each.view.grid) for each in (found, other))
            name = layer.removeprefix("network.")
            return replace(
                other,
                sentence=f"Ownership cannot be shown with the {few} cells of {own.removeprefix('network.')}: using "
                f"{name} ({more}), as --target-layer {name} would.",
            )
    return found


def check_evidence(evidence: Evidence, interpreters: tuple[str, ...], decoy: str) -> None:
    """Check that a claim can be shown after training.

    Raises:
        TrainingError: It cannot; the message says what to change.
    """
    if evidence.is_enough:
        return
    otherwise = "Or give --without-ownership (ownership=False in Python) to protect the maps alone."
    if decoy != "signature":
        raise TrainingError(
            f"The decoy {decoy} holds no pattern of the owner's key, so that ownership could not be shown at 2^-40. "
            f"Use the decoy signature. {otherwise}"
        )
    if not counted_interpreters(interpreters):
        raise TrainingError(
            "VisualBackProp alone proves no ownership: rescaling channels changes its maps at no cost in accuracy, and "
            f"verify does not count them. Add --interpreter gradcam. {otherwise}"
        )
    rows, columns = evidence.view.grid
    raise TrainingError(
        f"Ownership counts as shown at 2^-40, and {' and '.join(interpreters)} on {rows} x {columns} cells can show no "
        f"more than 2^{evidence.log2_p:.1f} when one cell is wrong: 7 x 7 cells of the feature map are needed, or "
        "5 x 5 of both gradcam and simplegrad. Name an earlier --target-layer, give a larger --input-size, or add an "
        f"--interpreter. {otherwise}"
    )


def named_layers(classifier: Classifier) -> dict[str, tuple[int, int]]:
    """Return the layers that a claim may rest on, with the size of their feature maps.

    The target layer, then VisualBackProp's from last to first.
    """
    layers = list(dict.fromkeys([classifier.target_layer, *(tap.layer for tap in reversed(classifier.taps))]))
    return feature_sizes(classifier, layers)


def recognised_layers(classifier: Classifier) -> tuple[str, ...]:
    """Return the layers that recognition names in a network, whatever a card says: those that a claim may name.

    Empty where it finds no feature map, as in vision transformers.
    """
    network, spec = classifier.network, classifier.input
    trace = trace_network(network, spec)
    try:
        target = find_target_layer(network, spec, trace=trace)
    except ModelError:
        return ()
    taps = derive_taps(network, spec, target_layer=target, trace=trace)
    return tuple(dict.fromkeys(f"network.{layer}" for layer in (target, *(tap.layer for tap in reversed(taps)))))


def reach_of(cells: list[int]) -> float:
    """Return the base-2 logarithm of the least p-value with one cell wrong, of grids with so many cells each."""
    if not cells:
        return 0.0
    possible = sum(count // 2 for count in cells)
    ways, total = overlap_tail(cells, possible - SPARE_CELLS)
    return min(0.0, product_tail(log2(ways) - log2(total) - log2(1 + _DECOYS), 2) + log2(_SEARCH))


def _evidence_at(
    classifier: Classifier,
    layer: str,
    sizes: dict[str, tuple[int, int]],
    interpreters: tuple[str, ...],
    grid: tuple[int, int] | None,
    decoy: str,
) -> Evidence:
    view = make_view(classifier, interpreters, grid or default_grid(sizes[layer]), target_layer=layer)
    limits = {"gradcam": sizes[layer], "simplegrad": (classifier.input.height, classifier.input.width)}
    counted = counted_interpreters(interpreters) if decoy == "signature" else ()
    return Evidence(view, reach_of([prod(map(min, view.grid, limits[name])) for name in counted]))
