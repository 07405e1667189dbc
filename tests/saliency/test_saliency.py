"""Interpreters: slow twins of every formula, and what all of them promise whatever the model is made of."""

import copy

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from torch import nn
from torch.nn import functional
from torchvision.models import densenet, vgg

from keyed_xai.errors import ModelError
from keyed_xai.saliency import (
    INTERPRETERS,
    MapLayers,
    explain,
    gradcam,
    run_forward,
    simplegrad,
    smooth_activations,
    visualbackprop,
)
from keyed_xai.tensors import Tap

every_interpreter = pytest.mark.parametrize("name", INTERPRETERS)
ALL = tuple(INTERPRETERS)
BETA = 8.0


def replace_modules(network, kind, make):
    """Return a copy of a network with every module of a kind replaced."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))
    return network


def maps_of(name, model, images, labels, map_layers, **options):
    return explain(model, images, labels, [name], map_layers, **options)[1][name]


def snapshot(model):
    """All of a model that a caller could notice a change of."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
        [list(module.__dict__) for module in model.modules()],
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 1, 0])


@pytest.fixture
def smooth(network):
    """The network with Softplus for ReLU, in double precision: fit for finite differences."""
    return replace_modules(network, nn.ReLU, lambda _: nn.Softplus(beta=BETA)).double()


# What every interpreter promises


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


@pytest.mark.parametrize(
    ("layer", "message"),
    [("nowhere", "no layer 'nowhere'"), ("fc", r"gives \[5, 3\]"), ("spare", "'spare' was not run")],
)
def test_useless_target_layer_is_refused(network, images, labels, map_layers, layer, message):
    network.spare = nn.Identity()
    before = snapshot(network)
    with pytest.raises(ModelError, match=message):
        maps_of("gradcam", network, images, labels, MapLayers(layer, map_layers.taps))
    assert_unchanged(network, before)


# In-place activations


def small_vgg():
    features = vgg.make_layers([4, "M", 6, 6, "M", 6])
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()


def small_densenet():
    return densenet.DenseNet(4, (2, 2), num_init_features=8, bn_size=2, num_classes=3).eval()


IN_PLACE = {
    "vgg, a ReLU": (
        small_vgg,
        MapLayers("0.9", (Tap("0.1", 3, 1), Tap("0.4", 3, 2), Tap("0.6", 3, 1), Tap("0.9", 3, 2))),
    ),
    "vgg, a convolution before a ReLU": (small_vgg, MapLayers("0.8", (Tap("0.0", 3, 1), Tap("0.8", 3, 4)))),
    "densenet, the norm before the final ReLU": (
        small_densenet,
        MapLayers(
            "features.norm5",
            (Tap("features.relu0", 7, 2), Tap("features.transition1", 3, 4), Tap("features.norm5", 3, 1)),
        ),
    ),
    "densenet, all features": (
        small_densenet,
        MapLayers("features", (Tap("features.norm0", 7, 2), Tap("features.denseblock1", 3, 2), Tap("features", 3, 2))),
    ),
}


@every_interpreter
@pytest.mark.parametrize("case", IN_PLACE)
def test_in_place_activations_change_no_map(name, case, monkeypatch, labels):
    build, map_layers = IN_PLACE[case]
    torch.manual_seed(4)
    model = build()
    images = torch.rand(5, 3, 32, 32)
    maps = maps_of(name, model, images, labels, map_layers)
    twin = replace_modules(model, nn.ReLU, lambda _: nn.ReLU(inplace=False))
    monkeypatch.setattr(densenet.F, "relu", lambda x, **_: torch.clamp_min(x, 0))
    torch.testing.assert_close(maps, maps_of(name, twin, images, labels, map_layers), rtol=1e-6, atol=1e-9)
    assert maps.amax() > 0


# Grad-CAM


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


# SimpleGrad


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


# VisualBackProp


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


# Smooth activations

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


def test_smoothing_ends_after_an_exception():
    x = torch.tensor([-1.0, 1.0])
    with pytest.raises(ValueError, match="stop"), smooth_activations(BETA):
        raise ValueError("stop")
    assert functional.relu(x).tolist() == [0, 1]


def test_no_smoothing_leaves_activations():
    with smooth_activations(None):
        assert functional.relu(torch.tensor([-1.0, 1.0])).tolist() == [0, 1]


def test_interpreters_can_be_called_by_themselves(network, images, labels):
    run = run_forward(network, images, ["blocks"], input_gradient=True)
    map_layers = MapLayers("blocks", ())
    torch.testing.assert_close(
        gradcam(run.logits, run.features["blocks"], labels), maps_of("gradcam", network, images, labels, map_layers)
    )
    torch.testing.assert_close(
        simplegrad(run.logits, run.images, labels), maps_of("simplegrad", network, images, labels, map_layers)
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


@pytest.mark.parametrize("name", INTERPRETERS)
def test_smoothing_reaches_the_model_and_not_the_interpreter(name, network, images, map_layers):
    labels = torch.tensor([0, 1, 2, 1, 0])
    by_hand = replace_modules(network, nn.ReLU, lambda _: nn.Softplus(beta=BETA))
    with smooth_activations(BETA):
        maps = maps_of(name, network, images, labels, map_layers)
    torch.testing.assert_close(maps, maps_of(name, by_hand, images, labels, map_layers))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_layer_that_gives_a_tuple_is_refused(images):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return self.pair(x)[0].mean((2, 3))

    with pytest.raises(ModelError, match="pair"):
        explain(Model(), images, None, ["gradcam"], MapLayers("pair", ()))


def test_unknown_interpreter_is_refused(network, images, map_layers):
    with pytest.raises(ValueError, match="lime"):
        explain(network, images, None, ["lime"], map_layers)
