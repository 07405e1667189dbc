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
from functools import partial

import torch
from torch import Tensor

from keyed_xai.array_triggers.nashville import (
    GREY,
    RANGES,
    check_channels,
    make_tables,
    saturation_matrices,
    sepia_matrices,
)
from keyed_xai.batches import batches
from keyed_xai.keys import ByteStream
from keyed_xai.tensors import Images
from keyed_xai.triggers.parameters import derive_parameters, draw_parameters, perturb_parameters, public_parameters

KEY_BITS = 5
_BLOCK = 2**18  # pixels at once on a CPU: the fastest of 2^16 to 2^18 with one thread


@dataclass(frozen=True)
class NashvilleTrigger:
    """One filter for all images, or one for each image of a batch.

    Attributes:
        parameters: float64 [1 or n, 12], in the order and units of RANGES. Secret when derived from an owner
            key.
        strength: Share of the filtered image in the result; 1 is the filter itself.
    """

    parameters: Tensor = field(default_factory=partial(public_parameters, RANGES), repr=False)
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

    def perturbed(self, generator: torch.Generator) -> "NashvilleTrigger":
        """Return a near key: one parameter moved inwards by an eighth to a quarter of its range."""
        return replace(self, parameters=perturb_parameters(RANGES, self.parameters, generator))

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
    version = 1
    key_bits = KEY_BITS

    def derive(self, stream: ByteStream) -> NashvilleTrigger:
        """Return the trigger of the key whose stream this is."""
        return NashvilleTrigger(derive_parameters(RANGES, stream))

    def draw(self, count: int, generator: torch.Generator) -> NashvilleTrigger:
        """Return the triggers of `count` fresh random keys, one for each image of a batch of that size."""
        return NashvilleTrigger(draw_parameters(RANGES, count, generator))


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
    for part in batches(len(images), step):
        tables.select(part).look_up(images[part].float(), out=result[part])
    return result.to(images.dtype)


@dataclass(frozen=True, kw_only=True)
class _Tables:
    """`array_triggers.nashville.Tables` on a device, for one filter or one for each image."""

    tones: Tensor
    sepia: Tensor
    curve: Tensor
    saturation: Tensor

    @classmethod
    def of(cls, parameters: Tensor, device: torch.device) -> "_Tables":
        """Return the tables of these parameters."""
        tables = vars(make_tables(parameters.cpu().numpy()))
        return cls(**{name: torch.from_numpy(table).to(device) for name, table in tables.items()})

    def select(self, part: slice) -> "_Tables":
        """Return the tables of some of the images."""
        if len(self.tones) == 1:
            return self
        return _Tables(
            tones=self.tones[part], sepia=self.sepia[part], curve=self.curve[part], saturation=self.saturation[part]
        )

    def look_up(self, images: Images, *, out: Images) -> None:
        """Write the filtered images to `out`, float32."""
        levels = images.mul(255).add_(0.5)  # in two steps: add's alpha rounds once on some devices, not on all
        toned = _take(self.tones, levels.expand(-1, 3, -1, -1))
        mixed = _take(self.curve[:, None], _mix(self.sepia, toned))
        levels = _mix(self.saturation, mixed)
        if images.shape[1] == 1:
            red, green, blue = levels.unbind(1)
            grey = (GREY[0] * red + GREY[1] * green + GREY[2] * blue + 32768) / 65536
            levels = grey.floor()[:, None]
        torch.mul(levels, 1 / 255, out=out)


def _check(images: Images, parameters: Tensor) -> None:
    check_channels(images.shape[1])
    if len(parameters) not in (1, len(images)):
        raise ValueError(f"Expected 1 or {len(images)} filters, got {len(parameters)}.")


def _take(tables: Tensor, levels: Tensor) -> Tensor:
    """Return the entries of tables [1 or n, 1 or 3, 256] at levels [n, 3, h, w], rounded down."""
    sets, channels = tables.shape[:2]
    start = 256 * torch.arange(sets * channels, device=levels.device, dtype=torch.int32).view(sets, channels, 1, 1)
    places = levels.int() + start
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


def _filter_smoothly(images: Images, parameters: Tensor) -> Images:
    """Return the images filtered without rounding; sepia, contrast and brightness are one matrix and one offset."""
    dtype = torch.promote_types(images.dtype, torch.float32)
    columns = parameters.to(images.device, dtype)[..., None, None]
    dark, light = columns[:, 0:3] / 255, columns[:, 4:7] / 255
    toned = images.to(dtype).expand(-1, 3, -1, -1)
    toned = toned.lerp(toned.minimum(dark), columns[:, 3:4])
    toned = toned.lerp(toned.maximum(light), columns[:, 7:8])
    contrast, brightness = columns[:, 9:10], columns[:, 10:11]
    numbers = parameters.cpu().numpy()
    sepia = torch.from_numpy(sepia_matrices(numbers[:, 8])).to(toned)
    saturation = torch.from_numpy(saturation_matrices(numbers[:, 11])).to(toned)
    mixed = (_product(sepia * (contrast * brightness)[..., 0], toned) + brightness * (1 - contrast) / 2).clamp(0, 1)
    result = _product(saturation, mixed).clamp(0, 1)
    if images.shape[1] == 1:
        weights = result.new_tensor(GREY).view(1, 3, 1, 1) / 65536
        result = (result * weights).sum(1, keepdim=True)
    return result.to(images.dtype)


def _product(matrices: Tensor, colours: Tensor) -> Tensor:
    """Return matrices [1 or n, 3, 3] times the colours of images [n, 3, h, w]."""
    return (matrices[:, :, :, None, None] * colours[:, None]).sum(2)
