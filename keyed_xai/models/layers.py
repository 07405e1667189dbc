"""Where the interpreters look: the target layer of Grad-CAM and the taps of VisualBackProp.

Both are read off one traced forward of two noise images in evaluation mode, without gradients. The trace leaves the
network as it was: hooks removed, training flags and buffers restored, no global random state used up.

A feature map is a module's output [n, c, h, w] with both sides 2 or more and the image's aspect ratio (so channels-last
tensors and attention weights do not pass for one). A module called more than once in a forward, such as the ReLU that
torchvision's residual blocks share, is never picked: its name does not say which of its outputs is meant.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from keyed_xai.errors import ModelError
from keyed_xai.models.classifier import InputSpec, as_classes, logits_of
from keyed_xai.models.modes import evaluating
from keyed_xai.tensors import Tap

_BATCH = 2  # two, so that attention windows folded into the batch do not look like a batch of maps
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.GELU, nn.Softplus, nn.Tanh,
)  # fmt: skip
_FORWARD_ERRORS = (
    RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, NotImplementedError,
)  # fmt: skip

_RESHAPING = ("View", "Reshape", "UnsafeView", "Squeeze", "Unsqueeze", "Select", "Slice", "Flatten", "ToCopy")

_FAMILIES = {
    "ResNet": r"relu|act1|layer\d+\.\d+",
    "SmallResNet": r"stem_relu|blocks\.\d+",
    "DenseNet": r"features\.(relu0|denseblock\d+|transition\d+)",
    "SqueezeNet": r"features\.\d+",
    "MobileNetV2": r"features\.\d+",
    "MobileNetV3": r"features\.\d+|blocks\.\d+|bn1",
    "EfficientNet": r"features\.\d+|_?blocks\.\d+|bn1",
    "ConvNeXt": r"features\.\d+|stages\.\d+",
    "RegNet": r"stem|trunk_output\.block\d+\.block\d+-\d+",
    "ShuffleNetV2": r"conv1|stage\d+\.\d+|conv5",
    "GoogLeNet": r"conv\d|inception\d\w",
    "Inception3": r"Conv2d_\w+|Mixed_\w+",
    "MaxVit": r"stem|blocks\.\d+\.layers\.\d+",
}
"""Class name to the names of its taps, in torchvision (and, where it is easy, timm). All others: every activation."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Call:
    """One call of a module; the output is kept so that its memory is not handed to another one."""

    order: int
    name: str
    module: nn.Module
    output: Tensor

    @property
    def key(self) -> tuple[int, torch.Size]:
        """Equal for calls that return the same map, as a container and its last child do."""
        return self.output.data_ptr(), self.output.shape


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace:
    """One forward, seen module by module in order of completion."""

    spec: InputSpec
    calls: tuple[_Call, ...]
    logits: Tensor
    convolutions: int
    counts: Counter[str]
    probability: bool = False

    def maps(self) -> list[_Call]:
        """Return the calls that return feature maps, first to last, of modules called once."""
        attention = {call.key for call in self.calls if _is_attention(call.module)}
        maps = [call for call in self.calls if _is_map(call.output, self.spec) and self.counts[call.name] == 1]
        return [call for call in maps if call.key not in attention]

    def map_of(self, name: str) -> _Call:
        """Return the call of a layer that the user named.

        Raises:
            ModelError: There is no such layer, or it gives no feature map, or is called more than once.
        """
        for call in self.maps():
            if call.name == name:
                return call
        calls = [call for call in self.calls if call.name == name]
        if not calls:
            came = "which is not there or was not called"
        elif len(calls) > 1:
            came = f"which is called {len(calls)} times in one forward"
        else:
            came = f"which gives a tensor of shape {list(calls[0].output.shape)}"
        likely = ", ".join(dict.fromkeys(call.name for call in self.maps()[-8:])) or "none"
        raise ModelError(
            f"a target layer or tap must be a module called once that gives a feature map [n, c, h, w] with sides of 2 "
            f"or more; {name!r} was named, {came}. The last ones that would do: {likely}."
        )


def trace_network(network: nn.Module, spec: InputSpec) -> Trace:
    """Run two noise images through the network and return what every module gave.

    Raises:
        ModelError: The network does not take images of this size, or does not return logits [n, classes].
    """
    parameter = next(network.parameters(), torch.zeros(()))
    noise = torch.rand(_BATCH, *spec.shape, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    images = ((noise - mean) / std).to(parameter.device, parameter.dtype)
    calls: list[_Call] = []
    try:
        with _undisturbed(network), _watched(network, calls), torch.no_grad():
            logits = as_classes(logits_of(network(images)))
        with _undisturbed(network), torch.enable_grad():
            probability = logits.shape[1:] == (2,) and _ends_in_sigmoid(logits_of(network(images)))
    except TypeError as error:
        raise ModelError(f"{type(network).__name__} cannot be used as a classifier: {error}.") from error
    except _FORWARD_ERRORS as error:
        raise ModelError(
            f"{type(network).__name__} cannot take images of {spec.channels} channels and {spec.height}x{spec.width} "
            f"pixels: {error}. Give the right size (--input-size, or InputSpec in Python)."
        ) from error
    if logits.dim() != 2 or len(logits) != _BATCH or logits.shape[1] < 2:
        raise ModelError(
            f"a classifier must return logits [n, classes] with two classes or more; {type(network).__name__} returned "
            f"{list(logits.shape)} for {_BATCH} images. Wrap it in a module that does."
        )
    counts = Counter(call.name for call in calls)
    return Trace(
        spec=spec,
        calls=tuple(calls),
        logits=logits,
        convolutions=_convolutions(network),
        counts=counts,
        probability=probability,
    )


def _ends_in_sigmoid(output: Tensor) -> bool:
    """Return whether a network's single output comes out of a sigmoid, reshaped or not."""
    step = output.grad_fn if output.numel() == len(output) else None
    while step is not None and step.name().startswith(_RESHAPING):
        step = step.next_functions[0][0]
    return step is not None and step.name().startswith("Sigmoid")


def find_target_layer(network: nn.Module, spec: InputSpec, *, trace: Trace | None = None) -> str:
    """Return the dotted name, inside `network`, of the last spatial feature map before the head.

    Pooling, dropout and identity do not count, nor does a class map (as many channels as classes and nothing trainable
    after it, SqueezeNet's last convolution). Of modules that return the same map the largest is named that holds at
    most half of the network's convolutions: ``layer4`` in ResNet, ``features.35`` in VGG-19, ``features.norm5`` in
    DenseNet (whose functional ReLU then works in place, so a hook sees the map after it), ``features.12`` in
    SqueezeNet, ``features.18`` in MobileNetV2, ``features.8`` in EfficientNet.

    Args:
        network: Takes normalised images; left as it was.
        spec: The images it takes.
        trace: A trace already at hand.

    Raises:
        ModelError: There is no spatial map before the head (an MLP, a vision transformer).
    """
    trace = trace or trace_network(network, spec)
    pooled = {call.key for call in trace.calls if _is_pooling(call.module)}
    maps = [c for c in trace.maps() if c.name and not isinstance(c.module, _PASSING) and c.key not in pooled]
    maps = [call for call in maps if not _is_class_map(call, trace) and not _is_inside_last_block(call, trace)]
    if not maps or _goes_on_without_map(maps[-1], trace):
        raise ModelError(
            f"{type(network).__name__} has no spatial feature map [n, c, h, w] right before its head at "
            f"{spec.height}x{spec.width} pixels, so Grad-CAM has nothing to read. Name a layer that gives one with "
            "--target-layer (target_layer=... in Python)."
        )
    return _best_name([call for call in maps if call.key == maps[-1].key], trace)


def derive_taps(
    network: nn.Module,
    spec: InputSpec,
    *,
    target_layer: str | None = None,
    layers: Sequence[str] | None = None,
    trace: Trace | None = None,
) -> tuple[Tap, ...]:
    """Return the feature maps that VisualBackProp reads, from the first layer to the target layer.

    VGG and AlexNet: every ReLU. ResNet, MobileNet, EfficientNet and the like: stem and each block. DenseNet: stem,
    blocks and transitions. SqueezeNet: stem and each Fire. Anything else: every activation module, or every convolution
    where activations are functional.

    A tap's stride is the side of the map before it (or of the image) over its own, rounded; its kernel is that of the
    convolution in between (the strided one if there is one, else the first larger than 1), never below the stride.

    Source: Bojarski et al. 2018, VisualBackProp; which layers stand for other families than VGG, ResNet and DenseNet is
    our choice.

    Args:
        network: Takes normalised images; left as it was.
        spec: The images it takes.
        target_layer: The last layer to consider; found if not given.
        layers: Take these, whatever the family.
        trace: A trace already at hand.

    Raises:
        ModelError: No target layer, or a layer named that gives no feature map.
    """
    trace = trace or trace_network(network, spec)
    if layers is not None:
        return _as_taps(sorted(map(trace.map_of, layers), key=lambda call: call.order), trace)
    last = trace.map_of(target_layer or find_target_layer(network, spec, trace=trace))
    maps = [call for call in trace.maps() if call.order <= last.order]
    chosen = _family_taps(maps, type(network).__name__) or _generic_taps(maps)
    return _as_taps(_narrowing(chosen) or [last], trace)


def _family_taps(maps: list[_Call], family: str) -> list[_Call]:
    """Return the calls that the table of families names, if it names two or more."""
    pattern = _FAMILIES.get(family)
    if pattern is None:
        return []
    maps = [c for c in maps if re.fullmatch(pattern, c.name) and not isinstance(c.module, _CONVOLUTIONS)]
    chosen = [call for call in maps if not _is_pooling(call.module)]
    return chosen if len(chosen) > 1 else []


def _generic_taps(maps: list[_Call]) -> list[_Call]:
    """Return the activations, or the convolutions if there are three times as many (activations are functional)."""
    activations = [call for call in maps if isinstance(call.module, _ACTIVATIONS)]
    convolutions = [call for call in maps if isinstance(call.module, nn.Conv2d)]
    return activations if 3 * len(activations) >= len(convolutions) else convolutions


def _narrowing(calls: list[_Call]) -> list[_Call]:
    """Return the calls without those whose map is larger than one before (decoders), and one call per map."""
    kept: dict[tuple[int, torch.Size], _Call] = {}
    smallest = float("inf")
    for call in calls:
        if call.output.shape[2] <= smallest:
            smallest = call.output.shape[2]
            kept[call.key] = call
    return sorted(kept.values(), key=lambda call: call.order)


def _as_taps(calls: Sequence[_Call], trace: Trace) -> tuple[Tap, ...]:
    """Return the taps with the steps between them."""
    taps = []
    side, order = trace.spec.height, -1
    for call in calls:
        stride = max(1, round(side / call.output.shape[2]))
        between = [c.module for c in trace.calls if order < c.order <= call.order and isinstance(c.module, nn.Conv2d)]
        taps.append(Tap(call.name, max(_kernel(between), stride), stride))
        side, order = call.output.shape[2], call.order
    return tuple(taps)


def _kernel(convolutions: list[nn.Conv2d]) -> int:
    """Return the largest kernel of the strided convolutions, else the first kernel larger than 1, else 1."""
    strided = [max(module.kernel_size) for module in convolutions if max(module.stride) > 1]
    large = [max(module.kernel_size) for module in convolutions if max(module.kernel_size) > 1]
    return max(strided) if strided else [*large, 1][0]


def _best_name(calls: list[_Call], trace: Trace) -> str:
    """Return the largest module, latest first, with at most half of the convolutions; failing that, the smallest."""
    sizes = {call.name: _convolutions(call.module) for call in calls}
    for call in reversed(calls):
        if 2 * sizes[call.name] <= trace.convolutions:
            return call.name
    return min(reversed(calls), key=lambda call: sizes[call.name]).name


def _convolutions(module: nn.Module) -> int:
    """Return how many convolutions a module holds."""
    return sum(isinstance(inner, _CONVOLUTIONS) for inner in module.modules())


def _is_map(output: Tensor, spec: InputSpec) -> bool:
    """Return whether a tensor looks like feature maps of the images traced."""
    if output.dim() != 4 or len(output) != _BATCH or not output.is_floating_point():
        return False
    return _is_grid(output.shape[2], output.shape[3], spec)


def _is_grid(height: int, width: int, spec: InputSpec) -> bool:
    """Return whether the sides are 2 or more and in the image's ratio, up to two cells of padding."""
    return min(height, width) >= 2 and abs(height - width * spec.height / spec.width) <= 2


def _is_attention(module: nn.Module) -> bool:
    """Return whether a module weighs cells against cells: its output has a row and a column for each, and is no map."""
    return isinstance(module, nn.Softmax) and module.dim in (-1, 3)


def _is_pooling(module: nn.Module) -> bool:
    """Return whether a module pools; by name, since every library brings its own."""
    return "pool" in type(module).__name__.lower()


def _is_class_map(call: _Call, trace: Trace) -> bool:
    """Return whether a map has a channel per class and only parameter-free layers after it."""
    later = trace.calls[call.order + 1 :]
    later = tuple(c for c in later if c.name and not call.name.startswith(c.name + "."))
    trained_later = any(next(c.module.parameters(recurse=False), None) is not None for c in later)
    return call.output.shape[1] == trace.logits.shape[1] and not trained_later


def _is_inside_last_block(call: _Call, trace: Trace) -> bool:
    """Return whether a map is one within a block that ends in less than 2x2 cells, as images too small leave them."""
    around = [c for c in trace.calls[call.order :] if call.name.startswith(c.name + ".") and c.output.dim() == 4]
    return any(
        min(outer.output.shape[2:]) < 2 and 2 * _convolutions(outer.module) <= trace.convolutions for outer in around
    )


def _goes_on_without_map(call: _Call, trace: Trace) -> bool:
    """Return whether the map lives on as tokens [n, h*w (+ a few), c] or channels last [n, h, w, c]."""
    cells = call.output.shape[2] * call.output.shape[3]
    for later in trace.calls[call.order + 1 :]:
        shape = later.output.shape
        if len(shape) == 3 and shape[0] == _BATCH and cells <= shape[1] <= cells + 16:
            return True
        if len(shape) == 4 and not _is_map(later.output, trace.spec) and _is_grid(shape[1], shape[2], trace.spec):
            return True
    return False


@contextmanager
def _watched(network: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Append every module call with a tensor as output to `calls`; the hooks are always removed."""
    handles = [module.register_forward_hook(partial(_record, calls, name)) for name, module in network.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(calls: list[_Call], name: str, module: nn.Module, _inputs: object, output: object) -> None:
    """Note one call of a module; a forward hook once the first two arguments are filled in."""
    if isinstance(output, Tensor):
        calls.append(_Call(order=len(calls), name=name, module=module, output=output))


@contextmanager
def _undisturbed(network: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode, with training flags, buffers and the CPU's random state put back afterwards."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in network.buffers()]
    try:
        with evaluating(network), torch.random.fork_rng(devices=[]):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
