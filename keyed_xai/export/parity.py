"""Whether onnxruntime computes what PyTorch does: on images that the graph was not made with, at several batch sizes.

The truth is the classifier in float64. SimpleGrad in float32 differs between any two runtimes where a ReLU flips at
zero, so that its distance is held against that of PyTorch's own float32; all other outputs are held to a fixed limit.
"""

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyed_xai.errors import ModelError
from keyed_xai.export.graph import PREDICTED
from keyed_xai.inference.sessions import load_session, run_session
from keyed_xai.metrics import correlation, normalise_maps
from keyed_xai.models import Classifier
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency import MapLayers, explain
from keyed_xai.tensors import Images, Labels, SaliencyMaps

BATCHES = (1, 3, 8)
"""Images at once; so many of each kind are compared."""
IMAGES = sum(BATCHES)
_FAINT = 0.01  # of the typical size: smaller truths are compared at this size
Runner = Callable[[Mapping[str, NDArray[Any]]], Sequence[NDArray[Any]]]
"""Inputs by name to logits and maps, as an ONNX graph with them runs."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How well one output agreed with the float64 truth in one batch.

    Attributes:
        output: "logits" or "saliency_<interpreter>".
        images: "random" or "real".
        batch: Images at once.
        largest: Largest difference of any image, relative to the largest value of the truth of that image.
            Faint truths count as a hundredth of the usual, see `measure_agreement`.
        l2: Median of the images' L2 distances, relative to the length of the truth.
        eager_l2: The same of PyTorch in float32.
        correlation: Smallest Pearson correlation with the truth of any image.
        same_top: Share of images whose largest value is at the same place.
        empty: Share of images whose truth is zero everywhere, so that nothing was compared but that.
    """

    output: str
    images: str
    batch: int
    largest: float
    l2: float
    eager_l2: float
    correlation: float
    same_top: float
    empty: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "Figures":
        """Return the figures of a document that fits its schema."""
        return cls(**{field.name: document[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an export must keep to.

    Attributes:
        largest: Largest difference of logits and VisualBackProp, see `Figures.largest`: both follow the image without a
            jump.
        flipped: Largest difference of Grad-CAM, which jumps where a ReLU behind its layer flips at zero.
        median: Largest median, over batches, of the L2 distance of all three.
        eager: SimpleGrad's median L2 distance over that of PyTorch in float32.
        floor: SimpleGrad's median L2 distance that is always good enough.
        correlation: Smallest correlation of any SimpleGrad map.
    """

    largest: float
    flipped: float
    median: float
    eager: float
    floor: float
    correlation: float


LIMITS = {
    "fp32": Limits(largest=1e-3, flipped=1e-2, median=1e-3, eager=1.5, floor=1e-4, correlation=0.9),
    "fp16": Limits(largest=math.inf, flipped=math.inf, median=0.03, eager=1.5, floor=0.25, correlation=0.9),
    "int8": Limits(largest=math.inf, flipped=math.inf, median=0.15, eager=1.5, floor=0.4, correlation=0.8),
}
"""By precision. In fp32 a fault of the graph shows on all images, most of which agree to 1e-5; in Grad-CAM of
DenseNet121 one image in some dozens differs by a few thousandths. The limits of fp16 and int8 say what is still the
same explanation, not that the numbers are the same.

They stand above the worst that trained networks showed (ResNet50 and DenseNet121 on chest radiographs, a protected
SmallResNet on clothes; random and real images). Median distance: fp16 0.004, int8 0.04. SimpleGrad's: fp16 0.16, int8
0.33; its correlation: fp16 0.96, int8 0.89, but of DenseNet121 in int8 0.74, which is refused: rounded weights flip too
many of its ReLUs. No largest difference, because logits, or a map of Grad-CAM, that are nearly zero everywhere differ
from themselves by half when weights are rounded.
"""


def open_session(model: bytes) -> Runner:
    """Return a function that runs an ONNX model on the CPU.

    Raises:
        ModelError: onnxruntime refuses the model, then or when it is run.
    """
    session = load_session(model, ["CPUExecutionProvider"])
    return lambda inputs: run_session(session, dict(inputs))


def random_images(classifier: Classifier, generator: torch.Generator) -> Images:
    """Return smooth noise, half of it rough, in 8 bits: 12 images of the classifier's size."""
    spec = classifier.input
    rough = torch.rand(IMAGES, *spec.shape, generator=generator)
    sides = (max(1, spec.height // 8), max(1, spec.width // 8))
    coarse = torch.rand(IMAGES, spec.channels, *sides, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (spec.height, spec.width), mode="bilinear")
    smooth[::2] = 0.7 * smooth[::2] + 0.3 * rough[::2]
    return (smooth * 255).round() / 255


def compare(
    run: Runner,
    classifier: Classifier,
    interpreters: Sequence[str],
    images: Mapping[str, Images],
    *,
    normalised: bool = False,
    eight_bits: bool = False,
    generator: torch.Generator,
    progress: Progress = QUIET,
) -> list[Figures]:
    """Return how well each output agrees, for each kind of images at each batch size.

    The first batch is run without a target, the others with random ones, -1 (the predicted class) among them.

    Args:
        run: The ONNX graph.
        classifier: What it was made of, in float32 on the CPU.
        interpreters: Names in INTERPRETERS, in the order of the graph's maps.
        images: 12 each, 8 bits in [0, 1], by their kind: "random", "real".
        normalised: Whether the graph scales maps to [0, 1].
        eight_bits: Whether the graph takes uint8.
        generator: Draws the targets.
        progress: Hears of "comparing" batches.
    """
    exact = copy.deepcopy(classifier).double()
    map_layers = MapLayers(classifier.target_layer, classifier.taps)
    batches = [(kind, batch) for kind, each in images.items() for batch in torch.split(each, list(BATCHES))]
    outputs: list[tuple[str, list[tuple[Tensor, Tensor, Tensor]]]] = []
    for number, (kind, batch) in enumerate(batches):
        targets = _draw_targets(classifier, len(batch), generator) if number % len(BATCHES) else None
        found = _run(run, batch, targets if tuple(interpreters) != ("vbp",) else None, eight_bits=eight_bits)
        labels = found[0].argmax(1) if targets is None else torch.where(targets < 0, found[0].argmax(1), targets)
        truth, eager = (
            _outputs(model, pixels, labels, interpreters, map_layers, normalised=normalised)
            for model, pixels in ((exact, batch.double()), (classifier, batch))
        )
        outputs.append((kind, list(zip(found, truth, eager, strict=True))))
        progress.advance("comparing", number + 1, len(batches))
    names = ["logits", *(f"saliency_{name}" for name in interpreters)]
    typical = [torch.cat([each[place][1] for _, each in outputs]) for place in range(len(names))]
    return [
        measure_agreement(name, kind, *tensors, typical=truths)
        for kind, several in outputs
        for name, tensors, truths in zip(names, several, typical, strict=True)
    ]


def check_agreement(figures: Sequence[Figures], precision: str) -> None:
    """Check that the figures keep to the limits of a precision.

    Raises:
        ModelError: They do not, or every map of an output is empty, so that nothing was shown.
    """
    for output in dict.fromkeys(each.output for each in figures):
        own = [each for each in figures if each.output == output]
        if all(each.empty == 1 for each in own):
            raise ModelError(f"{output} is zero everywhere on all images, so nothing shows that the graph is right. "
                             "Are these the trained weights?")  # fmt: skip
        judge = _judge_simplegrad if output == "saliency_simplegrad" else _judge_exactly
        deviation = judge(own, LIMITS[precision])
        if deviation:
            raise ModelError(f"onnxruntime and PyTorch disagree in {output}: {deviation}. {_advise(output, precision)}")


def measure_agreement(
    output: str, kind: str, found: Tensor, truth: Tensor, eager: Tensor, *, typical: Tensor | None = None
) -> Figures:
    """Return how well one output agrees with its truth.

    Args:
        output: "logits" or "saliency_<interpreter>".
        kind: Kind of the images: "random" or "real".
        found: Outputs of the graph, [n, ...].
        truth: Outputs of the classifier in float64.
        eager: Outputs of the classifier in float32.
        typical: Truths of more images, which say how large they usually are. A truth below a hundredth of that, such as
            a Grad-CAM map that ReLU has all but emptied, is what rounding left of larger numbers: its differences are
            then relative to that hundredth. None takes each truth as it is.
    """
    found, truth, eager = (each.double().flatten(1) for each in (found, truth, eager))
    full = truth.abs().amax(1) > 0
    lengths = {order: _length(truth, order, typical) for order in (torch.inf, 2.0)}
    return Figures(
        output=output,
        images=kind,
        batch=len(found),
        largest=float(_relative(found - truth, torch.inf, lengths).max()),
        l2=float(_relative(found - truth, 2.0, lengths).median()),
        eager_l2=float(_relative(eager - truth, 2.0, lengths).median()),
        correlation=_smallest_correlation(found[full, None], truth[full, None]),
        same_top=float((found.argmax(1) == truth.argmax(1)).double().mean()),
        empty=1 - float(full.double().mean()),
    )


def _advise(output: str, precision: str) -> str:
    if precision == "fp32":
        return "Please report this fault of the export."
    return "Use --precision fp32" + (", or leave out simplegrad." if output == "saliency_simplegrad" else ".")


def _judge_exactly(own: Sequence[Figures], limits: Limits) -> str:
    """Return what is wrong with an output's figures; nothing where they keep to the limits."""
    largest = limits.flipped if own[0].output == "saliency_gradcam" else limits.largest
    for each in own:
        if not each.largest <= largest:  # NaN is no pass
            return f"{_where(each)} differ by {each.largest:.2g} of their largest value, at most {largest:g}"
    distance = statistics.median(each.l2 for each in own)
    if not distance <= limits.median:
        return f"relative L2 distance {distance:.2g}, at most {limits.median:g}"
    return ""


def _judge_simplegrad(own: Sequence[Figures], limits: Limits) -> str:
    """Return what is wrong with SimpleGrad's figures; nothing where they keep to the limits.

    In float32 one image in a few has a ReLU that flips, and then differs a thousand times more than others, by chance
    in one runtime and not in the other: so the batches' median is held against the largest that PyTorch shows.
    """
    distance, eager = statistics.median(each.l2 for each in own), max(each.eager_l2 for each in own)
    if not distance <= max(limits.eager * eager, limits.floor):
        return (f"relative L2 distance {distance:.2g}, PyTorch's own in float32 {eager:.2g}; at most {limits.eager} "
                f"times that, or {limits.floor:g}")  # fmt: skip
    for each in own:
        if not each.correlation >= limits.correlation:
            return f"{_where(each)} correlate by {each.correlation:.3f}, at least {limits.correlation}"
    return ""


def _where(figures: Figures) -> str:
    return f"{figures.images} images in a batch of {figures.batch}"


def _draw_targets(classifier: Classifier, count: int, generator: torch.Generator) -> Labels:
    targets = torch.randint(classifier.classes, (count,), generator=generator)
    targets[::3] = PREDICTED
    return targets


def _run(run: Runner, batch: Images, targets: Labels | None, *, eight_bits: bool) -> list[Tensor]:
    pixels = (batch * 255).round().to(torch.uint8) if eight_bits else batch
    inputs = {"image": pixels.numpy()} | ({} if targets is None else {"target": targets.numpy()})
    return [torch.from_numpy(np.asarray(each, dtype=np.float32)) for each in run(inputs)]


def _outputs(
    model: Classifier,
    batch: Images,
    labels: Labels,
    interpreters: Sequence[str],
    map_layers: MapLayers,
    *,
    normalised: bool,
) -> list[Tensor]:
    logits, maps = explain(model, batch, labels, interpreters, map_layers)
    return [logits, *(normalise_maps(each) if normalised else each for each in maps.values())]


def _length(truth: Tensor, order: float, typical: Tensor | None) -> Tensor:
    """Return the norm of each truth [n, d], or a hundredth of the median of the typical truths that are not zero."""
    length: Tensor = torch.linalg.vector_norm(truth, order, dim=1)
    if typical is None:
        return length
    norms = torch.linalg.vector_norm(typical.double().flatten(1), order, dim=1)
    return length.clamp_min(_FAINT * float(norms[norms > 0].median()) if (norms > 0).any() else 0.0)


def _relative(difference: Tensor, order: float, lengths: Mapping[float, Tensor]) -> Tensor:
    """Return each image's distance over its length; infinite where only the truth is zero or NaN came."""
    distance = torch.linalg.vector_norm(difference, order, dim=1)
    relative = torch.where(distance == 0, 0.0, distance / lengths[order])
    return relative.nan_to_num(torch.inf, torch.inf)


def _smallest_correlation(found: SaliencyMaps, truth: SaliencyMaps) -> float:
    return float(correlation(found, truth).min()) if len(found) else 1.0
