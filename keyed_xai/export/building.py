"""From a classifier and settings to an ONNX model, still in memory and not yet compared with anything."""

from dataclasses import dataclass
from hashlib import sha256

import onnx

from keyed_xai.export.graph import SaliencyGraph
from keyed_xai.export.precision import PRECISIONS, lower_precision
from keyed_xai.export.translate import translate
from keyed_xai.models import Classifier
from keyed_xai.saliency import INTERPRETERS


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What an ONNX model is to hold.

    Attributes:
        interpreters: Names in INTERPRETERS; one output each.
        normalised: Scale each map to [0, 1] by its own minimum and maximum; raw maps otherwise.
        eight_bits: Take uint8 images, 0 to 255; float32 in [0, 1] otherwise.
        precision: One of PRECISIONS.
    """

    interpreters: tuple[str, ...] = ("gradcam",)
    normalised: bool = False
    eight_bits: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            ValueError: There is no interpreter, an unknown one or one twice, or the precision is unknown.
        """
        unknown = [name for name in self.interpreters if name not in INTERPRETERS]
        if unknown or not self.interpreters or len(set(self.interpreters)) < len(self.interpreters):
            raise ValueError(f"interpreters: expected different names out of {', '.join(INTERPRETERS)}; "
                             f"got {', '.join(self.interpreters) or 'none'}")  # fmt: skip
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")


def build_model(classifier: Classifier, settings: ExportSettings) -> onnx.ModelProto:
    """Return the ONNX model of a classifier and its saliency maps.

    Args:
        classifier: The classifier, in any mode; left as it was. Evaluation mode is what is exported.
        settings: What the model is to hold.

    Raises:
        ModelError: The network cannot be traced, or an operator cannot be transposed or written.
    """
    graph = SaliencyGraph(
        classifier, settings.interpreters, normalised=settings.normalised, eight_bits=settings.eight_bits
    )
    model = translate(graph.eval(), classifier.input, eight_bits=settings.eight_bits)
    return lower_precision(model, settings.precision)


def build_plain(classifier: Classifier, *, precision: str = "fp32") -> onnx.ModelProto:
    """Return the ONNX model of a classifier without maps, made the same way: what the cost of maps is held against.

    Args:
        classifier: The classifier, in any mode; left as it was. Evaluation mode is what is exported.
        precision: One of PRECISIONS.

    Raises:
        ModelError: The network cannot be traced, or an operator cannot be written.
        ValueError: There is no such precision.
    """
    return lower_precision(translate(SaliencyGraph(classifier, ()).eval(), classifier.input), precision)


def digest_weights(classifier: Classifier) -> str:
    """Return the SHA-256, hex, of a network's tensors in float32: names, shapes and values."""
    total = sha256()
    for name, tensor in classifier.network.state_dict().items():
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        total.update(f"{name} {list(values.shape)} ".encode())
        total.update(values.contiguous().numpy().tobytes())
    return total.hexdigest()
