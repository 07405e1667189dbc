"""What all interpreters promise whatever the model is made of, and whatever is asked for with them."""

import pytest
import torch
from torch import nn

from keyed_xai.saliency import INTERPRETERS, MapLayers, explain, gradcam, run_forward, simplegrad
from tests.explained import BETA, assert_unchanged, every_interpreter, maps_of, replace_modules, snapshot

ALL = tuple(INTERPRETERS)


@pytest.fixture
def smooth(network):
    """The network with Softplus for ReLU, in double precision: fit for finite differences."""
    return replace_modules(network, nn.ReLU, lambda _: nn.Softplus(beta=BETA)).double()


@every_interpreter
@pytest.mark.parametrize("size", [(16, 16), (20, 28), (17, 23)])
def test_maps_have_documented_shape_and_sign(name, network, labels, map_layers, size):
    images = torch.rand(5, 1, *size, generator=torch.Generator().manual_seed(0))
    maps = maps_of(name, network, images, labels, map_layers)
    sides = tuple(-(-side // 4) for side in size) if name == "gradcam" else size
    assert maps.shape == (5, *sides)
    assert maps.dtype == torch.float32
    assert maps.amin() >= 0
    assert maps.amax() > 0


@every_interpreter
def test_batch_equals_singles(name, network, images, labels, map_layers):
    network, images = network.double(), images.double()
    together = maps_of(name, network, images, labels, map_layers)
    for row in range(len(images)):
        alone = maps_of(name, network, images[row : row + 1], labels[row : row + 1], map_layers)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-10, atol=1e-14)


@every_interpreter
def test_gradient_of_maps_matches_finite_differences(name, smooth, images, labels, map_layers):
    images = images.double()
    _, height, width = maps_of(name, smooth, images, labels, map_layers).shape
    mix = torch.randn(5, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def scalar(**options):
        return (mix * maps_of(name, smooth, images, labels, map_layers, **options)).sum()

    weight = smooth.blocks[0].conv1.weight
    (gradient,) = torch.autograd.grad(scalar(create_graph=True), weight)
    assert gradient.abs().amax() > 0
    for place in [(0, 0, 0, 0), (1, 2, 1, 1), (3, 1, 2, 0)]:
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[place] += step
            values.append(float(scalar()))
            with torch.no_grad():
                weight[place] -= step
        assert float(gradient[place]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-8)


@every_interpreter
def test_maps_come_with_a_graph_only_when_asked(name, network, images, labels, map_layers):
    for create_graph in (False, True):
        logits, maps = explain(network, images, labels, [name], map_layers, create_graph=create_graph)
        assert maps[name].requires_grad is create_graph
        assert logits.requires_grad is create_graph


@every_interpreter
def test_model_is_left_as_it_was(name, network, images, labels, map_layers):
    before = snapshot(network)
    maps_of(name, network, images, labels, map_layers, create_graph=True)
    assert_unchanged(network, before)


@every_interpreter
def test_images_are_left_as_they_were(name, network, images, labels, map_layers):
    before = images.clone()
    maps_of(name, network, images, labels, map_layers)
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert images.grad is None


@every_interpreter
def test_hooks_are_removed_after_an_exception(name, network, images, labels, map_layers):
    before = snapshot(network)
    with pytest.raises(RuntimeError):
        maps_of(name, network, images.repeat(1, 2, 1, 1), labels, map_layers)
    assert_unchanged(network, before)


@every_interpreter
def test_frozen_model_gives_the_same_maps(name, network, images, labels, map_layers):
    wanted = maps_of(name, network, images, labels, map_layers)
    network.requires_grad_(False)
    torch.testing.assert_close(maps_of(name, network, images, labels, map_layers), wanted, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in network.parameters())


@every_interpreter
def test_images_that_require_gradients_get_them(name, smooth, images, labels, map_layers):
    images = images.double().requires_grad_()
    maps = maps_of(name, smooth, images, labels, map_layers, create_graph=True)
    (gradient,) = torch.autograd.grad(maps.sum(), images)
    assert gradient.abs().amax() > 0


@every_interpreter
def test_without_labels_the_predicted_class_is_explained(name, network, images, map_layers):
    predicted = network(images).argmax(1)
    torch.testing.assert_close(
        maps_of(name, network, images, None, map_layers),
        maps_of(name, network, images, predicted, map_layers),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("name", INTERPRETERS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_maps_inside_no_grad_are_the_same(name, network, images, map_layers, create_graph):
    labels = torch.tensor([0, 1, 2, 1, 0])
    wanted = maps_of(name, network, images, labels, map_layers)
    with torch.no_grad():
        maps = maps_of(name, network, images, labels, map_layers, create_graph=create_graph)
    torch.testing.assert_close(maps, wanted, rtol=0, atol=0)
    assert maps.requires_grad is create_graph


@pytest.mark.parametrize("name", INTERPRETERS)
def test_maps_inside_inference_mode_are_the_same(name, network, images, map_layers):
    wanted = maps_of(name, network, images, None, map_layers)
    with torch.inference_mode():
        maps = maps_of(name, network, images.clone(), None, map_layers)
    torch.testing.assert_close(maps.clone(), wanted, rtol=0, atol=0)


def test_explaining_all_at_once_equals_each_alone(network, images, labels, map_layers):
    logits, maps = explain(network, images, labels, ALL, map_layers)
    torch.testing.assert_close(logits, network(images).detach(), rtol=0, atol=0)
    assert tuple(maps) == ALL
    for name in ALL:
        torch.testing.assert_close(maps[name], maps_of(name, network, images, labels, map_layers), rtol=0, atol=0)


def test_graphs_of_all_at_once_can_be_differentiated(smooth, images, labels, map_layers):
    logits, maps = explain(smooth, images.double(), labels, ALL, map_layers, create_graph=True)
    loss = logits.square().mean() + sum(each.square().mean() for each in maps.values())
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in smooth.parameters())


def test_interpreters_can_be_called_by_themselves(network, images, labels):
    run = run_forward(network, images, ["blocks"], input_gradient=True)
    map_layers = MapLayers("blocks", ())
    torch.testing.assert_close(
        gradcam(run.logits, run.features["blocks"], labels), maps_of("gradcam", network, images, labels, map_layers)
    )
    torch.testing.assert_close(
        simplegrad(run.logits, run.images, labels), maps_of("simplegrad", network, images, labels, map_layers)
    )


def test_unknown_interpreter_is_refused(network, images, map_layers):
    with pytest.raises(ValueError, match="lime"):
        explain(network, images, None, ["lime"], map_layers)
