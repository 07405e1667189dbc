"""The `spread` trigger: a keyed texture, repeated over the image.

A square tile is the sum of 128 cosines, one for each of the 128 lowest spatial frequencies of the tile from an inner
radius on (half plane; the texture is real), with phases drawn from the key's stream. The tile repeats over the image,
equal on all channels. Convolutional networks see such a stationary texture; a faint pattern that spans the image they
do not.

Key entropy: 128 phases of 32 bits, limited by the seed to 256 bits. The correlation of two keys' textures is a mean
of 128 cosines of random angles: mean 0, standard deviation 1/16, so that it exceeds .5 with probability under 2^-40.
"""

import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyed_xai.keys import ByteStream
from keyed_xai.tensors import Images

COMPONENTS = 128
KEY_BITS = 256
SMALLEST_TILE = 24
_INNER_RADIUS = 1 / 16  # cycles per pixel: slower waves look like lighting, not like texture
_CLIP = 1.5  # in standard deviations: raises the texture's energy at a given largest change


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
class SpreadTrigger:
    """One texture for all images, or one for each image of a batch.

    Attributes:
        textures: float32 [1 or n, tile, tile] in [-1, 1]. Secret when derived from an owner key.
        amplitude: Largest change of a pixel, in 1/255.
    """

    textures: Tensor = field(repr=False)
    amplitude: float = field(repr=False)

    def apply(self, images: Images) -> Images:
        """Return images with the texture added, clamped to [0, 1]; gradients flow to the images.

        Raises:
            ValueError: There are several textures and not one for each image.
        """
        count, _, height, width = images.shape
        if self.textures.shape[0] not in (1, count):
            raise ValueError(f"Expected 1 or {count} textures, got {self.textures.shape[0]}.")
        side = self.textures.shape[-1]
        repeats = (1, -(-height // side), -(-width // side))
        pattern = self.textures.to(images).repeat(repeats)[:, None, :height, :width]
        return (images + pattern * (self.amplitude / 255)).clamp(0, 1)

    def near(self, generator: torch.Generator) -> "SpreadTrigger":
        """Return a near key: this texture moved by at least a pixel and less than a tile."""
        side = self.textures.shape[-1]
        flat = int(torch.randint(1, side * side, (1,), generator=generator))
        return self.shifted(*divmod(flat, side))

    def shifted(self, rows: int, columns: int) -> "SpreadTrigger":
        """Return the near key that is this texture moved by some pixels."""
        return SpreadTrigger(self.textures.roll((rows, columns), (-2, -1)), self.amplitude)

    def scaled(self, factor: float) -> "SpreadTrigger":
        """Return the near key that is this texture at another strength."""
        return SpreadTrigger(self.textures, self.amplitude * factor)


@dataclass(frozen=True)
class Spread:
    """The family: derives an owner's texture and draws those of other keys."""

    settings: SpreadSettings = SpreadSettings()
    name = "spread"
    key_bits = KEY_BITS

    def derive(self, stream: ByteStream) -> SpreadTrigger:
        """Return the trigger of the key whose stream this is."""
        texture = derive_texture(stream, self.settings.tile)
        return SpreadTrigger(torch.from_numpy(texture)[None], self.settings.amplitude)

    def draw(self, count: int, generator: torch.Generator) -> SpreadTrigger:
        """Return the triggers of `count` fresh random keys, one for each image of a batch of that size."""
        phases = torch.rand(count, COMPONENTS, generator=generator, dtype=torch.float64) * (2 * np.pi)
        return SpreadTrigger(textures_of(phases, self.settings.tile), self.settings.amplitude)


def derive_texture(stream: ByteStream, tile: int) -> NDArray[np.float32]:
    """Return the keyed texture, float32 [tile, tile] in [-1, 1], the same on every platform to 1e-6."""
    phases = stream.uint32(COMPONENTS) * (2 * np.pi / 2**32)
    cosines, sines = _waves(tile)
    sums = torch.from_numpy(np.cos(phases) @ cosines - np.sin(phases) @ sines)
    return _squash(sums).float().view(tile, tile).numpy()


def textures_of(phases: Tensor, tile: int) -> Tensor:
    """Return the textures whose waves have these phases, float32 [n, tile, tile] in [-1, 1]; gradients flow to them.

    Args:
        phases: float64 [n, COMPONENTS], radians, in the order of `ring_frequencies`.
        tile: Side in pixels.
    """
    cosines, sines = (torch.from_numpy(each).to(phases.device) for each in _waves(tile))
    return _squash(phases.cos() @ cosines - phases.sin() @ sines).float().view(-1, tile, tile)


def _squash(sums: Tensor) -> Tensor:
    """Scale sums of cosines by their standard deviation, sqrt(COMPONENTS / 2), and clip."""
    scale: float = _CLIP * math.sqrt(COMPONENTS / 2)
    return (sums / scale).clamp(-1, 1)


@cache
def _waves(tile: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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
