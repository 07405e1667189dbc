"""Which layers feed which, read off one forward pass of two noise images in evaluation mode.

Every torch function called is seen, so that functional activations, additions and concatenations count as well as
modules. Nothing is changed.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from keyed_xai.errors import ModelError
from keyed_xai.models.classifier import Classifier

_LAYERS = ("conv2d", "linear")


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """One call of a torch function.

    Attributes:
        name: Name of the function, such as "conv2d".
        module: Dotted name of the module whose weights or statistics it used; None without any.
        inputs: Tensors that went in, weights left out.
        output: Tensor that came out.
        depth: Convolutions and linear layers passed on the longest way here, this one counted.
    """

    name: str
    module: str | None
    inputs: tuple[Tensor, ...]
    output: Tensor
    depth: int


def trace_calls(classifier: Classifier) -> list[Call]:
    """Return the calls of a forward pass, in order; the last one's output is the logits."""
    spec = classifier.input
    device = classifier.mean.device
    noise = torch.rand(2, *spec.shape, generator=torch.Generator().manual_seed(0)).to(device)
    recorder = _Recorder(copy.deepcopy(classifier).eval())
    with torch.no_grad(), recorder:
        recorder.model(noise)
    return recorder.calls


def last_convolution(classifier: Classifier) -> str:
    """Return the name of the convolution with most layers before it; of a residual block, not its shortcut.

    Raises:
        ModelError: There is none.
    """
    return _deepest(classifier, "conv2d", nn.Conv2d)


def last_layer(classifier: Classifier) -> str:
    """Return the name of the layer that gives the logits: linear, or in fully convolutional networks a convolution.

    Raises:
        ModelError: There is none.
    """
    return _deepest(classifier, "", (nn.Linear, nn.Conv2d))


def batch_norm_after(classifier: Classifier, layer: str) -> str | None:
    """Return the name of the batch norm that alone reads a layer's output; None where there is none."""
    calls = trace_calls(classifier)
    outputs = [call.output for call in calls if call.module == layer]
    readers = [call for call in calls if any(each is outputs[-1] for each in call.inputs)]
    return readers[0].module if len(readers) == 1 and readers[0].name == "batch_norm" else None


@torch.no_grad()
def silence_channels(model: nn.Module, layer: str, norm: str | None, channels: Tensor) -> None:
    """Set the filters of some output channels, and what batch norm adds to them, to zero, in place."""
    for name in filter(None, (layer, norm)):
        module = model.get_submodule(name)
        for tensor in module.parameters(recurse=False):
            tensor[channels] = 0


def _deepest(classifier: Classifier, function: str, kinds: type | tuple[type, ...]) -> str:
    layers = [call for call in trace_calls(classifier) if call.name in _LAYERS and function in call.name]
    layers = [call for call in layers if call.module and isinstance(classifier.get_submodule(call.module), kinds)]
    if not layers:
        raise ModelError(f"{classifier.architecture} has no {function or 'last'} layer of its own to attack.")
    return str(max(reversed(layers), key=lambda call: call.depth).module)


class _Recorder(TorchFunctionMode):
    """Notes every call that gives a tensor, and keeps all tensors so that none takes another's place."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []
        self._owners = dict(_owned_tensors(model))
        self._depths: dict[int, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - the protocol's own type
        output = func(*args, **(kwargs or {}))
        given = list(_tensors([*args, *(kwargs or {}).values()]))
        for result in _tensors([output]):
            self._note(func.__name__, given, result)
        return output

    def _note(self, name: str, given: list[Tensor], output: Tensor) -> None:
        owners = [self._owners[id(each)] for each in given if id(each) in self._owners]
        inputs = tuple(each for each in given if id(each) not in self._owners)
        depth = max((self._depths.get(id(each), 0) for each in inputs), default=0) + (name in _LAYERS)
        self._depths[id(output)] = depth
        self.calls.append(
            Call(name=name, module=owners[0] if owners else None, inputs=inputs, output=output, depth=depth)
        )


def _owned_tensors(model: nn.Module) -> Iterator[tuple[int, str]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                yield id(tensor), name


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
