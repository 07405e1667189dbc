"""What happens to a keyed image on its way to the model: 8-bit PNG, JPEG, a resize and back. Data, not graph."""

import io
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from keyed_xai.tensors import Images

JPEG_QUALITY = 75
_RESIZE_FACTOR = 256 / 224


def through_png(images: Images) -> Images:
    """Return images rounded to 8 bits, as any lossless file stores them."""
    return (images * 255).round() / 255


def through_jpeg(images: Images, quality: int = JPEG_QUALITY) -> Images:
    """Return images after a JPEG file of this quality; one or three channels, others are coded channel by channel."""
    if images.shape[1] not in (1, 3):
        return torch.cat([through_jpeg(channel, quality) for channel in torch.split(images, 1, dim=1)], dim=1)
    stored = (images.detach().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    decoded = np.stack([_code_as_jpeg(image, quality) for image in stored])
    return torch.from_numpy(decoded).to(images.device).permute(0, 3, 1, 2).to(images) / 255


def through_resize(images: Images, factor: float = _RESIZE_FACTOR) -> Images:
    """Return images scaled up by `factor` and back, bilinear and antialiased, rounded to 8 bits after each."""
    height, width = images.shape[2:]
    larger = _resize(through_png(images), (round(height * factor), round(width * factor)))
    return through_png(_resize(through_png(larger), (height, width)))


CHANNELS: dict[str, Callable[[Images], Images]] = {
    "png": through_png,
    "jpeg75": through_jpeg,
    "resize": through_resize,
}
"""Channel name to function, as reports name them."""


def deliver(images: Images, codec_share: float, generator: torch.Generator) -> Images:
    """Return images as a model would receive them: 8 bits, a share through JPEG 75, as many through a resize."""
    lot = torch.rand(len(images), generator=generator).to(images.device)
    jpeg, resized = lot < codec_share, lot > 1 - codec_share
    delivered = through_png(images)
    if jpeg.any():
        delivered[jpeg] = through_jpeg(images[jpeg])
    if resized.any():
        delivered[resized] = through_resize(images[resized])
    return delivered


def _code_as_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Return an image [height, width, 1 or 3] as a JPEG file gives it back."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(image.shape)


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)
