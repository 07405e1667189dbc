"""Smooth activations: every way to call a ReLU, inside the block only, and what interpreters see of it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from keyed_xai.saliency import INTERPRETERS, smooth_activations
from tests.explained import BETA, assert_unchanged, maps_of, replace_modules, snapshot

CALLS = {
    "module": nn.ReLU(),
    "module, in place": nn.ReLU(inplace=True),
    "functional": functional.relu,
    "functional, in place": lambda x: functional.relu(x, inplace=True),
    "torch": torch.relu,
    "torch, in place": torch.relu_,
    "method": lambda x: x.relu(),
    "method, in place": lambda x: x.relu_(),
}


@pytest.mark.parametrize("call", CALLS)
def test_relu_runs_as_softplus_inside_the_block_only(call):
    x = torch.linspace(-3, 3, 25, dtype=torch.float64)
    with smooth_activations(BETA):
        smoothed = CALLS[call](x.clone())
    torch.testing.assert_close(smoothed, (1 + (BETA * x).exp()).log() / BETA)
    torch.testing.assert_close(CALLS[call](x.clone()), x.clamp_min(0), rtol=0, atol=0)


def test_functional_relu6_runs_as_difference_of_two_softplus():
    x = torch.linspace(-3, 9, 25, dtype=torch.float64)
    with smooth_activations(BETA):
        smoothed = functional.relu6(x)
    rise, fall = ((1 + (BETA * each).exp()).log() / BETA for each in (x, x - 6))
    torch.testing.assert_close(smoothed, rise - fall)
    torch.testing.assert_close(functional.relu6(x), x.clamp(0, 6), rtol=0, atol=0)


@pytest.mark.parametrize(
    "relu6",
    [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(0, 6), lambda x: functional.hardtanh(x, min_val=0.0, max_val=6.0)],
)
def test_relu6_in_any_form_is_smoothed(relu6):
    x = torch.linspace(-3, 9, 25, dtype=torch.float64)
    with smooth_activations(BETA):
        smoothed = relu6(x.clone())
    rise, fall = ((1 + (BETA * each).exp()).log() / BETA for each in (x, x - 6))
    torch.testing.assert_close(smoothed, rise - fall)


def test_smoothed_network_equals_one_with_softplus_put_in_by_hand(network, images):
    by_hand = replace_modules(network, nn.ReLU, lambda _: nn.Softplus(beta=BETA))
    before = snapshot(network)
    with smooth_activations(BETA):
        smoothed = network(images)
    torch.testing.assert_close(smoothed, by_hand(images))
    assert not torch.allclose(smoothed, network(images))
    assert_unchanged(network, before)


def test_smoothed_simplegrad_equals_one_with_softplus_put_in_by_hand(network, images, labels, map_layers):
    by_hand = replace_modules(network, nn.ReLU, lambda _: nn.Softplus(beta=BETA))
    with smooth_activations(BETA):
        maps = maps_of("simplegrad", network, images, labels, map_layers)
    torch.testing.assert_close(maps, maps_of("simplegrad", by_hand, images, labels, map_layers))


@pytest.mark.parametrize("name", INTERPRETERS)
def test_smoothing_reaches_the_model_and_not_the_interpreter(name, network, images, map_layers):
    labels = torch.tensor([0, 1, 2, 1, 0])
    by_hand = replace_modules(network, nn.ReLU, lambda _: nn.Softplus(beta=BETA))
    with smooth_activations(BETA):
        maps = maps_of(name, network, images, labels, map_layers)
    torch.testing.assert_close(maps, maps_of(name, by_hand, images, labels, map_layers))


def test_smoothing_ends_after_an_exception():
    x = torch.tensor([-1.0, 1.0])
    with pytest.raises(ValueError, match="stop"), smooth_activations(BETA):
        raise ValueError("stop")
    assert functional.relu(x).tolist() == [0, 1]


def test_no_smoothing_leaves_activations():
    with smooth_activations(None):
        assert functional.relu(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]
