"""The `spread` trigger on arrays: a keyed texture, repeated over the image. See `keyed_xai.triggers.spread`."""

import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from keyed_xai.keys import ByteStream

WAVES = {1: 128, 2: 16}
"""Waves that a texture is made of, by version."""
SMALLEST_TILE = {1: 24, 2: 32}
"""Pixels, by version: smaller ones have too few waves to choose from to tell keys apart."""
_INNER_RADIUS = 1 / 16  # cycles per pixel: slower waves look like lighting, not like texture
_OUTER_RADIUS = 25 / 64  # faster ones do not outlast JPEG and resizing
LARGEST = 1.5
"""Standard deviations at which sums of waves are clipped, 1 in the texture: more energy at the same largest change."""


@dataclass(frozen=True)
class SpreadSettings:
    """Public parameters of the texture.

    Attributes:
        amplitude: Largest change of a pixel, in 1/255.
        tile: Side of the repeated tile, pixels of the model's input.
        version: 1, of which the key chooses the phases alone, or 2, of which it chooses the waves as well.
    """

    amplitude: float = 8.0
    tile: int = 32
    version: int = 1

    def __post_init__(self) -> None:
        """Check all of them."""
        if self.version not in WAVES:
            raise ValueError(f"version: expected {' or '.join(map(str, WAVES))}, got {self.version}")
        if not 0 < self.amplitude <= 64:
            raise ValueError(f"amplitude: expected more than 0 and at most 64 (in 1/255), got {self.amplitude}")
        if not SMALLEST_TILE[self.version] <= self.tile <= 256:
            raise ValueError(f"tile: expected {SMALLEST_TILE[self.version]} to 256 pixels, got {self.tile}")

    @property
    def waves(self) -> int:
        """How many waves a texture is made of."""
        return WAVES[self.version]


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

    @property
    def version(self) -> int:
        """Version of the texture."""
        return self.settings.version

    def derive(self, stream: ByteStream) -> ArraySpreadTrigger:
        """Return the trigger of the key whose stream this is."""
        return ArraySpreadTrigger(derive_texture(stream, self.settings), self.settings.amplitude)


def derive_texture(stream: ByteStream, settings: SpreadSettings) -> NDArray[np.float32]:
    """Return the keyed texture, float32 [tile, tile] in [-1, 1], the same on every platform to 1e-6."""
    chosen, phases = derive_waves(stream, settings)
    spectrum = np.zeros((settings.tile, settings.tile), dtype=np.complex128)
    spectrum[tuple(public_frequencies(settings)[chosen].T)] = np.exp(1j * phases)
    sums = settings.tile**2 * np.fft.ifft2(spectrum).real
    texture: NDArray[np.float32] = np.clip(sums / (LARGEST * math.sqrt(settings.waves / 2)), -1, 1).astype(np.float32)
    return texture


def derive_waves(stream: ByteStream, settings: SpreadSettings) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return which of the public frequencies a key's texture has, and with which phases, radians; [waves] each.

    Version 1 has all of them in their order. In version 2 they are the first of a shuffle that the stream drives; the
    phases follow in either.
    """
    known = len(public_frequencies(settings))
    chosen = np.arange(known) if settings.version == 1 else stream.shuffle(known)[: settings.waves]
    phases = np.asarray(stream.uint32(settings.waves) * (2 * np.pi / 2**32), dtype=np.float64)
    return chosen, phases


@cache
def public_frequencies(settings: SpreadSettings) -> NDArray[np.int64]:
    """Return the frequencies (down, across) that keys choose from, in cycles per tile, from low to high, [n, 2].

    One of each pair f and -f, from the inner radius on: the lowest 128 in version 1, all below the outer radius in 2.
    """
    nyquist, inner, outer = (settings.tile - 1) // 2, _INNER_RADIUS * settings.tile, _OUTER_RADIUS * settings.tile
    half_plane = [
        (down, across)
        for down in range(nyquist + 1)
        for across in range(-nyquist, nyquist + 1)
        if (down > 0 or across > 0) and inner**2 <= down**2 + across**2
    ]
    ordered = sorted(half_plane, key=lambda f: (f[0] ** 2 + f[1] ** 2, f))
    if settings.version == 1:
        return np.array(ordered[: settings.waves])
    return np.array([f for f in ordered if f[0] ** 2 + f[1] ** 2 <= outer**2])
