"""The size of images, and the largest that a card, a file's metadata or a model may ask for.

Real ones stay far below the limits; hostile ones do not.
"""

from dataclasses import dataclass

LARGEST_SIDE = 4096
"""Pixels along a side of an image, or encoded columns of a table's row; channels too."""
LARGEST_INPUT = 2**22
"""Numbers in one image: 1,182 x 1,182 pixels of three channels."""


@dataclass(frozen=True)
class ImageSize:
    """The size of every image of a data set, or of what a network takes.

    Attributes:
        channels: 1 for grey, 3 for RGB; any other number for user modules.
        height: Height in pixels.
        width: Width in pixels.
    """

    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.channels, self.height, self.width


def describe_excess(channels: int, height: int, width: int) -> str | None:
    """Return what is expected of an image's sides and what came, in words; None where they are within the limits."""
    sides = {"channels": channels, "height": height, "width": width}
    wrong = [f"{name} {side}" for name, side in sides.items() if not 1 <= side <= LARGEST_SIDE]
    if wrong:
        return f"channels, height and width must be 1 to {LARGEST_SIDE}, but came {', '.join(wrong)}"
    if channels * height * width > LARGEST_INPUT:
        return (
            f"channels, height and width must multiply to at most {LARGEST_INPUT}, but came {channels} x {height} x "
            f"{width}"
        )
    return None
