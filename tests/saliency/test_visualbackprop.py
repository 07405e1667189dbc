"""VisualBackProp against a slow twin, and what it keeps to in deep and dead networks."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from keyed_xai.saliency import run_forward, visualbackprop
from keyed_xai.tensors import Tap
from tests.explained import maps_of


def slow_scale_up(image, kernel, stride, size):
    """Transposed convolution with all ones, cropped by the padding of the convolution, edges repeated if too small."""
    height, width = image.shape
    full = np.zeros(((height - 1) * stride + kernel, (width - 1) * stride + kernel))
    for i in range(height):
        for j in range(width):
            for di in range(kernel):
                for dj in range(kernel):
                    full[i * stride + di, j * stride + dj] += image[i, j]
    top, left = (min((kernel - 1) // 2, max(0, full.shape[axis] - size[axis])) for axis in (0, 1))
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            out[i, j] = full[min(i + top, full.shape[0] - 1), min(j + left, full.shape[1] - 1)]
    return out


def slow_visualbackprop(features, taps, size):
    """One image, up to scale: from the last mean to the first, scale up, multiply; then up to the image."""
    means = [np.maximum(0, feature).mean(0) for feature in features]
    relevance = means[-1]
    for position in range(len(taps) - 1, 0, -1):
        _, kernel, stride = taps[position]
        relevance = slow_scale_up(relevance, kernel, stride, means[position - 1].shape) * means[position - 1]
    relevance = slow_scale_up(relevance, taps[0].kernel, taps[0].stride, size)
    return relevance / relevance.max()


CHAINS = {
    "one tap": ([(3, 2, (7, 8))], (14, 16)),
    "resnet stem": ([(7, 2, (8, 8)), (3, 2, (4, 4)), (3, 1, (4, 4)), (3, 2, (2, 2))], (16, 16)),
    "odd sides": ([(3, 2, (9, 7)), (3, 2, (5, 4)), (3, 2, (3, 2))], (17, 13)),
    "unpadded": ([(5, 1, (12, 9)), (3, 2, (5, 4))], (16, 13)),
    "pooling": ([(3, 1, (8, 8)), (2, 2, (4, 4)), (2, 2, (2, 2))], (8, 8)),
    "too small": ([(3, 1, (9, 9)), (2, 2, (4, 4))], (9, 9)),
    "global": ([(3, 2, (4, 4)), (4, 4, (1, 1))], (8, 8)),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_visualbackprop_matches_slow_twin(chain):
    steps, size = CHAINS[chain]
    source = torch.Generator().manual_seed(0)
    taps = [Tap(str(number), kernel, stride) for number, (kernel, stride, _) in enumerate(steps)]
    features = [0.5 + torch.randn(3, 4, *sides, dtype=torch.float64, generator=source) for _, _, sides in steps]
    maps = visualbackprop(features, taps, size)
    assert maps.shape == (3, *size)
    for row in range(3):
        wanted = slow_visualbackprop([feature[row].numpy() for feature in features], taps, size)
        np.testing.assert_allclose(maps[row], wanted, atol=1e-12)


def test_visualbackprop_scales_up_no_more_than_is_kept(monkeypatch):
    """A card may ask for a stride of 64 where the maps before are as large: 64 x 64 times the memory."""
    features = [torch.rand(1, 2, 9, 7), torch.rand(1, 2, 8, 6)]
    taps = (Tap("a", 3, 1), Tap("b", 3, 4))
    wanted = slow_visualbackprop([feature[0].numpy() for feature in features], taps, (9, 7))
    sizes = []
    convolve = functional.conv_transpose2d

    def recorded(maps, *arguments, **options):
        sizes.append(tuple(maps.shape[2:]))
        return convolve(maps, *arguments, **options)

    monkeypatch.setattr(functional, "conv_transpose2d", recorded)
    np.testing.assert_allclose(visualbackprop(features, taps, (9, 7))[0], wanted, atol=1e-6)
    assert sizes[0] == (4, 4)


def test_visualbackprop_of_a_network_matches_slow_twin(network, images, labels, map_layers):
    features = run_forward(network, images, [tap.layer for tap in map_layers.taps], input_gradient=False).features
    maps = maps_of("vbp", network, images, labels, map_layers)
    for row in range(len(images)):
        chain = [features[tap.layer][row].detach().double().numpy() for tap in map_layers.taps]
        np.testing.assert_allclose(maps[row], slow_visualbackprop(chain, map_layers.taps, (16, 16)), atol=1e-5)


def test_visualbackprop_stays_in_range_in_deep_networks():
    taps = [Tap(str(number), 3, 1) for number in range(60)]
    for scale in (1e-4, 1e4):
        maps = visualbackprop([scale * torch.rand(2, 4, 5, 5) for _ in taps], taps, (5, 5))
        torch.testing.assert_close(maps.amax((1, 2)), torch.ones(2))


def test_visualbackprop_of_dead_features_is_zero_with_finite_gradients():
    features = [torch.zeros(2, 4, 8, 8, requires_grad=True), torch.zeros(2, 4, 4, 4, requires_grad=True)]
    maps = visualbackprop(features, [Tap("a", 3, 1), Tap("b", 3, 2)], (8, 8))
    assert maps.abs().amax() == 0
    for gradient in torch.autograd.grad(maps.sum(), features):
        assert torch.isfinite(gradient).all()


def test_visualbackprop_does_not_depend_on_the_label(network, images, labels, map_layers):
    first, second = (maps_of("vbp", network, images, each, map_layers) for each in (labels, (labels + 1) % 3))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
