"""VisualBackProp."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from keyed_xai.tensors import SaliencyMaps, Tap


def visualbackprop(features: Sequence[Tensor], taps: Sequence[Tap], size: tuple[int, int]) -> SaliencyMaps:
    """Return VisualBackProp maps, non-negative, largest value 1, at the image's resolution.

    Source: Bojarski et al., ICRA 2018, section III: with the feature maps F[1] to F[L],

        mean[l]      = mean over channels of max(F[l], 0)
        relevance[L] = mean[L]
        relevance[l] = mean[l] * up(relevance[l + 1])
        map          = up(relevance[1])

    `up` is a transposed convolution with an all-ones kernel of the layer's own kernel and stride. Every intermediate
    map is divided by its maximum, which changes the result by a factor only and keeps deep networks in range.

    Args:
        features: Outputs of the taps, first to last, [n, channels, h, w] each; negative values count as 0.
        taps: The same order; each says how its map is scaled up to the one before, or to the image.
        size: Height and width of the image.

    Examples:
        Two cells are scaled up to the four of the layer before, and multiplied with them:

        >>> first = torch.tensor([[[[0.0, 1.0, 2.0, 3.0]]]])
        >>> second = torch.tensor([[[[1.0, 2.0]], [[-5.0, 6.0]]]])  # with means of .5 and 4
        >>> visualbackprop([first, second], [Tap("first", 1, 1), Tap("second", 2, 2)], (2, 4))
        tensor([[[0.0000, 0.0417, 0.6667, 1.0000],
                 [0.0000, 0.0417, 0.6667, 1.0000]]])
    """
    means = [feature.clamp_min(0).mean(1, keepdim=True) for feature in features]  # not relu: see gradcam
    return project_back(means, taps, size)


def project_back(means: Sequence[Tensor], taps: Sequence[Tap], size: tuple[int, int]) -> SaliencyMaps:
    """Return VisualBackProp maps given the taps' channel means, [n, 1, h, w] each.

    The formula and the other arguments are those of `visualbackprop`.

    Examples:
        >>> project_back([torch.tensor([[[[1.0, 4.0]]]])], [Tap("only", 2, 2)], (1, 4))
        tensor([[[0.2500, 0.2500, 1.0000, 1.0000]]])
    """
    sizes = [size, *(tuple(mean.shape[2:]) for mean in means[:-1])]
    relevance = _scale_to_one(means[-1])
    for position in range(len(taps) - 1, -1, -1):
        relevance = _scale_to_one(_scale_up(relevance, taps[position], sizes[position]))
        if position:
            relevance = _scale_to_one(relevance * means[position - 1])
    return relevance[:, 0]


def find_checkerboard(sizes: Sequence[tuple[int, int]], taps: Sequence[Tap], size: tuple[int, int]) -> SaliencyMaps:
    """Return by what factors, [1, h, w], overlapping kernels make cells of any map brighter than their neighbours.

    They are the map of features that are the same everywhere, over its mean in a period of the strides; 1 where no
    kernel reaches. A picture is drawn of a map divided by them.

    Args:
        sizes: Rows and columns of the taps' feature maps.
        taps: Taps as for `visualbackprop`.
        size: Height and width of the image.

    Examples:
        Kernels of 3 pixels that lie 2 apart overlap at every other pixel:

        >>> find_checkerboard([(1, 4)], [Tap("only", 3, 2)], (2, 8))[0, :, :4]
        tensor([[0.6667, 1.3333, 0.6667, 1.3333],
                [0.6667, 1.3333, 0.6667, 1.3333]])
    """
    even = project_back([torch.ones(1, 1, *each) for each in sizes], taps, size)[None]
    period = min(prod(tap.stride for tap in taps), *size)
    means = functional.avg_pool2d(even, period, ceil_mode=True)
    means = functional.interpolate(means, size=size, mode="bilinear")
    return torch.where(even > 0, even / means, torch.ones_like(even))[0]


def _scale_up(maps: Tensor, tap: Tap, size: tuple[int, ...]) -> Tensor:
    """Return the transposed convolution with an all-ones kernel, cropped or edge-padded about its centre to `size`."""
    ones = torch.ones(1, 1, tap.kernel, tap.kernel, device=maps.device, dtype=maps.dtype)
    border = (tap.kernel - 1) // 2
    excess = [(maps.shape[2 + axis] - 1) * tap.stride + tap.kernel - size[axis] for axis in (0, 1)]
    for axis in (0, 1):  # cells that would be cropped off are not scaled up: a card may ask for any stride
        needed = (border + size[axis]) // tap.stride + 2
        maps = maps.narrow(2 + axis, 0, needed) if needed < maps.shape[2 + axis] else maps
    full = functional.conv_transpose2d(maps, ones, stride=tap.stride)
    top, left = (min(border, e) if e > 0 else 0 for e in excess)
    full = full[:, :, top : top + size[0], left : left + size[1]]
    missing = (0, size[1] - full.shape[3], 0, size[0] - full.shape[2])
    return functional.pad(full, missing, mode="replicate") if any(missing) else full


def _scale_to_one(maps: Tensor) -> Tensor:
    largest = maps.amax((1, 2, 3), keepdim=True)
    return maps / torch.where(largest > 0, largest, torch.ones_like(largest))
