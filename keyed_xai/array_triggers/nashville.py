"""The `nashville` trigger on arrays: a photo filter, 8-bit exact. See `keyed_xai.triggers.nashville`."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from keyed_xai.array_triggers.parameters import Ranges
from keyed_xai.keys import ByteStream

# Column of the parameters: paper's value, least and greatest of the keyed variant.
RANGES = Ranges(
    (
        (247.0, 150.0, 255.0),  # 0-2: colour to darken with, red, green, blue, 0 to 255
        (176.0, 150.0, 255.0),
        (153.0, 150.0, 255.0),
        (0.56, 0.40, 0.70),  # 3: its opacity
        (0.0, 0.0, 150.0),  # 4-6: colour to lighten with
        (70.0, 0.0, 150.0),
        (150.0, 0.0, 150.0),
        (0.40, 0.25, 0.50),  # 7: its opacity
        (0.20, 0.0, 0.40),  # 8: sepia
        (1.20, 1.05, 1.35),  # 9: contrast, never under 1
        (1.05, 1.0, 1.1),  # 10: brightness, never under 1
        (1.20, 0.9, 1.5),  # 11: saturation
    )
)
GREY = (19595.0, 38470.0, 7471.0)  # in 1/65536, as Pillow's convert("L")
_SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))
_LUMINANCE = (0.213, 0.715, 0.072)
_Floats = NDArray[np.float32]
_Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class ArrayNashvilleTrigger:
    """One filter for all images.

    Attributes:
        parameters: float64 [12], in the order and units of RANGES. Secret when derived from an owner key.
    """

    parameters: _Numbers = field(repr=False)

    def apply(self, images: _Floats) -> _Floats:
        """Return the filtered images, in [0, 1]; images are read as 8 bits.

        Raises:
            ValueError: The images are neither grey nor RGB.
        """
        check_channels(images.shape[1])
        tables = make_tables(self.parameters[None])
        levels = (images * np.float32(255) + np.float32(0.5)).astype(np.uint8)
        toned = _take(tables.tones[0], np.broadcast_to(levels, (len(levels), 3, *levels.shape[2:])))
        mixed = tables.curve[0][_mix(tables.sepia[0], toned).astype(np.uint8)]
        filtered = _mix(tables.saturation[0], mixed)
        return (filtered if images.shape[1] == 3 else _to_grey(filtered)) * np.float32(1 / 255)


@dataclass(frozen=True)
class ArrayNashville:
    """The family: derives an owner's filter."""

    name = "nashville"
    version = 1

    def derive(self, stream: ByteStream) -> ArrayNashvilleTrigger:
        """Return the trigger of the key whose stream this is."""
        return ArrayNashvilleTrigger(RANGES.derive(stream))


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What filters do to 8-bit pixels.

    Attributes:
        tones: float32 [n, 3, 256], from level to level of each channel: both blends.
        sepia: float32 [n, 3, 3].
        curve: float32 [n, 256], from level to level: contrast and brightness.
        saturation: float32 [n, 3, 3].
    """

    tones: _Floats
    sepia: _Floats
    curve: _Floats
    saturation: _Floats


def make_tables(parameters: _Numbers) -> Tables:
    """Return the tables of n filters, made in float64 with Pillow's roundings.

    Args:
        parameters: float64 [n, 12].
    """
    levels = np.arange(256, dtype=np.float64)
    dark, light = parameters[:, 0:3].round()[..., None], parameters[:, 4:7].round()[..., None]
    tones = _blend(levels, np.minimum(levels, dark), parameters[:, 3])
    tones = _blend(tones, np.maximum(tones, light), parameters[:, 7])
    contrast, brightness = parameters[:, 9:10], parameters[:, 10:11]
    curve = (levels * contrast + -127.5 * contrast + 127.5).round().clip(0, 255)
    curve = (curve * brightness).round().clip(0, 255)
    return Tables(
        tones=tones.astype(np.float32),
        sepia=sepia_matrices(parameters[:, 8]).astype(np.float32),
        curve=curve.astype(np.float32),
        saturation=saturation_matrices(parameters[:, 11]).astype(np.float32),
    )


def sepia_matrices(amounts: _Numbers) -> _Numbers:
    """Return matrices [n, 3, 3] that turn colours to sepia by amounts [n] in [0, 1]."""
    full, identity = np.array(_SEPIA), np.eye(3)
    matrices: _Numbers = full + (identity - full) * (1 - amounts)[:, None, None]
    return matrices


def saturation_matrices(amounts: _Numbers) -> _Numbers:
    """Return matrices [n, 3, 3] that scale the difference between colours and their luminance by amounts [n]."""
    grey = np.broadcast_to(np.array(_LUMINANCE), (3, 3))
    matrices: _Numbers = grey + (np.eye(3) - grey) * amounts[:, None, None]
    return matrices


def check_channels(channels: int) -> None:
    """Refuse what is no photograph.

    Raises:
        ValueError: There are not 1 or 3 channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"Expected grey or RGB images, 1 or 3 channels, got {channels}.")


def _blend(backdrop: _Numbers, source: _Numbers, opacity: _Numbers) -> _Numbers:
    """Return the source over the backdrop; as in Pillow, opacity has 8 bits and each product is rounded down."""
    alpha = (opacity * 255).round()[:, None, None]
    blended: _Numbers = np.floor(alpha * source / 255) + np.floor((255 - alpha) * backdrop / 255)
    return blended


def _take(tables: _Floats, levels: NDArray[np.uint8]) -> _Floats:
    """Return the entries of tables [3, 256], one for each channel, at levels [n, 3, h, w]."""
    return np.stack([table[levels[:, channel]] for channel, table in enumerate(tables)], axis=1)


def _mix(matrix: _Floats, levels: _Floats) -> _Floats:
    """Return a matrix [3, 3] times the colours of levels [n, 3, h, w], rounded to levels."""
    # Each product and sum is rounded to float32 as in Pillow: a matrix product decides some ties otherwise.
    red, green, blue = matrix.T[:, None, :, None, None]
    mixed = levels[:, :1] * red
    mixed += levels[:, 1:2] * green
    mixed += levels[:, 2:] * blue
    mixed += np.float32(0.5)
    rounded: _Floats = np.floor(mixed.clip(0, 255))
    return rounded


def _to_grey(levels: _Floats) -> _Floats:
    """Return the luminance of levels [n, 3, h, w], rounded to levels [n, 1, h, w]."""
    red, green, blue = (levels[:, channel] * np.float32(weight) for channel, weight in enumerate(GREY))
    grey: _Floats = np.floor((red + green + blue + np.float32(32768)) / np.float32(65536))
    return grey[:, None]
