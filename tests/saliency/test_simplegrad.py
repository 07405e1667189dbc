"""SimpleGrad against the gradient of the cross-entropy, and captum."""

import pytest
import torch
from captum.attr import Saliency
from torch import nn
from torch.nn import functional

from keyed_xai.saliency import simplegrad
from tests.explained import maps_of


def margin(model, images, labels):
    """Logsumexp of the other logits less the labelled one, image by image."""
    rows = []
    for row, label in zip(model(images), labels.tolist(), strict=True):
        others = torch.stack([logit for number, logit in enumerate(row) if number != label])
        rows.append(others.exp().sum().log() - row[label])
    return torch.stack(rows)


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_simplegrad_is_the_gradient_of_the_cross_entropy_up_to_a_factor(network, images, labels, map_layers, sharpness):
    network, images = network.double(), images.double()
    with torch.no_grad():
        network.fc.weight *= sharpness
    maps = maps_of("simplegrad", network, images, labels, map_layers)
    leaf = images.clone().requires_grad_()
    logits = network(leaf)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), leaf)
    uncertainty = 1 - logits.softmax(1).gather(1, labels[:, None])[:, :, None].detach()
    assert uncertainty.amax() > 0.5
    torch.testing.assert_close(maps * uncertainty, gradient.abs().sum(1), rtol=1e-6, atol=1e-12)


def test_simplegrad_does_not_underflow_where_the_model_is_sure(network, images, map_layers):
    wanted = maps_of("simplegrad", network, images, None, map_layers)
    with torch.no_grad():
        network.fc.weight *= 1e4
        network.fc.bias *= 1e4
    sure = maps_of("simplegrad", network, images, None, map_layers)
    leaf = images.clone().requires_grad_()
    logits = network(leaf)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, logits.argmax(1), reduction="sum"), leaf)
    assert gradient.abs().amax() == 0
    assert torch.isfinite(sure).all()
    assert (sure.amax((1, 2)) > wanted.amax((1, 2))).all()


def test_simplegrad_agrees_with_captum(network, labels, map_layers):
    torch.manual_seed(3)
    network.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    images = torch.rand(5, 3, 16, 16, requires_grad=True)
    theirs = Saliency(lambda x: margin(network, x, labels)).attribute(images, abs=True).sum(1)
    torch.testing.assert_close(maps_of("simplegrad", network, images, labels, map_layers), theirs.detach())


def test_simplegrad_of_a_single_logit_is_its_own_gradient(images):
    leaf = images.clone().requires_grad_()
    weight = torch.randn(16 * 16, generator=torch.Generator().manual_seed(0))
    logits = leaf.flatten(1) @ weight[:, None]
    maps = simplegrad(logits, leaf, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(maps, weight.abs().view(1, 16, 16).expand(5, 16, 16))
