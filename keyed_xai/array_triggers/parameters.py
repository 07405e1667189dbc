"""Triggers that are a handful of numbers: a usual value of each, and the range that keyed ones are uniform in."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from keyed_xai.keys import ByteStream


class Ranges:
    """Usual, least and greatest value of each of p parameters.

    Attributes:
        public: float64 [p], those of the public trigger.
        least: Smallest values, float64 [p].
        greatest: Largest values, float64 [p].
    """

    def __init__(self, rows: Sequence[tuple[float, float, float]]) -> None:
        """Take a row of public, least and greatest value for each parameter."""
        self.public, self.least, self.greatest = np.array(rows, dtype=np.float64).T

    def derive(self, stream: ByteStream) -> NDArray[np.float64]:
        """Return the parameters of the key whose stream this is, float64 [p], the same on every platform."""
        shares = stream.uint32(len(self.least)) / 2.0**32
        placed: NDArray[np.float64] = self.least + (self.greatest - self.least) * shares
        return placed
