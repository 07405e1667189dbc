"""Running a program forward while keeping what came out, and sweeping it backwards with the rules: autograd in a graph.

Nothing here asks PyTorch for a gradient, so the whole can be exported as one forward pass.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from keyed_xai.errors import ModelError
from keyed_xai.export.pooling import max_pool, pool_adaptively
from keyed_xai.export.program import ATEN, Program, arguments_of, getitem, shape_of
from keyed_xai.export.rules import Step, adaptive_matrices, average_matrices, find_rule, max_pool_arguments

Values = dict[fx.Node, Any]
"""What every node gave in one forward pass."""
_FLATTENINGS = {ATEN.reshape.default, ATEN.squeeze.dims}


class BackwardProgram(nn.Module):
    """A program whose forward pass can be swept backwards.

    Attributes:
        program: The operators of the forward pass.
    """

    def __init__(self, program: Program, *, input_gradient: bool = False, target: fx.Node | None = None) -> None:
        """Check that what will be asked for can be had.

        Args:
            program: The operators of the forward pass.
            input_gradient: Whether gradients of the image will be asked for.
            target: A feature map whose gradients will be.

        Raises:
            ModelError: An operator on the way has no rule.
        """
        super().__init__()
        self.program = program
        self._names = {node: f"constant_{number}" for number, node in enumerate(program.constants)}
        for node, value in program.constants.items():
            self.register_buffer(self._names[node], value.clone())
        self._head = _find_head(program, target) if target is not None else None
        sources = [program.image] if input_gradient else []
        sources += [] if target is None else [self._head or target]
        self._between = {source: _between(program, source) for source in sources}
        needed = {node for source, nodes in self._between.items() for node in nodes - {source}}
        for node in program.nodes:
            if node in needed:
                find_rule(node)
        self._indexed = {node for node in needed if node.target is ATEN.max_pool2d_with_indices.default}

    def run(self, image: Tensor) -> Values:
        """Return what every node gives for images [n, c, h, w]."""
        values: Values = {node: getattr(self, name) for node, name in self._names.items()}
        values[self.program.image] = image
        for node in self.program.nodes:
            values[node] = self._call(node, values)
        return values

    def gradient(self, values: Values, seed: Tensor, source: fx.Node) -> Tensor:
        """Return the gradient of (logits * seed).sum() with respect to the image or the target's feature map.

        Args:
            values: What `run` returned.
            seed: Weights of the logits, [n, classes].
            source: `program.image`, or the target that was named when this was made.
        """
        return self._sweep(values, {self.program.logits: seed}, source)

    def target_weights(self, values: Values, labels: Tensor, target: fx.Node) -> Tensor:
        """Return Grad-CAM's channel weights [n, c]: the spatial mean of the labelled logit's gradient.

        Where only pooling stands between the target and a linear layer, the mean passes through: pools hand on sums
        of gradients whole, so that layer's weights, summed over the cells of each channel, do.

        Args:
            values: What `run` returned.
            labels: Class explained of each image, [n].
            target: The target that was named when this was made.
        """
        logits = self.program.logits
        if logits.target is ATEN.linear.default:  # rows of the weights, instead of a product with a one-hot seed
            below, weight, *_ = arguments_of(logits)
            rows = values[weight].index_select(0, labels)
            if self._head is logits:
                return _sum_cells(rows, target)
            gradients = {below: rows}
        else:
            classes = torch.arange(shape_of(logits)[1], device=labels.device)
            gradients = {logits: (classes == labels[:, None]).to(values[logits].dtype)}
        if self._head is None:
            return self._sweep(values, gradients, target).mean((2, 3))
        return self._sweep(values, gradients, self._head) @ _sum_cells(values[arguments_of(self._head)[1]], target)

    def _call(self, node: fx.Node, values: Values) -> Any:  # noqa: ANN401 - a tensor or several
        inputs = _filled(node.args, values)
        if node.target is ATEN.max_pool2d_with_indices.default:
            arguments = max_pool_arguments(node)
            if node in self._indexed:
                return max_pool(inputs[0], *arguments)
            return (ATEN.max_pool2d(inputs[0], *arguments), None)
        if node.target is ATEN.adaptive_avg_pool2d.default:
            return pool_adaptively(inputs[0], *adaptive_matrices(node))
        return node.target(*inputs, **_filled(node.kwargs, values))  # type: ignore[operator]

    def _sweep(self, values: Values, gradients: Mapping[fx.Node, Tensor], source: fx.Node) -> Tensor:
        between = self._between[source]
        found = dict(gradients)
        for node in reversed(self.program.nodes):
            if node is source or node not in between or node not in found:
                continue
            step = Step(node, _filled(node.args, values), values[node])
            for argument, each in find_rule(node)(step, found.pop(node)):
                if isinstance(argument, fx.Node) and argument in between:
                    found[argument] = found[argument] + each if argument in found else each
        return found[source]


def _sum_cells(weight: Tensor, target: fx.Node) -> Tensor:
    """Return a linear layer's weights [k, channels * cells] as the mean over the target's cells that they amount to."""
    _, channels, height, width = shape_of(target)
    return weight.reshape(-1, channels, weight.shape[1] // channels).sum(2) / (height * width)


def _find_head(program: Program, target: fx.Node) -> fx.Node | None:
    """Return the linear layer that reads a feature map with only pooling in between, or None.

    Such pooling hands every cell's gradient on whole, so that sums of gradients over space are the same on both sides.
    """
    node = target
    while len(users := [each for each in node.users if each.op == "call_function"]) == 1:
        node = users[0]
        if node.target is ATEN.linear.default:
            return node if arguments_of(node)[1] in program.constants else None
        if not _keeps_sums(node):
            return None
    return None


def _keeps_sums(node: fx.Node) -> bool:
    if node.target is getitem:
        return bool(arguments_of(node)[1] == 0)
    if node.target is ATEN.avg_pool2d.default:
        return all(np.allclose(each.sum(1), 1) for each in average_matrices(node))
    if node.target is ATEN.mean.dim:
        return sorted(axis % 4 for axis in arguments_of(node)[1]) == [2, 3]
    if node.target in _FLATTENINGS:
        before = shape_of(arguments_of(node)[0])
        return shape_of(node) == (-1, math.prod(before[1:]))
    return node.target in (ATEN.max_pool2d_with_indices.default, ATEN.adaptive_avg_pool2d.default)


def _filled(arguments: Any, values: Values) -> Any:  # noqa: ANN401 - any nesting of nodes
    return fx.node.map_arg(arguments, lambda node: values[node])


def _between(program: Program, source: fx.Node) -> set[fx.Node]:
    """Return the nodes on the ways from a source to the logits, both ends included.

    Raises:
        ModelError: There is no way.
    """
    after = {source}
    for node in program.nodes:
        if any(each in after for each in node.all_input_nodes) and _is_differentiable(node):
            after.add(node)
    before = {program.logits}
    for node in reversed(program.nodes):
        if node in before:
            before.update(node.all_input_nodes)
    if program.logits not in after:
        raise ModelError("The logits do not depend on the layer asked for: name another target layer.")
    return after & before


def _is_differentiable(node: fx.Node) -> bool:
    value = node.meta["val"]
    first = value[0] if isinstance(value, tuple | list) else value
    return isinstance(first, Tensor) and first.is_floating_point()
