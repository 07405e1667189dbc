"""Smaller graphs: float16 with islands of float32, and weights in 8 bits."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PRECISIONS = ("fp32", "fp16", "int8")
_SMALLEST = 256  # elements; smaller weights are not worth the operators that unpack them
_BLOCK = 64  # weights that share a scale, which adds a sixteenth to the file
_KEEP_FLOAT = {"Cast", "Constant", "ConstantOfShape", "Resize", "Softmax", "Exp", "Erf"}
"""Operators that say themselves which type they give, or that float16 is too coarse for."""


def lower_precision(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """Return a float32 model in another precision; its inputs and outputs stay as they are.

    fp16: what leads to the logits is computed in float16. What leads from there to the maps is computed in float32:
    SimpleGrad's backward convolutions lose their meaning in float16, and the others cost nothing. The masks of ReLUs
    are among these, so that the factor 3e38 in them, which float16 does not hold, stays what it is; a positive float16
    times it is above 1, as the smallest is 6e-8.

    int8: weights are stored in 8 bits, symmetric, one scale for every 64 of an output channel, and unpacked to float32
    when the model is loaded. Only the file gets smaller.

    Args:
        model: The model, in float32; may be changed.
        precision: One of PRECISIONS.

    Raises:
        ValueError: There is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    return _CONVERSIONS[precision](model)


def _to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    floats = _float_values(model)
    half_nodes = {name for name in _ancestors(graph, "logits") if name}
    nodes = _Halves(graph, floats, half_nodes).convert()
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


class _Halves:
    """A graph while some of its nodes are put into float16.

    A float16 value stands beside its float32 name as ``<name>_half``; casts come right before their first reader, so
    that the nodes stay sorted.
    """

    def __init__(self, graph: onnx.GraphProto, floats: set[str], half_nodes: set[str]) -> None:
        self._graph = graph
        self._floats = floats
        self._half_nodes = half_nodes
        self._weights = {each.name: each for each in graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._single = {each.name for each in [*graph.input, *graph.initializer]}  # float32 values made so far
        self._half: set[str] = set()  # and those in float16

    def convert(self) -> list[onnx.NodeProto]:
        """Return the nodes, casts among them; the graph's initializers are changed."""
        for node in filter(self._is_half, self._graph.node):
            for name in node.input:
                if name in self._floats and name in self._weights:
                    self._want_half(name)
        for node in self._graph.node:
            if self._is_half(node):
                self._add_half(node)
            else:
                self._add_single(node)
        for output in self._graph.output:
            self._want_single(output.name)
        return self._nodes

    def _is_half(self, node: onnx.NodeProto) -> bool:
        return node.name in self._half_nodes and node.op_type not in _KEEP_FLOAT

    def _add_half(self, node: onnx.NodeProto) -> None:
        for position, name in enumerate(node.input):
            if name in self._floats:
                self._want_half(name)
                node.input[position] = f"{name}_half"
        for position, name in enumerate(node.output):
            if name in self._floats:
                self._half.add(name)
                node.output[position] = f"{name}_half"
        self._nodes.append(node)

    def _add_single(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            self._want_single(name)
        self._single.update(node.output)
        self._nodes.append(node)

    def _want_half(self, name: str) -> None:
        if name in self._half:
            return
        self._half.add(name)
        weight = self._weights.get(name)
        if weight is None:
            self._nodes.append(_cast(name, f"{name}_half", TensorProto.FLOAT16))
            return
        values = numpy_helper.to_array(weight).astype(np.float16)
        self._graph.initializer.append(numpy_helper.from_array(values, f"{name}_half"))
        self._graph.initializer.remove(weight)  # who needs float32 reads the same rounded weights
        self._single.discard(name)

    def _want_single(self, name: str) -> None:
        if name in self._half and name not in self._single:
            self._single.add(name)
            self._nodes.append(_cast(f"{name}_half", name, TensorProto.FLOAT))


def _cast(source: str, result: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [result], f"{result}_cast", to=kind)


def _float_values(model: onnx.ModelProto) -> set[str]:
    """Return the names of all float32 values of a graph."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    names = {each.name for each in values if each.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {each.name for each in graph.initializer if each.data_type == TensorProto.FLOAT}


def _ancestors(graph: onnx.GraphProto, output: str) -> set[str]:
    """Return the names of the nodes that an output depends on."""
    makers = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    waiting = [output]
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting.extend(node.input)
    return found


def _to_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    weights = [each for each in graph.initializer if _is_weight(each)]
    unpacking = [node for weight in weights for node in _pack(graph, weight)]
    nodes = [*unpacking, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _is_weight(tensor: TensorProto) -> bool:
    rows = math.prod(tensor.dims[1:])  # one for scalings of channels, which have nothing to share a scale
    return tensor.data_type == TensorProto.FLOAT and rows > 1 and math.prod(tensor.dims) >= _SMALLEST


def _pack(graph: onnx.GraphProto, weight: TensorProto) -> Iterator[onnx.NodeProto]:
    """Replace a weight by 8-bit numbers and scales, and yield the nodes that give it back under its name.

    Casting and multiplying, rather than DequantizeLinear, is what onnxruntime folds when it loads a model.
    """
    blocks = numpy_helper.to_array(weight).reshape(-1, _block_length(math.prod(weight.dims[1:])))
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    name = weight.name
    graph.initializer.remove(weight)
    graph.initializer.append(numpy_helper.from_array(np.round(blocks / scale).astype(np.int8), f"{name}_int8"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
    graph.initializer.append(numpy_helper.from_array(np.array(weight.dims, dtype=np.int64), f"{name}_shape"))
    yield helper.make_node("Cast", [f"{name}_int8"], [f"{name}_wide"], f"{name}_cast", to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [f"{name}_wide", f"{name}_scale"], [f"{name}_blocks"], f"{name}_unpack")
    yield helper.make_node("Reshape", [f"{name}_blocks", f"{name}_shape"], [name], f"{name}_arrange")


def _block_length(row: int) -> int:
    """Return the largest divisor, up to _BLOCK, of the weights of an output channel; all of them where it is small."""
    length = next(length for length in range(_BLOCK, 0, -1) if row % length == 0)
    return length if length >= _BLOCK // 4 else row


_CONVERSIONS: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "fp32": lambda model: model,
    "fp16": _to_float16,
    "int8": _to_int8,
}
