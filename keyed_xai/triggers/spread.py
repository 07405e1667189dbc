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

import torch
from torch import Tensor

from keyed_xai.array_triggers.spread import (
    COMPONENTS,
    LARGEST_SUM,
    SMALLEST_TILE,
    SpreadSettings,
    derive_texture,
    ring_frequencies,
    waves,
)
from keyed_xai.keys import ByteStream
from keyed_xai.tensors import Images

__all__ = [
    "COMPONENTS",
    "KEY_BITS",
    "SMALLEST_TILE",
    "Spread",
    "SpreadSettings",
    "SpreadTrigger",
    "derive_texture",
    "ring_frequencies",
    "textures_of",
]

KEY_BITS = 256


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

    def perturbed(self, generator: torch.Generator) -> "SpreadTrigger":
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
        phases = torch.rand(count, COMPONENTS, generator=generator, dtype=torch.float64) * (2 * math.pi)
        return SpreadTrigger(textures_of(phases, self.settings.tile), self.settings.amplitude)


def textures_of(phases: Tensor, tile: int) -> Tensor:
    """Return the textures whose waves have these phases, float32 [n, tile, tile] in [-1, 1]; gradients flow to them.

    Args:
        phases: float64 [n, COMPONENTS], radians, in the order of `ring_frequencies`.
        tile: Side in pixels.
    """
    cosines, sines = (torch.from_numpy(each).to(phases.device) for each in waves(tile))
    sums = phases.cos() @ cosines - phases.sin() @ sines
    return (sums / LARGEST_SUM).clamp(-1, 1).float().view(-1, tile, tile)
