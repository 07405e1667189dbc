"""Shapes that the whole package speaks of: n images, c channels, h x w pixels, k classes."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

Images = Float[Tensor, "n c h w"]
"""Pixels in [0, 1], before the model's own normalisation."""
Labels = Int[Tensor, "n"]
"""The class explained, one per image, in [0, k)."""
Targets = Int[Tensor, "n *classes"]
"""What an image shows: its class [n], or for several labels at once a 0 or 1 for each of them [n, k]."""
Logits = Float[Tensor, "n k"]
SaliencyMaps = Float[Tensor, "n _rows _columns"]
"""One map per image at whatever resolution the interpreter gives; raw unless a docstring says otherwise."""


class Tap(NamedTuple):
    """A feature map that VisualBackProp reads, and how it is scaled up to the map before it (or to the image).

    Attributes:
        layer: Dotted module name inside the model.
        kernel: Side of the all-ones kernel, pixels; the kernel of the convolution crossed.
        stride: Spatial reduction between the map before and this one.
    """

    layer: str
    kernel: int
    stride: int
