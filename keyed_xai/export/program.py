"""A classifier as a list of ATen operators: functional, batch norm folded, batch size free, height and width fixed."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, default_decompositions, export
from torch.export.graph_signature import InputKind

from keyed_xai.errors import ModelError
from keyed_xai.models import Classifier

ATEN = torch.ops.aten
_END = 2**63 - 1  # a slice's, where it is left open
_BATCH = 2  # of the example: a batch of one would be taken for a constant
_KEPT_WHOLE = (ATEN.linear.default, ATEN.silu.default, ATEN.gelu.default, ATEN.adaptive_avg_pool2d.default)
_FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError, NotImplementedError)


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """The operators of a classifier, in the order in which they run.

    Attributes:
        nodes: Calls of ATen operators; only those that logits or features depend on.
        image: Placeholder of the input, pixels in [0, 1].
        constants: Weights, and other tensors that do not depend on the input, by placeholder.
        logits: The node that gives the logits.
        features: The nodes that give the layers asked for, by dotted name.
    """

    nodes: tuple[fx.Node, ...]
    image: fx.Node
    constants: Mapping[fx.Node, Tensor]
    logits: fx.Node
    features: Mapping[str, fx.Node]


def trace_program(classifier: Classifier, layers: Sequence[str]) -> Program:
    """Return a classifier's operators, in evaluation mode, weights copied.

    Args:
        classifier: Left as it was.
        layers: Dotted names of modules whose outputs are wanted; what works on them in place later does not show.

    Raises:
        ModelError: The network cannot be traced, depends on the batch size, or does not run a layer.
    """
    spec = classifier.input
    model = copy.deepcopy(classifier).cpu().float().eval().requires_grad_(False)
    example = torch.rand(_BATCH, *spec.shape, generator=torch.Generator().manual_seed(0))
    table: Any = default_decompositions()  # its methods have no types
    for operator in _KEPT_WHOLE:
        table.pop(operator, None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attribute .* assigned during export")  # weight_norm
            exported = export(_Tapped(model, tuple(layers)), (example,), dynamic_shapes=({0: Dim("n")},), strict=False)
            exported = exported.run_decompositions(table)
    except _FORWARD_ERRORS as error:
        raise ModelError(
            f"{classifier.architecture} cannot be written as a graph of operators: {_first_line(error)}. Its forward "
            "must not branch on values or depend on the batch size."
        ) from error
    if any(_type_of(node) in (torch.float16, torch.bfloat16) for node in exported.graph.nodes):
        raise ModelError(
            f"{classifier.architecture} computes in half precision inside its forward (autocast, or half()), which the "
            "graph does not. Take that out of the network: whoever calls it can set autocast around the call."
        )
    return _read_program(exported, layers)


def layer_of(node: fx.Node) -> str:
    """Return the dotted name of the module that a node was traced in; empty for the classifier itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("model").removeprefix(".") if stack else ""


def arguments_of(node: fx.Node) -> list[Any]:
    """Return a call's arguments as they stand in the graph; what each is, its operator's schema says."""
    return list(node.args)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of what a node gives, -1 for the batch."""
    return tuple(side if isinstance(side, int) else -1 for side in node.meta["val"].shape)


def _type_of(node: fx.Node) -> torch.dtype | None:
    """Return the type of the numbers in the tensor that a node gives; None where it gives none."""
    return getattr(node.meta.get("val"), "dtype", None)


class _Tapped(nn.Module):
    """A model that also returns what some of its layers gave, as copies that nothing works on in place."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for layer in self.layers:
                handle = self.model.get_submodule(layer).register_forward_hook(_recorder(found, layer))
                hooks.callback(handle.remove)
            logits = self.model(images)
        missing = [layer for layer in self.layers if layer not in found]
        if missing:
            raise ValueError(f"layer {missing[0]!r} was not run")
        return logits, *(found[layer] for layer in self.layers)


def _recorder(found: dict[str, Tensor], layer: str) -> Callable[[nn.Module, tuple[object, ...], Tensor], Tensor]:
    def record(_module: nn.Module, _inputs: tuple[object, ...], output: Tensor) -> Tensor:
        found[layer] = output
        return output.clone()

    return record


def _read_program(exported: ExportedProgram, layers: Sequence[str]) -> Program:
    graph = exported.graph_module.graph
    constants, image = _placeholders(exported)
    _drop_copies(graph)
    _free_batch(graph)
    _fold_batch_norms(graph, constants)
    _nest_concatenations(graph)
    outputs = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(outputs, tuple | list) or not all(isinstance(node, fx.Node) for node in outputs):
        raise ModelError("The network's logits or feature maps do not depend on the image: there is nothing to export.")
    graph.eliminate_dead_code()
    nodes = tuple(node for node in graph.nodes if node.op == "call_function")
    used = {source for node in nodes for source in node.all_input_nodes}
    kept = {node: value for node, value in constants.items() if node in used}
    logits, *features = outputs
    return Program(
        nodes=nodes, image=image, constants=kept, logits=logits, features=dict(zip(layers, features, strict=True))
    )


def _placeholders(exported: ExportedProgram) -> tuple[dict[fx.Node, Tensor], fx.Node]:
    """Return the tensors behind the graph's inputs, and the one input that is the image."""
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    held: dict[str, Tensor] = {**exported.state_dict, **exported.constants}
    constants: dict[fx.Node, Tensor] = {}
    image = None
    for given in exported.graph_signature.input_specs:
        node = nodes[given.arg.name]
        if given.kind is InputKind.USER_INPUT:
            image = node
        else:
            constants[node] = held[str(given.target)].detach()
    if image is None:
        raise ModelError("The network takes no image: there is nothing to export.")
    return constants, image


_COPIES = {ATEN.clone.default, ATEN.alias.default, ATEN.detach.default, ATEN.lift_fresh_copy.default,
           ATEN.dropout.default}  # fmt: skip


def _drop_copies(graph: fx.Graph) -> None:
    """Remove operators that give back what they take, and assertions about types."""
    for node in list(graph.nodes):
        if node.target is ATEN._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op == "call_function" and (source := _copied(node)) is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _copied(node: fx.Node) -> fx.Node | None:
    """Return the node whose value an operator gives back as it is; None where it changes something."""
    arguments = arguments_of(node)
    source: fx.Node | list[fx.Node] = arguments[0]
    if isinstance(source, list):
        return source[0] if node.target is ATEN.cat.default and len(source) == 1 else None
    if node.target is ATEN._to_copy.default and _type_of(node) == _type_of(source):
        return source
    whole = node.target is ATEN.slice.Tensor and arguments[2:] == [0, _END]  # x[:, 1:] also slices the batch
    return source if whole or node.target in _COPIES else None


def _free_batch(graph: fx.Graph) -> None:
    """Write -1 for the batch size where a shape names it, so that no operator computes with sizes."""
    for node in graph.nodes:
        if node.target in (ATEN.view.default, ATEN.reshape.default, ATEN._unsafe_view.default):
            source, shape = node.args
            node.target = ATEN.reshape.default
            if sum(isinstance(side, fx.Node) for side in shape) == 1 and -1 not in shape:
                node.args = (source, [-1 if isinstance(side, fx.Node) else side for side in shape])
        elif node.target is ATEN.expand.default:
            source, shape = node.args[:2]
            node.args = (source, [-1 if isinstance(side, fx.Node) else side for side in shape])


def _fold_batch_norms(graph: fx.Graph, constants: dict[fx.Node, Tensor]) -> None:
    """Fold each batch norm into the convolution before it; one that stands elsewhere becomes a 1x1 convolution."""
    for node in list(graph.nodes):
        if (
            node.target is ATEN._native_batch_norm_legit_no_training.default
            and len(shape_of(arguments_of(node)[0])) == 4
        ):
            scale, shift = _scale_and_shift(node, constants)
            before = arguments_of(node)[0]
            if not _is_foldable(before, constants):
                before = _identity_convolution(graph, node, len(scale), constants)
            _scale_convolution(graph, before, scale, shift, constants)
            for user in list(node.users):
                user.replace_all_uses_with(before)
                graph.erase_node(user)
            graph.erase_node(node)


def _scale_and_shift(node: fx.Node, constants: Mapping[fx.Node, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what a batch norm does to each channel, in float64."""
    _, weight, bias, mean, variance, _, epsilon = arguments_of(node)
    center, spread = (constants[each].double() for each in (mean, variance))
    scale = (spread + epsilon).rsqrt()
    if weight is not None:
        scale = scale * constants[weight].double()
    shift = -center * scale
    return scale, shift if bias is None else shift + constants[bias].double()


def _is_foldable(node: fx.Node, constants: Mapping[fx.Node, Tensor]) -> bool:
    """Return whether a node is a convolution with weights of its own that one operator reads."""
    if node.target is not ATEN.convolution.default or len(node.users) > 1 or node.args[6]:
        return False
    return all(each is None or (each in constants and len(each.users) == 1) for each in arguments_of(node)[1:3])


def _identity_convolution(graph: fx.Graph, norm: fx.Node, channels: int, constants: dict[fx.Node, Tensor]) -> fx.Node:
    """Put a convolution that changes nothing, one 1x1 kernel a channel, before a batch norm."""
    weight = _add_constant(graph, f"{norm.name}_weight", torch.ones(channels, 1, 1, 1), constants)
    source = arguments_of(norm)[0]
    with graph.inserting_before(norm):
        arguments = (source, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], channels)
        node = graph.call_function(ATEN.convolution.default, arguments)
    node.meta = {"val": source.meta["val"], "nn_module_stack": norm.meta.get("nn_module_stack", {})}
    return node


def _scale_convolution(
    graph: fx.Graph, node: fx.Node, scale: Tensor, shift: Tensor, constants: dict[fx.Node, Tensor]
) -> None:
    _, weight, bias = arguments_of(node)[:3]
    before = constants[weight]
    constants[weight] = (before.double() * scale[:, None, None, None]).to(before.dtype)
    if bias is None:
        bias = _add_constant(graph, f"{weight}_bias", torch.zeros_like(before[:, 0, 0, 0]), constants)
        node.update_arg(2, bias)
    constants[bias] = (constants[bias].double() * scale + shift).to(before.dtype)


def _add_constant(graph: fx.Graph, name: str, value: Tensor, constants: dict[fx.Node, Tensor]) -> fx.Node:
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(name)
    constants[node] = value
    return node


def _nest_concatenations(graph: fx.Graph) -> None:
    """Write cat([a, b, c]) as cat([cat([a, b]), c]) where the inner one is there already, as dense blocks have it."""
    joined: dict[tuple[object, ...], fx.Node] = {}
    for node in graph.nodes:
        if node.target is ATEN.cat.default:
            parts, axis = tuple(node.args[0]), node.args[1] if len(node.args) > 1 else 0
            inner = joined.get((*parts[:-1], axis))
            if inner is not None:
                node.args = ([inner, parts[-1]], axis)
            joined[*parts, axis] = node


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


__all__ = ["ATEN", "Program", "arguments_of", "getitem", "layer_of", "shape_of", "trace_program"]
