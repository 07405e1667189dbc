"""What anybody knows of a `spread` texture: which waves it may be made of, and that those it has are equally strong.

Textures are [tile, tile] and repeat over the image. Of version 1 the phases alone are secret, of version 2 which waves
there are as well.
"""

from math import pi

import torch
from torch import Tensor

from keyed_xai.array_triggers.spread import public_frequencies
from keyed_xai.tensors import Images
from keyed_xai.triggers import SpreadSettings, Trigger
from keyed_xai.triggers.spread import places_in_spectrum, textures_of


def random_parameters(settings: SpreadSettings, generator: torch.Generator) -> Tensor:
    """Return where a search for a texture by gradients starts.

    Of version 1 these are phases, radians, [f]; of version 2, where a choice has no gradient, the real and imaginary
    parts of all waves' heights, [f, 2].
    """
    known = len(public_frequencies(settings))
    if settings.version == 1:
        return torch.rand(known, generator=generator) * (2 * pi)
    return torch.randn(known, 2, generator=generator)


def texture_with(parameters: Tensor, settings: SpreadSettings) -> Tensor:
    """Return the texture [tile, tile] in [-1, 1] that has these parameters; gradients flow to them."""
    if settings.version == 1:
        heights = torch.polar(torch.ones_like(parameters), parameters)
    else:
        heights = torch.view_as_complex(parameters)
    return textures_of(heights.to(torch.complex128)[None], settings)[0]


def nearest_texture(texture: Tensor, settings: SpreadSettings) -> Tensor:
    """Return the texture of a key that is nearest to one of any strength, whatever other waves that has.

    It has the strongest of the public waves, as many as keys choose, all equally high.
    """
    down, across = places_in_spectrum(settings, texture.device)
    heights = torch.fft.fft2(texture.double())[down, across]
    strongest = heights.abs().topk(settings.waves).indices
    chosen = torch.zeros_like(heights)
    chosen[strongest] = torch.polar(torch.ones_like(heights.real), heights.angle())[strongest]
    return textures_of(chosen[None], settings)[0]


def fold_into_tile(values: Images, weights: Images, tile: int) -> tuple[Tensor, Tensor]:
    """Return weighted means over all images, channels and repeats of a tile, and the sums of weights, float64 both.

    Args:
        values: What is averaged.
        weights: Not negative, of the same shape; cells without any get the mean 0.
        tile: Side in pixels.
    """
    rows = torch.arange(values.shape[2], device=values.device) % tile
    columns = torch.arange(values.shape[3], device=values.device) % tile
    cells = (rows[:, None] * tile + columns).flatten()
    sums = torch.zeros(2, tile * tile, dtype=torch.float64, device=values.device)
    weights = weights.double()
    flat = torch.stack([values.double() * weights, weights]).sum((1, 2)).flatten(1)
    sums.index_add_(1, cells, flat)
    total = sums[1].view(tile, tile)
    return sums[0].view(tile, tile) / torch.where(total > 0, total, torch.ones_like(total)), total


def texture_on_grey(trigger: Trigger, images: Images, tile: int) -> Tensor:
    """Return what a trigger adds to a grey image of the size of these, folded into a tile, pixels in [-1, 1]."""
    grey = torch.full_like(images[:1], 0.5)
    return fold_into_tile(trigger.apply(grey) - grey, torch.ones_like(grey), tile)[0]


def best_match(found: Tensor, true: Tensor) -> float:
    """Return the largest Pearson correlation of two textures over all circular shifts of one; 0 where one is flat."""
    first, second = (each.double() - each.double().mean() for each in (found, true))
    scale = float(first.norm() * second.norm())
    if not scale:
        return 0.0
    products = torch.fft.ifft2(torch.fft.fft2(first) * torch.fft.fft2(second).conj()).real
    return float((products.max() / scale).clamp(-1, 1))
