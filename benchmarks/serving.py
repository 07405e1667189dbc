"""The figures of exported graphs: how well they agree with PyTorch, and what a map costs, beside eager libraries.

Times are medians of interleaved runs in one process, a ratio is the median over rounds. Whoever has a GPU gets the same
table with ``device`` "cuda" and ``precision`` "fp16".
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyed_xai import metrics
from keyed_xai.batches import batches
from keyed_xai.errors import KeyedXAIError
from keyed_xai.export.building import ExportSettings, build_model, build_plain
from keyed_xai.export.parity import Figures, measure_agreement
from keyed_xai.inference.sessions import load_session
from keyed_xai.models import Classifier
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency import MapLayers, explain
from keyed_xai.tensors import Images, Labels

INTERPRETERS = ("gradcam", "vbp", "simplegrad")
GRAPHS = {name: (name,) for name in INTERPRETERS} | {"all three": INTERPRETERS}
"""Interpreters whose maps a graph holds, by the graph's name."""
_CELLS = (8, 8)  # that SimpleGrad's top is looked for on; one of 50,000 pixels says little
_CHUNK = 2  # images at once in float64
Action = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """How graphs are measured.

    Attributes:
        images: Compared with PyTorch.
        repeats: Rounds of timing; in each every side runs once.
        batch: Images at once where time is taken.
        threads: Threads of onnxruntime and of PyTorch.
        device: "cpu" or "cuda".
        precision: Precision of the graphs, one of `keyed_xai.export.precision.PRECISIONS`.
    """

    images: int = 50
    repeats: int = 15
    batch: int = 1
    threads: int = 1
    device: str = "cpu"
    precision: str = "fp32"

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        return asdict(self)


def measure_network(
    classifier: Classifier,
    images: Images,
    settings: ServingSettings,
    *,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Return a network's figures, as the schema "serving-figures" has them.

    Args:
        classifier: The classifier, in evaluation mode, on the CPU.
        images: Real ones, as many as are compared, in [0, 1].
        settings: How to measure.
        progress: Hears what is done next.
    """
    progress.advance(f"{classifier.architecture}: building graphs", 0, None)
    graphs = {"logits": encode(build_plain(classifier, precision=settings.precision))}
    for name, interpreters in GRAPHS.items():
        chosen = ExportSettings(interpreters=interpreters, precision=settings.precision)
        graphs[name] = encode(build_model(classifier, chosen))
    progress.advance(f"{classifier.architecture}: comparing with PyTorch", 0, None)
    parity = measure_parity(classifier, graphs["all three"], images, settings)
    progress.advance(f"{classifier.architecture}: timing", 0, None)
    return {
        "parity": parity,
        "times": measure_times(graphs, images, settings),
        "libraries": measure_libraries(classifier, graphs, images, settings),
    }


def encode(model: onnx.ModelProto) -> bytes:
    """Return a model as a runtime takes it."""
    data: bytes = model.SerializeToString()
    return data


def measure_parity(
    classifier: Classifier, graph: bytes, images: Images, settings: ServingSettings
) -> dict[str, dict[str, float]]:
    """Return how well a graph with all maps agrees with the classifier in float64, by output."""
    exact, eager, found = _float64(classifier, images), _eager(classifier, images), _run_all(graph, images, settings)
    figures = {}
    for name in ("logits", *INTERPRETERS):
        each = measure_agreement(name, "real", found[name], exact[name], eager[name])
        figures[name] = _agreement(each, found[name], exact[name])
    return figures


def measure_times(graphs: Mapping[str, bytes], images: Images, settings: ServingSettings) -> dict[str, dict[str, Any]]:
    """Return seconds of one run of each graph, and how many times those of the plain logits graph they are."""
    batch = images[: settings.batch].numpy()
    seconds = interleave({name: bind(graph, batch, settings) for name, graph in graphs.items()}, settings.repeats)
    return {
        name: {"seconds": statistics.median(each), "ratio": paired_ratio(each, seconds["logits"])}
        for name, each in seconds.items()
    }


def measure_libraries(
    classifier: Classifier, graphs: Mapping[str, bytes], images: Images, settings: ServingSettings
) -> dict[str, dict[str, Any]]:
    """Return images a second of a graph and of eager libraries that compute the same map, by library.

    captum explains a class that it is given: once it is told beforehand, once it has to be found with a forward pass of
    its own, since graph and pytorch-grad-cam find it in the pass that is timed. pytorch-grad-cam is left out where it
    is not installed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    classifier.to(settings.device)
    try:
        pixels = images[: settings.batch].to(settings.device)
        rows = {}
        for name, (interpreter, make) in _LIBRARIES.items():
            library = make(classifier, pixels)
            if library is not None:
                ours = bind(graphs[interpreter], images[: settings.batch].numpy(), settings)
                seconds = interleave({"ours": ours, "library": library}, settings.repeats)
                rates = {side: settings.batch / statistics.median(each) for side, each in seconds.items()}
                rows[name] = {**rates, "ratio": paired_ratio(seconds["library"], seconds["ours"])}
        return rows
    finally:
        classifier.to("cpu")
        torch.set_num_threads(threads)


def interleave(sides: Mapping[str, Action], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each side by round; every round runs all of them once, from another one on."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for action in sides.values():
        action()
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_ratio(side: Sequence[float], base: Sequence[float]) -> float:
    """Return the median of one side's times over the other's of the same round: a slow spell slows both."""
    return statistics.median(one / other for one, other in zip(side, base, strict=True))


def bind(graph: bytes, batch: NDArray[np.float32], settings: ServingSettings) -> Action:
    """Return a function that runs a graph once on a batch that lies on the device already.

    Raises:
        KeyedXAIError: onnxruntime does not run on the device.
    """
    session = _open(graph, settings)
    binding = session.io_binding()
    on_device = onnxruntime.OrtValue.ortvalue_from_numpy(batch, settings.device, 0)
    binding.bind_ortvalue_input("image", on_device)
    for output in session.get_outputs():
        binding.bind_output(output.name, settings.device)
    return lambda: session.run_with_iobinding(binding)


def render_networks(networks: Mapping[str, Mapping[str, Any]], settings: ServingSettings) -> str:
    """Return the figures as Markdown tables."""
    parity = [
        "| network | output | largest relative difference | relative L2 (eager's own) | top cell agrees |",
        "|---|---|---|---|---|",
    ]
    times = [
        f"| network | logits alone | {' | '.join(GRAPHS)} | {' | '.join(f'over {name}' for name in _LIBRARIES)} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in networks.items():
        parity += [_parity_row(name, output, each) for output, each in figures["parity"].items()]
        times.append(_times_row(name, figures))
    where = f"{settings.device}, {settings.precision}, batch {settings.batch}, {settings.threads} threads"
    return "\n".join([f"### Graphs ({where})", "", *parity, "", *times, ""])


def _parity_row(network: str, output: str, each: Mapping[str, float]) -> str:
    return (f"| {network} | {output} | {each['largest']:.1e} | {each['l2']:.1e} ({each['eager_l2']:.1e}) "
            f"| {100 * each['same_cell']:.1f} % |")  # fmt: skip


def _times_row(network: str, figures: Mapping[str, Any]) -> str:
    times, libraries = figures["times"], figures["libraries"]
    ratios = [f"{times[name]['ratio']:.2f}" for name in GRAPHS]
    rates = [f"{libraries[name]['ratio']:.2f}" if name in libraries else "-" for name in _LIBRARIES]
    return f"| {network} | {1000 * times['logits']['seconds']:.1f} ms | {' | '.join([*ratios, *rates])} |"


def _agreement(figures: Figures, found: Tensor, exact: Tensor) -> dict[str, float]:
    """Return what is said of an output: its largest values may be looked for on coarser cells than it has."""
    same = figures.same_top
    if exact.ndim == 3 and exact.shape[1] > _CELLS[0]:
        tops = [metrics.pool_maps(each.double(), _CELLS).flatten(1).argmax(1) for each in (found, exact)]
        same = float((tops[0] == tops[1]).double().mean())
    return {
        "largest": figures.largest,
        "l2": figures.l2,
        "eager_l2": figures.eager_l2,
        "correlation": figures.correlation,
        "same_top": figures.same_top,
        "same_cell": same,
    }


def _float64(classifier: Classifier, images: Images) -> dict[str, Tensor]:
    try:
        return _eager(classifier.double(), images.double())
    finally:
        classifier.float()


def _eager(classifier: Classifier, images: Images) -> dict[str, Tensor]:
    map_layers = MapLayers(classifier.target_layer, classifier.taps)
    parts = [explain(classifier, each, None, INTERPRETERS, map_layers) for each in _chunks(images)]
    maps = {name: torch.cat([found[name] for _, found in parts]) for name in INTERPRETERS}
    return {"logits": torch.cat([logits for logits, _ in parts]), **maps}


def _run_all(graph: bytes, images: Images, settings: ServingSettings) -> dict[str, Tensor]:
    session = _open(graph, settings)
    parts = [session.run(None, {"image": each.numpy()}) for each in _chunks(images)]
    joined = [torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True)]
    return dict(zip(("logits", *INTERPRETERS), joined, strict=True))


def _chunks(images: Images) -> Sequence[Tensor]:
    return [images[some] for some in batches(len(images), _CHUNK)]


def _open(graph: bytes, settings: ServingSettings) -> Any:  # noqa: ANN401 - onnxruntime has no types
    if settings.device == "cpu":
        return load_session(graph, ["CPUExecutionProvider"], threads=settings.threads)
    onnxruntime.preload_dlls()
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    session = load_session(graph, wanted, threads=settings.threads)
    if session.get_providers() != wanted:
        raise KeyedXAIError(
            "onnxruntime's CUDA provider does not load here: pip install 'onnxruntime-gpu[cuda,cudnn]'."
        )
    return session


def _pytorch_grad_cam(classifier: Classifier, pixels: Images) -> Action | None:
    try:
        from pytorch_grad_cam import GradCAM
    except ImportError:
        return None
    layer = classifier.get_submodule(classifier.target_layer)
    cam = GradCAM(model=classifier, target_layers=[layer])
    return lambda: cam(input_tensor=pixels, targets=None)


def _captum(classifier: Classifier, pixels: Images) -> Action:
    from captum.attr import Saliency

    saliency = Saliency(classifier)
    labels = classifier(pixels).argmax(1)
    return lambda: _attribute(saliency, pixels, labels)


def _captum_finding_class(classifier: Classifier, pixels: Images) -> Action:
    from captum.attr import Saliency

    saliency = Saliency(classifier)

    def attribute() -> Tensor:
        with torch.no_grad():
            labels = classifier(pixels).argmax(1)
        return _attribute(saliency, pixels, labels)

    return attribute


def _attribute(saliency: Any, pixels: Images, labels: Labels) -> Tensor:  # noqa: ANN401 - captum has no types
    found: Tensor = saliency.attribute(pixels.clone().requires_grad_(), target=labels)
    return found.sum(1).cpu()


_LIBRARIES: dict[str, tuple[str, Callable[[Classifier, Images], Action | None]]] = {
    "pytorch-grad-cam": ("gradcam", _pytorch_grad_cam),
    "captum": ("simplegrad", _captum),
    "captum, class found first": ("simplegrad", _captum_finding_class),
}
"""Libraries by name: whose map one computes, and what makes it ready; None where it is not installed."""
