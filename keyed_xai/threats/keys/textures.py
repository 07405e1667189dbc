"""What anybody knows of a `spread` texture: which waves it is made of, all equally strong. Only the phases are secret.

Textures are [tile, tile] and repeat over the image; phases are radians, one for each wave, in the order of
`ring_frequencies`.
"""

import torch
from torch import Tensor

from keyed_xai.tensors import Images
from keyed_xai.triggers import Trigger
from keyed_xai.triggers.spread import ring_frequencies, textures_of


def texture_of(phases: Tensor, tile: int) -> Tensor:
    """Return the texture [tile, tile] in [-1, 1] with these phases, as a key with them has it; gradients flow."""
    return textures_of(phases.double()[None], tile)[0]


def phases_of(texture: Tensor) -> Tensor:
    """Return the phases of the family's waves in a texture of any strength; whatever other waves it has is left out."""
    down, across = _frequencies(texture.shape[0], texture.device)
    waves: Tensor = torch.fft.fft2(texture)[down, across]
    return waves.angle().float()


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


def _frequencies(tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the family's waves in a spectrum [tile, tile]."""
    frequencies = torch.tensor(ring_frequencies(tile), device=device) % tile
    return frequencies[:, 0], frequencies[:, 1]
