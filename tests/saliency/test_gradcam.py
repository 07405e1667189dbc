"""Grad-CAM against a slow twin, class activation maps and captum."""

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from keyed_xai.saliency import MapLayers
from tests.explained import maps_of


@pytest.fixture
def two_part_network():
    """Layers up to the target, and a smooth tail, in double precision."""
    torch.manual_seed(1)
    head = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Conv2d(3, 4, 3))
    tail = nn.Sequential(nn.Softplus(), nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 3))
    return nn.Sequential(head, tail).double().eval()


def slow_gradcam(tail, features, label):
    """Equations 1 and 2 of Grad-CAM for one image, gradients by finite differences."""
    channels, height, width = features.shape
    weights = np.zeros(channels)
    for k in range(channels):
        for i in range(height):
            for j in range(width):
                step = torch.zeros_like(features)
                step[k, i, j] = 1e-5
                with torch.no_grad():
                    up, down = tail((features + step)[None]), tail((features - step)[None])
                weights[k] += float(up[0, label] - down[0, label]) / 2e-5 / (height * width)
    return np.maximum(0, np.einsum("k,khw->hw", weights, features.numpy()))


def test_gradcam_matches_slow_twin(two_part_network, labels):
    images = torch.randn(5, 1, 15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = maps_of("gradcam", two_part_network, images, labels, MapLayers("0", ()))
    features = two_part_network[0](images).detach()
    assert maps.amax() > 0
    for row, label in enumerate(labels.tolist()):
        np.testing.assert_allclose(maps[row], slow_gradcam(two_part_network[1], features[row], label), atol=1e-8)


def test_gradcam_of_pooled_linear_head_is_its_class_activation_map(network, images, labels, map_layers):
    """With average pooling and a linear layer the weights are the layer's own over the number of cells."""
    features = network.blocks(network.stem_relu(network.stem_bn(network.stem(images)))).detach()
    cells = features.shape[2] * features.shape[3]
    wanted = torch.einsum("nk,nkhw->nhw", network.fc.weight.detach()[labels] / cells, features).clamp_min(0)
    torch.testing.assert_close(maps_of("gradcam", network, images, labels, map_layers), wanted)


def test_gradcam_agrees_with_captum(network, images, labels, map_layers):
    theirs = LayerGradCam(network, network.blocks).attribute(images, target=labels, relu_attributions=True)
    torch.testing.assert_close(maps_of("gradcam", network, images, labels, map_layers), theirs[:, 0].detach())


def test_gradcam_follows_the_label(network, images, map_layers):
    maps = [maps_of("gradcam", network, images, torch.full((5,), label), map_layers) for label in range(3)]
    assert not torch.allclose(maps[0], maps[1])
    assert not torch.allclose(maps[1], maps[2])
