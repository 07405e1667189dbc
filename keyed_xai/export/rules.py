"""How each operator hands a gradient back, written with forward operators only: what ONNX can hold.

A rule takes what went into an operator and what came out, and the gradient of the output; it returns the gradients of
the arguments beside the arguments (those that need none are passed over by whoever asked). The formulas are those of
PyTorch's derivatives.yaml, kinks included: the gradient of ReLU at 0 is 0, that of clamp at its limits 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from keyed_xai.errors import ModelError
from keyed_xai.export.pooling import Matrix, adaptive_matrix, average_matrix, spread_maxima, spread_means
from keyed_xai.export.program import ATEN, arguments_of, layer_of, shape_of

_HUGE = 3e38  # times the smallest normal float32 is above 1

Gradients = Sequence[tuple[Any, Tensor]]
"""Arguments, as they stand in the graph, and their gradients."""


@dataclass(frozen=True)
class Step:
    """One operator as it ran.

    Attributes:
        node: The call; its arguments name the nodes they come from.
        inputs: The arguments, tensors in place of nodes.
        output: What it gave.
    """

    node: fx.Node
    inputs: tuple[Any, ...]
    output: Any

    @property
    def source(self) -> Any:  # noqa: ANN401 - a node, or several to concatenate
        """The first argument as it stands in the graph."""
        return self.node.args[0]

    def option(self, position: int, name: str, default: Any = None) -> Any:  # noqa: ANN401 - as the operator has it
        """Return an argument by position or name, or its default where the call leaves it out."""
        given = self.inputs[position] if position < len(self.inputs) else default
        return self.node.kwargs.get(name, given)


Rule = Callable[[Step, Tensor], Gradients]


def find_rule(node: fx.Node) -> Rule:
    """Return the rule of a node's operator.

    Raises:
        ModelError: There is none; the message names operator and layer.
    """
    rule = RULES.get(node.target)
    if rule is None:
        raise refusal(node, "it has no rule that hands gradients back")
    return rule


def refusal(node: fx.Node, reason: str) -> ModelError:
    """Return the error for an operator that cannot be transposed."""
    layer = layer_of(node)
    place = f"layer {layer!r}" if layer else "the network's own forward"
    return ModelError(
        f"The operator {node.target} of {place} cannot be put into the graph of a saliency map: {reason}. Leave out "
        "the interpreters that need its gradient (VisualBackProp needs none), or replace the layer."
    )


# Layers with weights


def _convolution(step: Step, gradient: Tensor) -> Gradients:
    x, weight, _, stride, padding, dilation, transposed, _, groups = step.inputs
    if weight.ndim != 4:
        raise refusal(step.node, f"expected a two-dimensional convolution, got weights of {weight.ndim - 2} dimensions")
    if arguments_of(step.node)[1].op != "placeholder":
        raise refusal(step.node, "its weights depend on the image")
    if transposed:
        return [(step.source, functional.conv2d(gradient, weight, None, stride, padding, dilation, groups))]
    if max(stride) == 1:
        return [(step.source, _correlate_back(gradient, weight, padding, dilation, groups))]
    size = x.shape[2:]
    reach = [(weight.shape[2 + axis] - 1) * dilation[axis] + 1 for axis in (0, 1)]
    grown = [(gradient.shape[2 + axis] - 1) * stride[axis] - 2 * padding[axis] + reach[axis] for axis in (0, 1)]
    missing = [size[axis] - grown[axis] for axis in (0, 1)]
    back = functional.conv_transpose2d(gradient, weight, None, stride, padding, missing, groups, dilation)
    return [(step.source, back)]


def _correlate_back(
    gradient: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Return a stride-1 convolution's input gradient: a convolution with the kernel flipped and in and out swapped."""
    out, inner, height, width = weight.shape
    swapped = weight.reshape(groups, out // groups, inner, height, width).transpose(1, 2)
    flipped = swapped.reshape(groups * inner, out // groups, height, width)
    flipped = flipped.flip(2, 3) if height * width > 1 else flipped
    border = [dilation[axis] * (weight.shape[2 + axis] - 1) - padding[axis] for axis in (0, 1)]
    if min(border) >= 0:
        return functional.conv2d(gradient, flipped, None, 1, border, dilation, groups)
    cut = [max(0, -each) for each in border]
    whole = functional.conv2d(gradient, flipped, None, 1, [max(0, each) for each in border], dilation, groups)
    return whole[:, :, cut[0] : whole.shape[2] - cut[0], cut[1] : whole.shape[3] - cut[1]]


def _linear(step: Step, gradient: Tensor) -> Gradients:
    weight = step.node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "placeholder":
        raise refusal(step.node, "its weights depend on the image")
    return [(step.source, gradient @ step.inputs[1])]


# Activations: each factor is the derivative


def _relu(step: Step, gradient: Tensor) -> Gradients:
    if step.output.ndim != 4:
        return [(step.source, torch.where(step.output > 0, gradient, 0.0))]
    return [(step.source, gradient * _is_positive(step.output))]


def _is_positive(maps: Tensor) -> Tensor:
    """Return 1.0 where non-negative feature maps [n, c, h, w] are positive, else 0.0.

    A scaling by a 1x1 convolution, clamped: on the CPU onnxruntime keeps convolutions and products in its blocked
    layout, while for a comparison it rewrites every map twice. Exact for all but denormal numbers.
    """
    scales = torch.full((maps.shape[1], 1, 1, 1), _HUGE, dtype=maps.dtype, device=maps.device)
    return functional.hardtanh(functional.conv2d(maps, scales, groups=maps.shape[1]), 0.0, 1.0)  # one operator: Clip


def _hardtanh(step: Step, gradient: Tensor) -> Gradients:
    low, high = step.option(1, "min_val", -1.0), step.option(2, "max_val", 1.0)
    inside = (step.output > low) & (step.output < high)
    return [(step.source, torch.where(inside, gradient, 0.0))]


def _clamp(step: Step, gradient: Tensor) -> Gradients:
    low, high = step.option(1, "min"), step.option(2, "max")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise refusal(step.node, "its limits are tensors")
    x = step.inputs[0]
    inside = torch.ones_like(x, dtype=torch.bool)
    inside = inside if low is None else inside & (x >= low)
    inside = inside if high is None else inside & (x <= high)
    return [(step.source, torch.where(inside, gradient, 0.0))]


def _leaky_relu(step: Step, gradient: Tensor) -> Gradients:
    slope = step.option(1, "negative_slope", 0.01)
    return [(step.source, torch.where(step.inputs[0] > 0, gradient, gradient * slope))]


def _elu(step: Step, gradient: Tensor) -> Gradients:
    alpha, scale, inner = step.option(1, "alpha", 1.0), step.option(2, "scale", 1.0), step.option(3, "input_scale", 1.0)
    x = step.inputs[0]
    below = gradient * (alpha * scale * inner) * (x.clamp(max=0) * inner).exp()
    return [(step.source, torch.where(x > 0, gradient * scale, below))]


def _sigmoid(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, gradient * step.output * (1 - step.output))]


def _tanh(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, gradient * (1 - step.output * step.output))]


def _silu(step: Step, gradient: Tensor) -> Gradients:
    gate = torch.sigmoid(step.inputs[0])
    return [(step.source, gradient * (gate + step.output * (1 - gate)))]


def _gelu(step: Step, gradient: Tensor) -> Gradients:
    if step.node.kwargs.get("approximate", "none") != "none":
        raise refusal(step.node, "only the exact GELU has a rule")
    x = step.inputs[0]
    below = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    density = (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
    return [(step.source, gradient * (below + x * density))]


# Arithmetic


def _add(step: Step, gradient: Tensor) -> Gradients:
    return _both(step, gradient, _times_alpha(step, gradient))


def _subtract(step: Step, gradient: Tensor) -> Gradients:
    return _both(step, gradient, -_times_alpha(step, gradient))


def _times_alpha(step: Step, gradient: Tensor) -> Tensor:
    """Return the gradient times what an addition scales its second argument by."""
    alpha: float = step.option(2, "alpha", 1)
    return gradient if alpha == 1 else gradient * alpha


def _multiply(step: Step, gradient: Tensor) -> Gradients:
    return _both(step, gradient * step.inputs[1], gradient * step.inputs[0])


def _divide(step: Step, gradient: Tensor) -> Gradients:
    if step.node.kwargs.get("rounding_mode") is not None:
        raise refusal(step.node, "it rounds")
    share = gradient / step.inputs[1]
    return _both(step, share, -share * step.output)


def _logarithm(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, gradient / step.inputs[0])]


def _power(step: Step, gradient: Tensor) -> Gradients:
    x, exponent = step.inputs[:2]
    return [(step.source, gradient * exponent * x ** (exponent - 1))]


def _negate(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, -gradient)]


def _both(step: Step, first: Tensor, second: Tensor) -> Gradients:
    """Return the gradients of two arguments, summed over what the operator broadcast."""
    pairs = zip(step.node.args[:2], (first, second), strict=True)
    return [(node, _unbroadcast(each, node)) for node, each in pairs if isinstance(node, fx.Node)]


def _unbroadcast(gradient: Tensor, node: fx.Node) -> Tensor:
    shape = shape_of(node)
    while gradient.ndim > len(shape):
        gradient = gradient.sum(0)
    axes = [axis for axis, side in enumerate(shape) if side == 1 and gradient.shape[axis] != 1]
    return gradient.sum(axes, keepdim=True) if axes else gradient


# Shapes


def _reshape(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, gradient.reshape(shape_of(step.source)))]


def _permute(step: Step, gradient: Tensor) -> Gradients:
    order = [axis % gradient.ndim for axis in step.inputs[1]]
    return [(step.source, gradient.permute([order.index(axis) for axis in range(len(order))]))]


def _expand(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, _unbroadcast(gradient, step.source))]


def _concatenate(step: Step, gradient: Tensor) -> Gradients:
    axis = step.option(1, "dim", 0) % gradient.ndim
    sizes = [part.shape[axis] for part in step.inputs[0]]
    return list(zip(step.source, torch.split(gradient, sizes, axis), strict=True))


def _slice(step: Step, gradient: Tensor) -> Gradients:
    axis, start, stop = step.option(1, "dim", 0), step.option(2, "start", 0) or 0, step.option(3, "end")
    if step.option(4, "step", 1) != 1 or axis % gradient.ndim == 0:
        raise refusal(step.node, "only slices of one piece, within an image, have a rule")
    side = step.inputs[0].shape[axis]
    start = max(0, start + side if start < 0 else start)
    stop = min(side, side if stop is None else stop + side if stop < 0 else stop)
    return [(step.source, _surround(gradient, axis, start, side - stop))]


def _select(step: Step, gradient: Tensor) -> Gradients:
    axis, index = step.option(1, "dim", 0) % (gradient.ndim + 1), step.option(2, "index", 0)
    if axis == 0:
        raise refusal(step.node, "only one of the channels, rows or columns may be picked, not one of the images")
    side = step.inputs[0].shape[axis]
    return [(step.source, _surround(gradient.unsqueeze(axis), axis, index % side, side - 1 - index % side))]


def _surround(gradient: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Return a tensor with zeros before and after it along one axis."""
    axis %= gradient.ndim
    pads = [0] * (2 * (gradient.ndim - axis))
    pads[-2:] = [before, after]
    return functional.pad(gradient, pads)


def _pad(step: Step, gradient: Tensor) -> Gradients:
    pads = step.inputs[1]
    for position in range(len(pads) // 2):
        before, after = pads[2 * position : 2 * position + 2]
        gradient = _crop(gradient, gradient.ndim - 1 - position, before, after)
    return [(step.source, gradient)]


def _crop(gradient: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Return the gradient of what padding kept: cropped, or where the pad was negative padded."""
    if before < 0 or after < 0:
        gradient = _surround(gradient, axis, max(0, -before), max(0, -after))
    before, after = max(0, before), max(0, after)
    return gradient.narrow(axis, before, gradient.shape[axis] - before - after) if before or after else gradient


def _take(step: Step, gradient: Tensor) -> Gradients:
    """Return one of an operator's several outputs: of a pool the maxima, of a split a part."""
    producer, index = arguments_of(step.node)
    if producer.target is ATEN.max_pool2d_with_indices.default and index == 0:
        return [(producer, gradient)]
    if producer.target is not ATEN.split_with_sizes.default:
        raise refusal(producer, "only its first output has a rule")
    _, sizes, *rest = arguments_of(producer)
    axis = rest[0] if rest else producer.kwargs.get("dim", 0)
    before, after = sum(sizes[:index]), sum(sizes[index + 1 :])
    return [(producer, _surround(gradient, axis, before, after))]


def _split(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, gradient)]  # `_take` has put the parts in their places


# Pooling and sums


def _mean(step: Step, gradient: Tensor) -> Gradients:
    x, axes = step.inputs[0], step.option(1, "dim")
    count = math.prod(x.shape[axis] for axis in axes)
    return [(step.source, _unreduce(step, gradient / count))]


def _sum(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, _unreduce(step, gradient))]


def _unreduce(step: Step, gradient: Tensor) -> Tensor:
    """Return the gradient of a sum over axes, repeated along them."""
    x = step.inputs[0]
    axes = sorted(axis % x.ndim for axis in step.option(1, "dim"))
    if 0 in axes:
        raise refusal(step.node, "it mixes images of a batch")
    if not step.option(2, "keepdim", False):
        for axis in axes:
            gradient = gradient.unsqueeze(axis)
    return gradient.expand(-1, *x.shape[1:])


def _average_pool(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, spread_means(gradient, *average_matrices(step.node)))]


def _adaptive_pool(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, spread_means(gradient, *adaptive_matrices(step.node)))]


def _max_pool(step: Step, gradient: Tensor) -> Gradients:
    return [(step.source, spread_maxima(gradient, step.output[1], step.inputs[0]))]


def adaptive_matrices(node: fx.Node) -> tuple[Matrix, Matrix]:
    """Return the matrices of an adaptive average pool, along height and along width."""
    sides, cells = shape_of(arguments_of(node)[0])[2:], shape_of(node)[2:]
    return adaptive_matrix(sides[0], cells[0]), adaptive_matrix(sides[1], cells[1])


def average_matrices(node: fx.Node) -> tuple[Matrix, Matrix]:
    """Return the matrices of an average pool, along height and along width."""
    kernel, stride, padding, _, count_padding, divisor = pool_arguments(node)
    sides, cells = shape_of(arguments_of(node)[0])[2:], shape_of(node)[2:]
    rows, columns = (
        average_matrix(
            sides[axis], cells[axis], kernel[axis], stride[axis], padding[axis],
            count_padding=count_padding, divide=divisor is None,
        )
        for axis in (0, 1)
    )  # fmt: skip
    return (rows, columns) if divisor is None else (rows / divisor, columns)


def pool_arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return an average pool's kernel, stride, padding, ceil_mode, count_include_pad and divisor_override."""
    defaults = [None, None, [], [0, 0], False, True, None]
    _, kernel, stride, padding, ceil_mode, count_padding, divisor = _completed(node, defaults)
    return _pair(kernel), _pair(stride or kernel), _pair(padding), ceil_mode, count_padding, divisor


def max_pool_arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return a max pool's kernel, stride, padding, dilation and ceil_mode."""
    defaults = [None, None, [], [0, 0], [1, 1], False]
    _, kernel, stride, padding, dilation, ceil_mode = _completed(node, defaults)
    return _pair(kernel), _pair(stride or kernel), _pair(padding), _pair(dilation), ceil_mode


def _completed(node: fx.Node, defaults: Sequence[Any]) -> list[Any]:
    given = arguments_of(node)
    return [*given, *defaults[len(given) :]]


def _pair(values: Any) -> list[int]:  # noqa: ANN401 - a number or a list of one or two
    listed = list(values) if isinstance(values, list | tuple) else [values]
    return listed * 2 if len(listed) == 1 else listed


RULES: dict[Any, Rule] = {
    ATEN.convolution.default: _convolution,
    ATEN.linear.default: _linear,
    ATEN.relu.default: _relu,
    ATEN.hardtanh.default: _hardtanh,
    ATEN.clamp.default: _clamp,
    ATEN.leaky_relu.default: _leaky_relu,
    ATEN.elu.default: _elu,
    ATEN.sigmoid.default: _sigmoid,
    ATEN.tanh.default: _tanh,
    ATEN.silu.default: _silu,
    ATEN.gelu.default: _gelu,
    ATEN.add.Tensor: _add,
    ATEN.sub.Tensor: _subtract,
    ATEN.mul.Tensor: _multiply,
    ATEN.div.Tensor: _divide,
    ATEN.neg.default: _negate,
    ATEN.pow.Tensor_Scalar: _power,
    ATEN.log.default: _logarithm,
    ATEN.reshape.default: _reshape,
    ATEN.squeeze.dims: _reshape,
    ATEN.unsqueeze.default: _reshape,
    ATEN.permute.default: _permute,
    ATEN.expand.default: _expand,
    ATEN.cat.default: _concatenate,
    ATEN.select.int: _select,
    ATEN.slice.Tensor: _slice,
    ATEN.constant_pad_nd.default: _pad,
    ATEN.split_with_sizes.default: _split,
    getitem: _take,
    ATEN.mean.dim: _mean,
    ATEN.sum.dim_IntList: _sum,
    ATEN.avg_pool2d.default: _average_pool,
    ATEN.adaptive_avg_pool2d.default: _adaptive_pool,
    ATEN.max_pool2d_with_indices.default: _max_pool,
}
"""Rules by ATen operator."""
