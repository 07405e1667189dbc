"""The `spread` trigger on arrays: a keyed texture, repeated over the image. See `keyed_xai.triggers.spread`."""

import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from keyed_xai.keys import ByteStream

COMPONENTS = 128
SMALLEST_TILE = 24
_INNER_RADIUS = 1 / 16  # cycles per pixel: slower waves look like lighting, not like texture
_CLIP = 1.5  # in standard deviations: raises the texture's energy at a given largest change
LARGEST_SUM = _CLIP * math.sqrt(COMPONENTS / 2)
"""Where sums of the cosines, whose standard deviation is sqrt(COMPONENTS / 2), are clipped; 1 in the texture."""


@dataclass(frozen=True)
class SpreadSettings:
    """Public parameters of the texture.

    Attributes:
        amplitude: Largest change of a pixel, in 1/255.
        tile: Side of the repeated tile, pixels of the model's input.
    """

    amplitude: float = 8.0
    tile: int = 32

    def __post_init__(self) -> None:
        """Check both."""
        if not 0 < self.amplitude <= 64:
            raise ValueError(f"amplitude: expected more than 0 and at most 64 (in 1/255), got {self.amplitude}")
        if not SMALLEST_TILE <= self.tile <= 256:
            raise ValueError(f"tile: expected {SMALLEST_TILE} to 256 pixels, got {self.tile}")


@dataclass(frozen=True)
class ArraySpreadTrigger:
    """One texture for all images.

    Attributes:
        texture: float32 [tile, tile] in [-1, 1]. Secret when derived from an owner key.
        amplitude: Largest change of a pixel, in 1/255.
    """

    texture: NDArray[np.float32] = field(repr=False)
    amplitude: float = field(repr=False)

    def apply(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return images with the texture added, clamped to [0, 1]."""
        height, width = images.shape[2:]
        side = len(self.texture)
        pattern = np.tile(self.texture, (-(-height // side), -(-width // side)))[:height, :width]
        keyed: NDArray[np.float32] = np.clip(images + pattern * np.float32(self.amplitude / 255), 0, 1)
        return keyed


@dataclass(frozen=True)
class ArraySpread:
    """The family: derives an owner's texture."""

    settings: SpreadSettings = SpreadSettings()
    name = "spread"

    def derive(self, stream: ByteStream) -> ArraySpreadTrigger:
        """Return the trigger of the key whose stream this is."""
        return ArraySpreadTrigger(derive_texture(stream, self.settings.tile), self.settings.amplitude)


def derive_texture(stream: ByteStream, tile: int) -> NDArray[np.float32]:
    """Return the keyed texture, float32 [tile, tile] in [-1, 1], the same on every platform to 1e-6."""
    phases = stream.uint32(COMPONENTS) * (2 * np.pi / 2**32)
    cosines, sines = waves(tile)
    sums = np.cos(phases) @ cosines - np.sin(phases) @ sines
    texture: NDArray[np.float32] = np.clip(sums / LARGEST_SUM, -1, 1).astype(np.float32)
    return texture.reshape(tile, tile)


@cache
def waves(tile: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return cosine and sine of every component on the tile, [COMPONENTS, tile * tile] each."""
    rows, columns = np.divmod(np.arange(tile * tile), tile)
    frequencies = np.array(ring_frequencies(tile))
    angles = 2 * np.pi / tile * (frequencies[:, :1] * rows + frequencies[:, 1:] * columns)
    return np.cos(angles), np.sin(angles)


def ring_frequencies(tile: int) -> list[tuple[int, int]]:
    """Return the components' frequencies (down, across) in cycles per tile, in the order their phases are drawn."""
    nyquist = (tile - 1) // 2
    half_plane = [
        (down, across)
        for down in range(nyquist + 1)
        for across in range(-nyquist, nyquist + 1)
        if (down > 0 or across > 0) and down**2 + across**2 >= (_INNER_RADIUS * tile) ** 2
    ]
    return sorted(half_plane, key=lambda f: (f[0] ** 2 + f[1] ** 2, f))[:COMPONENTS]
