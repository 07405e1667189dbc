"""The `spread` trigger: a keyed texture, repeated over the image.

A square tile is the sum of cosines at spatial frequencies of the tile (half plane; the texture is real), from an inner
radius on. The tile repeats over the image, equal on all channels. Convolutional networks see such a stationary texture;
a faint pattern that spans the image they do not.

Version 2 has 16 waves, which the key's stream chooses, with their phases, among all up to an outer radius, 240 on a
tile of 32 pixels. A network sees which frequencies are there long before it sees how they are aligned. Key entropy:
log2 of the number of choices, 81 bits for 240, and that of the phases, as far as a network looks at them. Two keys'
textures correlate by their shared waves, 1 of 16 in the mean, and above .5 with probability under 2^-40.

Version 1 has the 128 lowest frequencies, and the key chooses the phases alone. The correlation of two keys' textures is
a mean of 128 cosines of random angles: mean 0, standard deviation 1/16, so that it exceeds .5 with probability under
2^-40.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keyed_xai.array_triggers.spread import LARGEST, SpreadSettings, derive_texture, public_frequencies
from keyed_xai.keys import SEED_BYTES, ByteStream
from keyed_xai.tensors import Images

__all__ = ["Spread", "SpreadSettings", "SpreadTrigger", "places_in_spectrum", "textures_of"]


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

    @property
    def version(self) -> int:
        """Version of the texture."""
        return self.settings.version

    @property
    def key_bits(self) -> int:
        """Log2 of the number of choices, rounded down; of version 1, where there is no choice, the seed's 256 bits."""
        if self.version == 1:
            return 8 * SEED_BYTES
        return math.floor(math.log2(math.comb(len(public_frequencies(self.settings)), self.settings.waves)))

    def derive(self, stream: ByteStream) -> SpreadTrigger:
        """Return the trigger of the key whose stream this is."""
        texture = derive_texture(stream, self.settings)
        return SpreadTrigger(torch.from_numpy(texture)[None], self.settings.amplitude)

    def draw(self, count: int, generator: torch.Generator) -> SpreadTrigger:
        """Return the triggers of `count` fresh random keys, one for each image of a batch of that size."""
        known, waves = len(public_frequencies(self.settings)), self.settings.waves
        phases = torch.rand(count, waves, generator=generator, dtype=torch.float64) * (2 * math.pi)
        heights = torch.polar(torch.ones_like(phases), phases)
        if waves < known:
            chosen = torch.rand(count, known, generator=generator).argsort(1)[:, :waves]
            heights = heights.new_zeros(count, known).scatter(1, chosen, heights)
        return SpreadTrigger(textures_of(heights, self.settings), self.settings.amplitude)


def textures_of(heights: Tensor, settings: SpreadSettings) -> Tensor:
    """Return textures whose waves have these heights, float32 [n, tile, tile] in [-1, 1]; gradients flow to them.

    Args:
        heights: Complex height of the wave at each public frequency: its size, and its phase as the angle, [n, f].
            Only their proportions count: sums are clipped at the same number of standard deviations.
        settings: Public parameters of the textures.
    """
    if not len(heights):  # torch 2.11 cannot transform nothing
        return torch.zeros(0, settings.tile, settings.tile, device=heights.device)
    down, across = places_in_spectrum(settings, heights.device)
    spectrum = heights.new_zeros(len(heights), settings.tile, settings.tile)
    spectrum[:, down, across] = heights
    sums = settings.tile**2 * torch.fft.ifft2(spectrum).real
    deviation = (heights.abs().square().sum(1) / 2).sqrt()[:, None, None]
    textures: Tensor = (sums / (LARGEST * deviation)).clamp(-1, 1).float()
    return textures


def places_in_spectrum(settings: SpreadSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the public frequencies in a spectrum [tile, tile]."""
    down, across = torch.from_numpy(public_frequencies(settings) % settings.tile).to(device).T
    return down, across
