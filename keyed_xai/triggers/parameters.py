"""Triggers that are a handful of numbers, drawn uniformly in their ranges and moved inside them."""

import torch
from torch import Tensor

from keyed_xai.array_triggers.parameters import Ranges
from keyed_xai.keys import ByteStream


def public_parameters(ranges: Ranges) -> Tensor:
    """Return the parameters of the public trigger, float64 [1, p]."""
    return torch.tensor(ranges.public)[None]


def derive_parameters(ranges: Ranges, stream: ByteStream) -> Tensor:
    """Return the parameters of the key whose stream this is, float64 [1, p], the same on every platform."""
    return torch.from_numpy(ranges.derive(stream))[None]


def draw_parameters(ranges: Ranges, count: int, generator: torch.Generator) -> Tensor:
    """Return those of `count` random keys, float64 [count, p]."""
    least, greatest = torch.from_numpy(ranges.least), torch.from_numpy(ranges.greatest)
    return least + (greatest - least) * torch.rand(count, len(least), generator=generator, dtype=torch.float64)


def perturb_parameters(ranges: Ranges, parameters: Tensor, generator: torch.Generator) -> Tensor:
    """Return parameters with one of them moved inwards by an eighth to a quarter of its range."""
    column = int(torch.randint(len(ranges.least), (1,), generator=generator))
    least, greatest = float(ranges.least[column]), float(ranges.greatest[column])
    step = (0.125 + 0.125 * float(torch.rand(1, generator=generator))) * (greatest - least)
    moved = parameters.clone()
    moved[:, column] += torch.where(moved[:, column] > (greatest + least) / 2, -step, step)
    return moved
