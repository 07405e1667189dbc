"""The module that becomes the ONNX graph: images and targets in, logits and saliency maps out."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from keyed_xai.errors import ModelError
from keyed_xai.export.backward import BackwardProgram, Values
from keyed_xai.export.program import ATEN, trace_program
from keyed_xai.metrics import normalise_maps
from keyed_xai.models import Classifier
from keyed_xai.saliency import INTERPRETERS, project_back

PREDICTED = -1
"""The target that asks for the map of the predicted class."""


class SaliencyGraph(nn.Module):
    """Logits and saliency maps from one forward pass and no autograd.

    Attributes:
        interpreters: Names in INTERPRETERS, in the order of the maps.
        classes: Number of logits.
    """

    def __init__(
        self, classifier: Classifier, interpreters: Sequence[str], *, normalised: bool = False, eight_bits: bool = False
    ) -> None:
        """Make the graph; the classifier is left as it was.

        Args:
            classifier: Its target layer and taps are where the interpreters look.
            interpreters: Names in INTERPRETERS; none for logits alone.
            normalised: Scale each map to [0, 1] by its own minimum and maximum.
            eight_bits: Images are uint8, 0 to 255, instead of float32 in [0, 1].

        Raises:
            ModelError: The network cannot be traced, or an operator on the way of a gradient cannot be transposed.
            ValueError: An interpreter is unknown.
        """
        super().__init__()
        unknown = [name for name in interpreters if name not in INTERPRETERS]
        if unknown:
            raise ValueError(f"interpreters: expected names out of {', '.join(INTERPRETERS)}; got {list(interpreters)}")
        self.interpreters = tuple(interpreters)
        self.classes = classifier.classes
        self._taps = classifier.taps if "vbp" in interpreters else ()
        self._size = (classifier.input.height, classifier.input.width)
        self._normalised, self._eight_bits = normalised, eight_bits
        layers = _layers(classifier, self.interpreters)
        self._program = trace_program(classifier, layers)
        self._target = self._program.features[classifier.target_layer] if "gradcam" in interpreters else None
        self.backward_program = BackwardProgram(
            self._program, input_gradient="simplegrad" in interpreters, target=self._target
        )

    @property
    def takes_target(self) -> bool:
        """Whether a map depends on the class explained."""
        return bool({"gradcam", "simplegrad"} & set(self.interpreters))

    def forward(self, image: Tensor, target: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return logits [n, classes] and one map [n, rows, columns] for each interpreter.

        Args:
            image: [n, c, h, w], float32 in [0, 1], or uint8.
            target: int64 [n], the class explained; -1, or no target at all, for the one predicted.
        """
        values = self.backward_program.run(image / 255.0 if self._eight_bits else image)
        logits = values[self._program.logits]
        labels = logits.argmax(1)
        if target is not None and self.takes_target:
            labels = torch.where(target < 0, labels, target)
        maps = [_METHODS[name](self, values, labels) for name in self.interpreters]
        return logits, *(map(normalise_maps, maps) if self._normalised else maps)

    def _gradcam(self, values: Values, labels: Tensor) -> Tensor:
        assert self._target is not None  # set where "gradcam" is among the interpreters
        weights = self.backward_program.target_weights(values, labels, self._target)
        features: Tensor = values[self._target]
        return (weights[:, :, None, None] * features).sum(1).relu()

    def _simplegrad(self, values: Values, labels: Tensor) -> Tensor:
        seed = _margin_gradient(values[self._program.logits], labels)
        return self.backward_program.gradient(values, seed, self._program.image).abs().sum(1)

    def _visualbackprop(self, values: Values, _labels: Tensor) -> Tensor:
        nodes = [self._program.features[tap.layer] for tap in self._taps]
        return project_back([_channel_mean(node, values[node]) for node in nodes], self._taps, self._size)


_METHODS = {
    "gradcam": SaliencyGraph._gradcam,
    "simplegrad": SaliencyGraph._simplegrad,
    "vbp": SaliencyGraph._visualbackprop,
}


def _channel_mean(node: fx.Node, maps: Tensor) -> Tensor:
    """Return the mean over channels [n, 1, h, w] of a node's feature maps, negative values counted as 0.

    A convolution with equal weights: on the CPU onnxruntime takes a third of the time of a mean over an axis.
    """
    positive = maps if node.target is ATEN.relu.default else maps.clamp_min(0)
    channels = maps.shape[1]
    weights = torch.full((1, channels, 1, 1), 1 / channels, dtype=maps.dtype, device=maps.device)
    return functional.conv2d(positive, weights)


def _layers(classifier: Classifier, interpreters: Sequence[str]) -> list[str]:
    if not classifier.target_layer and set(interpreters) & {"gradcam", "vbp"}:
        raise ModelError(
            f"{classifier.architecture} has no feature map, so Grad-CAM and VisualBackProp have nothing to read. "
            "Export simplegrad alone."
        )
    layers = [classifier.target_layer] if "gradcam" in interpreters else []
    return layers + [tap.layer for tap in classifier.taps if "vbp" in interpreters and tap.layer not in layers]


def _margin_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient, with respect to the logits, of logsumexp of the other logits minus the labelled one."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    chosen = classes == labels[:, None]
    if logits.shape[1] == 1:
        return -torch.ones_like(logits)
    others = torch.where(chosen, float("-inf"), logits).softmax(1)
    return torch.where(chosen, -1.0, others)
