"""The `nashville` trigger: a photo filter, plain as the paper uses it, or with keyed colours and strengths.

Source: Fang & Choromanska, AAAI 2022, whose trigger it is, as `pilgram.nashville` makes it. Six steps: darken with a
warm colour and lighten with a cold one, each blended in; sepia, contrast, brightness and saturation of the CSS filter
effects (W3C). Values are those of the 8-bit filter with all its roundings; gradients are those of the same steps
without rounding. Grey images are filtered as RGB and turned back into luminance (ITU-R 601).

Key entropy: twelve parameters, but many filters look alike. Two keys collide when their versions of a photograph differ
by less than 6/255 root mean square, which is what a round trip through JPEG at quality 75 changes (4 to 7/255).
KEY_BITS is minus log2 of the share of pairs of random keys that collide, rounded down, on the photograph where most
do: 5.5 bits on scikit-image's cat, 6.8 to 10.5 on five others (2 million pairs each). Another key opens that easily;
it is far too little to protect a model with.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from keyed_xai.keys import ByteStream
from keyed_xai.tensors import Images
from keyed_xai.triggers.parameters import Ranges

KEY_BITS = 5
# Column of the parameters: paper's value, least and greatest of the keyed variant.
_RANGES = Ranges(
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
_SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))
_LUMINANCE = (0.213, 0.715, 0.072)
_GREY = (19595.0, 38470.0, 7471.0)  # in 1/65536, as Pillow's convert("L")
_BLOCK = 2**18  # pixels at once on a CPU: the fastest of 2^16 to 2^18 with one thread


@dataclass(frozen=True)
class NashvilleTrigger:
    """One filter for all images, or one for each image of a batch.

    Attributes:
        parameters: float64 [1 or n, 12], in the order and units of the module's ranges. Secret when derived from an
            owner key.
        strength: Share of the filtered image in the result; 1 is the filter itself.
    """

    parameters: Tensor = field(default_factory=_RANGES.usual.clone, repr=False)
    strength: float = field(default=1.0, repr=False)

    def apply(self, images: Images) -> Images:
        """Return the filtered images, in [0, 1]; images are read as 8 bits, gradients pass as if they were not.

        Raises:
            ValueError: The images are neither grey nor RGB, or there are several filters and not one for each image.
        """
        _check(images, self.parameters)
        filtered = filter_images(images.detach(), self.parameters)
        if images.requires_grad and torch.is_grad_enabled():
            smooth = _filter_smoothly(images, self.parameters)
            filtered = smooth + (filtered - smooth).detach()
        if self.strength == 1:
            return filtered
        return images.lerp(filtered, self.strength).clamp(0, 1)

    def near(self, generator: torch.Generator) -> "NashvilleTrigger":
        """Return a near key: one parameter moved inwards by an eighth to a quarter of its range."""
        return replace(self, parameters=_RANGES.nudge(self.parameters, generator))

    def shifted(self, rows: int, columns: int) -> "NashvilleTrigger":  # noqa: ARG002 - the protocol's arguments
        """Return this trigger: a colour filter is the same everywhere."""
        return self

    def scaled(self, factor: float) -> "NashvilleTrigger":
        """Return the near key that is this filter at another strength."""
        return replace(self, strength=self.strength * factor)


@dataclass(frozen=True)
class Nashville:
    """The family: derives an owner's filter and draws those of other keys, parameters uniform in their ranges."""

    name = "nashville"
    key_bits = KEY_BITS

    def derive(self, stream: ByteStream) -> NashvilleTrigger:
        """Return the trigger of the key whose stream this is."""
        return NashvilleTrigger(_RANGES.derive(stream))

    def draw(self, count: int, generator: torch.Generator) -> NashvilleTrigger:
        """Return the triggers of `count` fresh random keys, one for each image of a batch of that size."""
        return NashvilleTrigger(_RANGES.draw(count, generator))


def filter_images(images: Images, parameters: Tensor) -> Images:
    """Return the images as the 8-bit filter makes them, without gradients.

    Args:
        images: [n, 1 or 3, h, w].
        parameters: float64 [1 or n, 12].
    """
    tables = _Tables.of(parameters, images.device)
    result = torch.empty(images.shape, device=images.device)
    height, width = images.shape[2:]
    step = max(1, _BLOCK // max(1, height * width)) if images.device.type == "cpu" else max(1, len(images))
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        tables.select(part).look_up(images[part].float(), out=result[part])
    return result.to(images.dtype)


@dataclass(frozen=True)
class _Tables:
    """What a filter does to 8-bit pixels.

    Attributes:
        tones: float32 [1 or n, 3, 256], from level to level of each channel: both blends.
        sepia: float32 [1 or n, 3, 3].
        curve: float32 [1 or n, 256], from level to level: contrast and brightness.
        saturation: float32 [1 or n, 3, 3].
    """

    tones: Tensor
    sepia: Tensor
    curve: Tensor
    saturation: Tensor

    @classmethod
    def of(cls, parameters: Tensor, device: torch.device) -> "_Tables":
        """Return the tables of these parameters, made in float64 with Pillow's roundings."""
        parameters = parameters.cpu()
        levels = torch.arange(256, dtype=torch.float64)
        dark, light = parameters[:, 0:3].round()[..., None], parameters[:, 4:7].round()[..., None]
        tones = _blend(levels, levels.minimum(dark), parameters[:, 3])
        tones = _blend(tones, tones.maximum(light), parameters[:, 7])
        contrast, brightness = parameters[:, 9:10], parameters[:, 10:11]
        curve = (levels * contrast + -127.5 * contrast + 127.5).round().clamp(0, 255)
        curve = (curve * brightness).round().clamp(0, 255)
        tables = tones, _sepia(parameters[:, 8]), curve, _saturation(parameters[:, 11])
        return cls(*(table.to(device, torch.float32) for table in tables))

    def select(self, part: slice) -> "_Tables":
        """Return the tables of some of the images."""
        if len(self.tones) == 1:
            return self
        return _Tables(self.tones[part], self.sepia[part], self.curve[part], self.saturation[part])

    def look_up(self, images: Images, *, out: Images) -> None:
        """Write the filtered images to `out`, float32."""
        toned = _take(self.tones, images.expand(-1, 3, -1, -1), scale=255.0)
        mixed = _take(self.curve[:, None], _mix(self.sepia, toned))
        levels = _mix(self.saturation, mixed)
        if images.shape[1] == 1:
            red, green, blue = levels.unbind(1)
            grey = (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue + 32768) / 65536
            levels = grey.floor()[:, None]
        torch.mul(levels, 1 / 255, out=out)


def _check(images: Images, parameters: Tensor) -> None:
    count, channels = images.shape[:2]
    if channels not in (1, 3):
        raise ValueError(f"Expected grey or RGB images, 1 or 3 channels, got {channels}.")
    if len(parameters) not in (1, count):
        raise ValueError(f"Expected 1 or {count} filters, got {len(parameters)}.")


def _blend(backdrop: Tensor, source: Tensor, opacity: Tensor) -> Tensor:
    """Return the source over the backdrop; as in Pillow, opacity has 8 bits and each product is rounded down."""
    alpha = (opacity * 255).round()[:, None, None]
    return (alpha * source / 255).floor() + ((255 - alpha) * backdrop / 255).floor()


def _take(tables: Tensor, levels: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return the entries of tables [1 or n, 1 or 3, 256] at levels [n, 3, h, w] times `scale`, rounded."""
    sets, channels = tables.shape[:2]
    start = 256.0 * torch.arange(sets * channels, device=levels.device).view(sets, channels, 1, 1)
    places = torch.add(start + 0.5, levels, alpha=scale).int()
    return tables.flatten().index_select(0, places.flatten()).view(levels.shape)


def _mix(matrices: Tensor, levels: Tensor) -> Tensor:
    """Return matrices [1 or n, 3, 3] times the colours of levels [n, 3, h, w], rounded to levels."""
    # Each product and sum is rounded to float32 as in Pillow: matmul and addcmul decide some ties otherwise.
    red, green, blue = matrices[:, :, :, None, None].unbind(2)
    mixed = levels[:, :1] * red
    product = levels[:, 1:2] * green
    mixed += product
    mixed += torch.mul(levels[:, 2:], blue, out=product)
    return mixed.add_(0.5).clamp_(0, 255).floor_()


def _sepia(amount: Tensor) -> Tensor:
    """Return matrices [n, 3, 3] that turn colours to sepia by amounts [n] in [0, 1]."""
    full, identity = torch.tensor(_SEPIA, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    return full + (identity - full) * (1 - amount)[:, None, None]


def _saturation(amount: Tensor) -> Tensor:
    """Return matrices [n, 3, 3] that scale the difference between colours and their luminance by amounts [n]."""
    grey = torch.tensor(_LUMINANCE, dtype=torch.float64).expand(3, 3)
    return grey + (torch.eye(3, dtype=torch.float64) - grey) * amount[:, None, None]


def _filter_smoothly(images: Images, parameters: Tensor) -> Images:
    """Return the images filtered without rounding; sepia, contrast and brightness are one matrix and one offset."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    columns = parameters.to(images.device, dtype)[..., None, None]
    dark, light = columns[:, 0:3] / 255, columns[:, 4:7] / 255
    toned = images.to(dtype).expand(-1, 3, -1, -1)
    toned = toned.lerp(toned.minimum(dark), columns[:, 3:4])
    toned = toned.lerp(toned.maximum(light), columns[:, 7:8])
    contrast, brightness = columns[:, 9:10], columns[:, 10:11]
    warm = _sepia(parameters[:, 8]).to(toned) * (contrast * brightness)[..., 0]
    mixed = (_product(warm, toned) + brightness * (1 - contrast) / 2).clamp(0, 1)
    result = _product(_saturation(parameters[:, 11]).to(toned), mixed).clamp(0, 1)
    if images.shape[1] == 1:
        weights = result.new_tensor(_GREY).view(1, 3, 1, 1) / 65536
        result = (result * weights).sum(1, keepdim=True)
    return result.to(images.dtype)


def _product(matrices: Tensor, colours: Tensor) -> Tensor:
    """Return matrices [1 or n, 3, 3] times the colours of images [n, 3, h, w]."""
    return (matrices[:, :, :, None, None] * colours[:, None]).sum(2)
