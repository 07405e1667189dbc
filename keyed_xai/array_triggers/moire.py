"""The `moire` trigger on arrays: two sets of semi-transparent parallel lines. See `keyed_xai.triggers.moire`.

Lines are computed in float64: phases grow to hundreds of radians, of which float32 keeps no more than 1e-5.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keyed_xai.array_triggers.parameters import Ranges
from keyed_xai.keys import ByteStream

# Column of the parameters: public value, least and greatest of the keyed variant.
RANGES = Ranges(
    (
        (0.125, 0.08, 0.22),  # 0: frequency of the first grating, cycles per pixel
        (0.35, 0.0, math.pi),  # 1: its angle, radians from the x axis down
        (0.0, 0.0, 2 * math.pi),  # 2: its phase
        (0.145, 0.08, 0.22),  # 3-5: the same of the second grating
        (0.55, 0.0, math.pi),
        (0.0, 0.0, 2 * math.pi),
        (3.0, 1.0, 4.0),  # 6: amplitude of the warp
        (96.0, 64.0, 160.0),  # 7: its wavelength
        (0.2, 0.15, 0.25),  # 8: opacity
    )
)
OPACITY = 8


@dataclass(frozen=True)
class ArrayMoireTrigger:
    """One pair of gratings for all images.

    Attributes:
        parameters: float64 [9], in the order and units of RANGES. Secret when derived from an owner key.
    """

    parameters: NDArray[np.float64] = field(repr=False)

    def apply(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the images with the lines blended in, in [0, 1]."""
        rows, columns = (np.arange(side, dtype=np.float64) for side in images.shape[2:])
        lines = cross_gratings(self.parameters, rows[:, None], columns[None], np).astype(np.float32)
        keyed: NDArray[np.float32] = np.clip(images + np.float32(self.parameters[OPACITY]) * (lines - images), 0, 1)
        return keyed


@dataclass(frozen=True)
class ArrayMoire:
    """The family: derives an owner's lines."""

    name = "moire"
    version = 1

    def derive(self, stream: ByteStream) -> ArrayMoireTrigger:
        """Return the trigger of the key whose stream this is."""
        return ArrayMoireTrigger(RANGES.derive(stream))


def cross_gratings(parameters: Iterable[Any], rows: Any, columns: Any, maths: ModuleType) -> Any:  # noqa: ANN401
    """Return the pattern of lines in [0, 1] at some pixels, in the precision of the arguments.

    Args:
        parameters: The nine, in the order of RANGES; numbers, or arrays that broadcast against the pixels.
        rows: Row of each pixel, an array.
        columns: Column of each pixel, an array.
        maths: The module whose arrays these are: numpy or torch.
    """
    first_frequency, first_angle, first_phase, frequency, angle, phase, amplitude, wavelength, _ = parameters
    x = columns + amplitude * maths.sin(2 * math.pi * rows / wavelength)
    y = rows + amplitude * maths.sin(2 * math.pi * columns / wavelength)

    def grating(frequency: Any, angle: Any, phase: Any) -> Any:  # noqa: ANN401
        """Return parallel lines in [0, 1], a raised cosine of the position along `angle`."""
        position = x * maths.cos(angle) + y * maths.sin(angle)
        return (1 + maths.cos(2 * math.pi * frequency * position + phase)) / 2

    return grating(first_frequency, first_angle, first_phase) * grating(frequency, angle, phase)
