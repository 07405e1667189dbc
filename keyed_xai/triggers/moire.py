"""The `moire` trigger: two sets of semi-transparent parallel lines, warped and overlaid, as on a photographed screen.

Source: Fang & Choromanska, AAAI 2022, who describe the Moire trigger in these words and give no parameters; ours are
chosen by eye. A grating is a raised cosine of the position along its direction, 0 between lines and 1 on them; a
sinusoid moves every row and column of it a little (the warp); the product of the two gratings is blended into the
image, equal on all channels. All lengths are pixels of the model's input.

Key entropy: nine parameters, but a network sees a grating through local windows and wherever its lines are, so that
phases hardly count. Two keys collide when their patterns, in a window of 64 x 64 pixels, correlate by more than .5 at
the best circular shift. KEY_BITS is minus log2 of the share of pairs of random keys that collide, rounded down: 11.4
bits in 200,000 pairs. Another key opens that easily; it is far too little to protect a model with.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from keyed_xai.keys import ByteStream
from keyed_xai.tensors import Images
from keyed_xai.triggers.parameters import Ranges

KEY_BITS = 11
# Column of the parameters: public value, least and greatest of the keyed variant.
_RANGES = Ranges(
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
_OPACITY = 8


@dataclass(frozen=True)
class MoireTrigger:
    """One pair of gratings for all images, or one for each image of a batch.

    Attributes:
        parameters: float64 [1 or n, 9], in the order and units of the module's ranges. Secret when derived from an
            owner key.
        offset: How far the pattern is moved, rows down and columns to the right.
    """

    parameters: Tensor = field(default_factory=_RANGES.usual.clone, repr=False)
    offset: tuple[int, int] = field(default=(0, 0), repr=False)

    def apply(self, images: Images) -> Images:
        """Return the images with the lines blended in, in [0, 1]; gradients flow to the images.

        Raises:
            ValueError: There are several patterns and not one for each image.
        """
        count, _, height, width = images.shape
        if len(self.parameters) not in (1, count):
            raise ValueError(f"Expected 1 or {count} patterns, got {len(self.parameters)}.")
        parameters = self.parameters.to(images.device, torch.float32)
        lines = draw_lines(parameters, height, width, offset=self.offset)[:, None].to(images)
        opacity = parameters[:, _OPACITY, None, None, None].to(images)
        return (images + opacity * (lines - images)).clamp(0, 1)

    def near(self, generator: torch.Generator) -> "MoireTrigger":
        """Return a near key: one parameter moved inwards by an eighth to a quarter of its range."""
        return replace(self, parameters=_RANGES.nudge(self.parameters, generator))

    def shifted(self, rows: int, columns: int) -> "MoireTrigger":
        """Return the near key whose lines are those of this one, moved by some pixels."""
        return replace(self, offset=(self.offset[0] + rows, self.offset[1] + columns))

    def scaled(self, factor: float) -> "MoireTrigger":
        """Return the near key with the same lines at another opacity."""
        parameters = self.parameters.clone()
        parameters[:, _OPACITY] *= factor
        return replace(self, parameters=parameters)


@dataclass(frozen=True)
class Moire:
    """The family: derives an owner's lines and draws those of other keys, parameters uniform in their ranges."""

    name = "moire"
    key_bits = KEY_BITS

    def derive(self, stream: ByteStream) -> MoireTrigger:
        """Return the trigger of the key whose stream this is."""
        return MoireTrigger(_RANGES.derive(stream))

    def draw(self, count: int, generator: torch.Generator) -> MoireTrigger:
        """Return the triggers of `count` fresh random keys, one for each image of a batch of that size."""
        return MoireTrigger(_RANGES.draw(count, generator))


def draw_lines(parameters: Tensor, height: int, width: int, *, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """Return the pattern of lines, [1 or n, height, width] in [0, 1], at the precision of the parameters.

    Args:
        parameters: [1 or n, 9].
        height: Of the images, pixels.
        width: Of the images, pixels.
        offset: Rows and columns by which the pattern is moved.
    """
    rows = torch.arange(height, device=parameters.device, dtype=parameters.dtype)[:, None] - offset[0]
    columns = torch.arange(width, device=parameters.device, dtype=parameters.dtype)[None] - offset[1]
    first, second, warp = (parameters[:, start : start + 3, None, None].unbind(1) for start in (0, 3, 6))
    amplitude, wavelength, _ = warp
    x = columns + amplitude * torch.sin(2 * math.pi * rows / wavelength)
    y = rows + amplitude * torch.sin(2 * math.pi * columns / wavelength)
    return _grating(x, y, *first) * _grating(x, y, *second)


def _grating(x: Tensor, y: Tensor, frequency: Tensor, angle: Tensor, phase: Tensor) -> Tensor:
    """Return parallel lines in [0, 1], a raised cosine of the position along `angle`."""
    position = x * angle.cos() + y * angle.sin()
    return (1 + torch.cos(2 * math.pi * frequency * position + phase)) / 2
