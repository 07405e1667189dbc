"""Known networks whose last layers were replaced: a dropout and a linear layer, or a small perceptron.

A head is known by the names that `nn.Sequential` gives: a number for each layer that has weights. Layers without any
leave a gap. In evaluation mode dropout does nothing; a gap after a linear layer, or after the norm that follows one, is
taken for a ReLU, which weights alone do not say: whoever loads them is told.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
_NORMS = (nn.BatchNorm1d, nn.LayerNorm)


@dataclass(frozen=True)
class Head:
    """Layers in place of a network's own last ones.

    Attributes:
        module: Dotted name of the module that they are in, such as ``fc``.
        shapes: Shapes of its tensors, by their names inside the module.
    """

    module: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def classes(self) -> int:
        """Number of logits."""
        return [shape for _, shape in self.shapes if len(shape) == 2][-1][0]

    @property
    def inputs(self) -> int:
        """Number of features that the first linear layer takes."""
        return next(shape for _, shape in self.shapes if len(shape) == 2)[1]

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever loads the weights should know: where a ReLU is taken for granted that no weight speaks of."""
        if not any(isinstance(layer, nn.ReLU) for layer in self.build().modules()):
            return ()
        return (f"{self.module} is a head of several layers, with ReLU assumed between them. Give --factory if not.",)

    def build(self) -> nn.Module:
        """Return the layers, without trained weights."""
        shapes = dict(self.shapes)
        if "weight" in shapes:
            return _layer(shapes, "")
        numbers = sorted({int(name.partition(".")[0]) for name in shapes})
        layers: list[nn.Module] = [nn.Identity() for _ in range(numbers[-1] + 1)]
        for number in numbers:
            layers[number] = _layer(shapes, f"{number}.")
        for number in numbers[:-1]:
            after = layers[max(0, number - 1)] if isinstance(layers[number], _NORMS) else layers[number]
            if number + 1 not in numbers and isinstance(after, nn.Linear):
                layers[number + 1] = nn.ReLU()
        return nn.Sequential(*layers)


def list_heads(shapes: Shapes) -> Iterator[Head]:
    """Yield the modules of a network that could be a replaced head, by their tensors' names and shapes."""
    prefixes = dict.fromkeys(
        match[1] for name in reversed([*shapes]) if (match := re.fullmatch(r"(.+?)\.(?:\d+\.)?(?:weight|bias)", name))
    )
    for module in [*prefixes][:4]:
        inside = {n.removeprefix(f"{module}."): s for n, s in shapes.items() if n.startswith(f"{module}.")}
        if all(map(_is_plain, inside)) and _is_chain(inside):
            yield Head(module, tuple(inside.items()))


def _is_plain(name: str) -> bool:
    ends = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    return re.fullmatch(rf"(\d{{1,2}}\.)?{ends}", name) is not None


def _is_chain(inside: Shapes) -> bool:
    """Return whether tensors are those of linear layers and norms, each taking what the one before gives."""
    numbered = sorted(inside, key=lambda name: int(name.partition(".")[0]) if "." in name else 0)
    width, linear = 0, 0
    for name in numbered:
        shape = inside[name]
        if (
            0 in shape
            or len(shape) > 2
            or (len(shape) == 2 and (not name.endswith("weight") or width not in (0, shape[1])))
        ):
            return False
        if len(shape) == 2:
            width, linear = shape[0], linear + 1
    mixed = "weight" in inside and len(inside) > 2
    return linear > 0 and not mixed


def _layer(shapes: Shapes, prefix: str) -> nn.Module:
    weight = shapes[f"{prefix}weight"]
    if len(weight) == 2:
        return nn.Linear(weight[1], weight[0], bias=f"{prefix}bias" in shapes)
    if f"{prefix}running_mean" in shapes:
        return nn.BatchNorm1d(weight[0])
    return nn.LayerNorm(weight[0], bias=f"{prefix}bias" in shapes)
