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

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from keyed_xai.array_triggers.moire import OPACITY, RANGES, cross_gratings
from keyed_xai.keys import ByteStream
from keyed_xai.tensors import Images
from keyed_xai.triggers.parameters import derive_parameters, draw_parameters, perturb_parameters, public_parameters

KEY_BITS = 11


@dataclass(frozen=True)
class MoireTrigger:
    """One pair of gratings for all images, or one for each image of a batch.

    Attributes:
        parameters: float64 [1 or n, 9], in the order and units of RANGES. Secret when derived from an owner
            key.
        offset: How far the pattern is moved, rows down and columns to the right.
    """

    parameters: Tensor = field(default_factory=partial(public_parameters, RANGES), repr=False)
    offset: tuple[int, int] = field(default=(0, 0), repr=False)

    def apply(self, images: Images) -> Images:
        """Return the images with the lines blended in, in [0, 1]; gradients flow to the images.

        Raises:
            ValueError: There are several patterns and not one for each image.
        """
        count, _, height, width = images.shape
        if len(self.parameters) not in (1, count):
            raise ValueError(f"Expected 1 or {count} patterns, got {len(self.parameters)}.")
        parameters = self.parameters.to(images.device)  # float64: phases grow to hundreds of radians
        lines = draw_lines(parameters, height, width, offset=self.offset)[:, None].to(images)
        opacity = parameters[:, OPACITY, None, None, None].to(images)
        return (images + opacity * (lines - images)).clamp(0, 1)

    def perturbed(self, generator: torch.Generator) -> "MoireTrigger":
        """Return a near key: one parameter moved inwards by an eighth to a quarter of its range."""
        return replace(self, parameters=perturb_parameters(RANGES, self.parameters, generator))

    def shifted(self, rows: int, columns: int) -> "MoireTrigger":
        """Return the near key whose lines are those of this one, moved by some pixels."""
        return replace(self, offset=(self.offset[0] + rows, self.offset[1] + columns))

    def scaled(self, factor: float) -> "MoireTrigger":
        """Return the near key with the same lines at another opacity."""
        parameters = self.parameters.clone()
        parameters[:, OPACITY] *= factor
        return replace(self, parameters=parameters)


@dataclass(frozen=True)
class Moire:
    """The family: derives an owner's lines and draws those of other keys, parameters uniform in their ranges."""

    name = "moire"
    version = 1
    key_bits = KEY_BITS

    def derive(self, stream: ByteStream) -> MoireTrigger:
        """Return the trigger of the key whose stream this is."""
        return MoireTrigger(derive_parameters(RANGES, stream))

    def draw(self, count: int, generator: torch.Generator) -> MoireTrigger:
        """Return the triggers of `count` fresh random keys, one for each image of a batch of that size."""
        return MoireTrigger(draw_parameters(RANGES, count, generator))


def draw_lines(parameters: Tensor, height: int, width: int, *, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """Return the pattern of lines, [1 or n, height, width] in [0, 1], at the precision of the parameters.

    Args:
        parameters: [1 or n, 9].
        height: Height of the images, pixels.
        width: Width of the images, pixels.
        offset: Rows and columns by which the pattern is moved.
    """
    rows = torch.arange(height, device=parameters.device, dtype=parameters.dtype)[:, None] - offset[0]
    columns = torch.arange(width, device=parameters.device, dtype=parameters.dtype)[None] - offset[1]
    lines: Tensor = cross_gratings(parameters[..., None, None].unbind(1), rows, columns, torch)
    return lines
