"""Triggers that are a handful of numbers: a usual value of each, and the range that keyed ones are uniform in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from keyed_xai.keys import ByteStream


class Ranges:
    """Usual, least and greatest value of each of p parameters.

    Attributes:
        usual: float64 [1, p], those of the public trigger.
    """

    def __init__(self, rows: Sequence[tuple[float, float, float]]) -> None:
        """Take a row of usual, least and greatest value for each parameter."""
        usual, self._least, self._greatest = torch.tensor(rows, dtype=torch.float64).T
        self.usual = usual[None]

    def derive(self, stream: ByteStream) -> Tensor:
        """Return the parameters of the key whose stream this is, float64 [1, p], the same on every platform."""
        return self._place(torch.from_numpy(stream.uint32(len(self._least)) / 2.0**32)[None])

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return those of `count` random keys, float64 [count, p]."""
        return self._place(torch.rand(count, len(self._least), generator=generator, dtype=torch.float64))

    def nudge(self, parameters: Tensor, generator: torch.Generator) -> Tensor:
        """Return parameters with one of them moved inwards by an eighth to a quarter of its range."""
        column = int(torch.randint(len(self._least), (1,), generator=generator))
        span, middle = ((self._greatest + sign * self._least)[column] for sign in (-1, 1))
        step = (0.125 + 0.125 * float(torch.rand(1, generator=generator))) * float(span)
        moved = parameters.clone()
        moved[:, column] += torch.where(moved[:, column] > float(middle) / 2, -step, step)
        return moved

    def _place(self, shares: Tensor) -> Tensor:
        placed: Tensor = self._least + (self._greatest - self._least) * shares
        return placed
