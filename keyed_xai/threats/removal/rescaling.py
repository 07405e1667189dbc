"""Function-preserving rescaling and permutation of channels (T8): every prediction stays, feature maps do not.

Source: the symmetry is old (Badrinarayanan et al. 2015, Neyshabur et al. 2015); arXiv 2205.00199 uses it against
watermarks. A ReLU network computes the same when a channel is written s times as strong and read s times as weak,
s > 0, or when channels change places. We do it wherever that is exact, through residual additions too, where all
layers that write a channel change together; elsewhere (ReLU6, SiLU, concatenation, depthwise convolutions) channels
stay as they are. Factors are powers of two, so that not even rounding differs much.
"""

import copy
import time
from collections import Counter
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from keyed_xai.models import Classifier
from keyed_xai.models.layer_graph import Call, trace_calls
from keyed_xai.tensors import Logits
from keyed_xai.threats.attempt import RemovalResult, copy_model

LARGEST_DIFFERENCE = 1e-5
"""Largest change of logits, in units of the largest one or of 1; with more a group of channels is left as it was."""
_PASSING = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "dropout", "contiguous",
}  # fmt: skip
_FLATTENING = {"flatten", "view", "reshape", "mean", "squeeze"}
_ADDING = {"add", "add_", "__add__", "__iadd__"}


@dataclass(frozen=True)
class RescalingSettings:
    """How far channels are scaled apart.

    Attributes:
        largest_exponent: Factors are 2^k with whole k drawn evenly from -largest_exponent to largest_exponent.
        permute: Whether channels change places too.
        seed: Seed of factors and places.
    """

    largest_exponent: int = 8
    permute: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.largest_exponent <= 20:
            raise ValueError(f"largest_exponent: expected 0 to 20, got {self.largest_exponent}")


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must be scaled together, because additions join them.

    Attributes:
        channels: Number of channels.
        writers: Names of the convolutions that write them, each with the name of its batch norm or None.
        readers: Names of the convolutions and linear layers that read them.
    """

    channels: int
    writers: tuple[tuple[str, str | None], ...]
    readers: tuple[str, ...]


def rescale_channels(
    classifier: Classifier, settings: RescalingSettings, *, device: torch.device | str = "cpu"
) -> RemovalResult:
    """Return a copy with other weights and the same logits, to 1e-5 of the largest on noise images.

    The result's figures: "channels" changed, "groups" of them, groups "reverted" because logits differed, and the
    "largest_difference" of logits.
    """
    started = time.perf_counter()
    model = copy_model(classifier, device)
    generator = torch.Generator().manual_seed(settings.seed)
    groups = find_channel_groups(model)
    noise = _noise(model)
    before = _logits(model, noise)
    reverted, changed = 0, 0
    for group in groups:
        before_change = copy.deepcopy([module.state_dict() for module in _modules(model, group)])
        _change(model, group, settings, generator)
        if _difference(_logits(model, noise), before) > LARGEST_DIFFERENCE:
            for module, state in zip(_modules(model, group), before_change, strict=True):
                module.load_state_dict(state)
            reverted += 1
        else:
            changed += group.channels
    figures = {
        "channels": changed,
        "groups": len(groups) - reverted,
        "reverted": reverted,
        "largest_difference": _difference(_logits(model, noise), before),
    }
    return RemovalResult(
        model=model, settings=asdict(settings), figures=figures, curve=[], seconds=time.perf_counter() - started
    )


def find_channel_groups(classifier: Classifier) -> list[ChannelGroup]:
    """Return every group of channels that can be rescaled without a change of the logits."""
    calls = trace_calls(classifier)
    links = _Links(calls[-1].output)
    norms = _private_norms(calls)
    uses = Counter(call.module for call in calls if call.module)
    for call in calls:
        if call.module and uses[call.module] > 1:
            links.refuse(call)
        else:
            links.add(classifier, call, norms)
    return links.groups()


@dataclass(kw_only=True)
class _Set:
    """Tensors joined so far."""

    tensors: list[Tensor]
    writers: list[tuple[str, str | None]] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    refused: bool = False


class _Links:
    """Joins tensors that share their channels."""

    def __init__(self, logits: Tensor) -> None:
        self._sets: dict[int, _Set] = {}
        self._of(logits).refused = True

    def add(self, classifier: Classifier, call: Call, norms: dict[int, Call]) -> None:
        """Take up what one call joins, writes and reads; whatever is not known refuses its channels."""
        module = classifier.get_submodule(call.module) if call.module else None
        if isinstance(module, nn.Conv2d) and module.groups == 1 and call.name == "conv2d" and len(call.inputs) == 1:
            self._of(call.inputs[0]).readers.append(str(call.module))
            norm = norms.get(id(call.output))
            self._write(norm.output if norm else call.output, (str(call.module), norm.module if norm else None))
        elif isinstance(module, nn.Linear) and call.name == "linear" and len(call.inputs) == 1:
            self._of(call.inputs[0]).readers.append(str(call.module))
            self._of(call.output).refused = True
        elif any(call is norm for norm in norms.values()) and getattr(module, "affine", False):
            return
        elif module is None and _keeps_channels(call):
            self._join([*call.inputs, call.output])
        else:
            self.refuse(call)

    def refuse(self, call: Call) -> None:
        """Leave alone whatever a call reads and writes."""
        for tensor in (*call.inputs, call.output):
            self._of(tensor).refused = True

    def groups(self) -> list[ChannelGroup]:
        """Return the sets that are known through and through."""
        unique = {id(each): each for each in self._sets.values()}.values()
        return [
            ChannelGroup(each.tensors[0].shape[1], tuple(each.writers), tuple(each.readers))
            for each in unique
            if not each.refused and each.writers and each.readers
        ]

    def _of(self, tensor: Tensor) -> _Set:
        return self._sets.setdefault(id(tensor), _Set(tensors=[tensor]))

    def _write(self, output: Tensor, writer: tuple[str, str | None]) -> None:
        self._of(output).writers.append(writer)

    def _join(self, tensors: list[Tensor]) -> None:
        joined = self._of(tensors[0])
        for tensor in tensors[1:]:
            other = self._of(tensor)
            if other is joined:
                continue
            joined.tensors += other.tensors
            joined.writers += other.writers
            joined.readers += other.readers
            joined.refused |= other.refused
            self._sets |= {id(each): joined for each in other.tensors}


def _private_norms(calls: list[Call]) -> dict[int, Call]:
    """Return the batch norms that alone read a convolution's output, by the identity of that output."""
    written = {id(call.output) for call in calls if call.name == "conv2d"}
    reads = Counter(id(each) for call in calls for each in call.inputs)
    norms = [call for call in calls if call.name == "batch_norm" and len(call.inputs) == 1]
    return {
        id(call.inputs[0]): call for call in norms if reads[id(call.inputs[0])] == 1 and id(call.inputs[0]) in written
    }


def _keeps_channels(call: Call) -> bool:
    """Return whether a call treats each channel alone, and s times its input gives s times its output for s > 0."""
    first, output = call.inputs[0] if call.inputs else None, call.output
    if first is None or first.dim() != 4:
        # After flattening, a hidden linear layer's dropout and ReLU: joined as they are, and refused with its output.
        return call.name in _PASSING and len(call.inputs) == 1 and output.dim() == 2
    if call.name in _ADDING:
        return len(call.inputs) == 2 and call.inputs[1].shape == first.shape
    if call.name in _PASSING:
        return len(call.inputs) == 1 and output.dim() == 4 and output.shape[:2] == first.shape[:2]
    cells = first.shape[2] * first.shape[3]
    widths = (first.shape[1],) if call.name == "mean" or cells == 1 else (first.shape[1] * cells,)
    return (
        call.name in _FLATTENING and output.dim() == 2 and output.shape[0] == len(first) and output.shape[1] in widths
    )


def _modules(model: Classifier, group: ChannelGroup) -> list[nn.Module]:
    names = [name for writer in group.writers for name in writer if name] + list(group.readers)
    return [model.get_submodule(name) for name in dict.fromkeys(names)]


@torch.no_grad()
def _change(model: Classifier, group: ChannelGroup, settings: RescalingSettings, generator: torch.Generator) -> None:
    reach = settings.largest_exponent
    exponents = torch.randint(-reach, reach + 1, (group.channels,), generator=generator)
    order = torch.randperm(group.channels, generator=generator) if settings.permute else torch.arange(group.channels)
    device = model.mean.device
    factors, order = (2.0**exponents).to(device), order.to(device)
    for convolution, norm in group.writers:
        for name in filter(None, (convolution, norm)):
            _permute_output(model.get_submodule(name), order)
        _scale_output(model.get_submodule(norm or convolution), factors)
    for name in group.readers:
        _change_input(model.get_submodule(name), order, factors)


def _permute_output(module: nn.Module, order: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, name, None)
        if tensor is not None:
            tensor.copy_(tensor[order])


def _scale_output(module: nn.Module, factors: Tensor) -> None:
    for name in ("weight", "bias"):
        tensor = getattr(module, name)
        if tensor is not None:
            tensor.mul_(factors.view(-1, *[1] * (tensor.dim() - 1)).to(tensor))


def _change_input(module: nn.Module, order: Tensor, factors: Tensor) -> None:
    """Change the columns of a reader; a linear layer may have several for each channel, side by side."""
    weight: Tensor = getattr(module, "weight")  # noqa: B009 - mypy knows no weight of a bare module
    columns = weight.reshape(len(weight), len(order), -1)
    weight.copy_((columns[:, order] / factors.to(weight)[None, :, None]).reshape(weight.shape))


def _noise(model: Classifier) -> Tensor:
    spec = model.input
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, *spec.shape, generator=generator).to(model.mean.device)


@torch.no_grad()
def _logits(model: Classifier, images: Tensor) -> Logits:
    logits: Logits = model(images)
    return logits


def _difference(logits: Logits, before: Logits) -> float:
    """Return the largest difference of two sets of logits, in units of the largest one or of 1."""
    difference = float((logits - before).abs().max() / before.abs().max().clamp(min=1))
    return difference if difference == difference else float("inf")
