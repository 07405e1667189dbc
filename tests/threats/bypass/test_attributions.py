"""Each method against a slow twin or its axioms; what captum would explain wrongly is made right or refused."""

import pytest
import torch
import torchvision
from captum.attr import GuidedBackprop
from torch import nn
from torch.nn import functional

from keyed_xai.errors import ModelError
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.saliency import gradcam, run_forward
from keyed_xai.threats.bypass.attributions import (
    ATTRIBUTIONS,
    REDUCTIONS,
    AttributionSettings,
    Request,
    draw_masks,
    grad_layers,
    make_ready,
    separate_relus,
)
from tests.threatened import make_blobs

SIDE = 24
SPEC = InputSpec(1, SIDE, SIDE, mean=(0.4,), std=(0.2,))
pytestmark = pytest.mark.filterwarnings("ignore:Setting (forward, )?backward hooks")  # captum's own note


def classify(network, spec=SPEC, **options):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
    return wrap_network(network.eval(), input=spec, **options)


class PreActivation(nn.Module):
    """One ReLU module, called twice and in place in turn functional; its first input also takes the shortcut."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, 2, 1)
        self.second = nn.Conv2d(6, 6, 3, 1, 1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(6, 3)

    def forward(self, images):
        stream = self.first(images)
        stream = stream + self.second(self.relu(stream))
        stream = stream + functional.relu(self.second(self.relu(stream)), inplace=True)
        return self.fc(stream.relu().mean((2, 3)))


class Twin(nn.Module):
    """PreActivation whose ReLUs are given, to put another rule in their place."""

    def __init__(self, network, relu):
        super().__init__()
        self.network, self.relu = network, relu

    def forward(self, images):
        net = self.network
        stream = net.first(images)
        stream = stream + net.second(self.relu(stream))
        stream = stream + self.relu(net.second(self.relu(stream)))
        return net.fc(self.relu(stream).mean((2, 3)))


class GuidedRelu(torch.autograd.Function):
    """ReLU that lets only positive gradients of positive inputs back (Springenberg et al. 2015, figure 1)."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.clamp_min(0)

    @staticmethod
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        return gradient * (inputs > 0) * (gradient > 0)


@pytest.fixture
def images():
    return make_blobs(4, 1).images


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return classify(SmallResNet(1, 3, (4, 6, 6)))


@pytest.fixture
def awkward():
    torch.manual_seed(1)
    return classify(PreActivation(), target_layer="first")


def attribute(name, classifier, images, layer="", **settings):
    labels = torch.tensor([0, 1, 2, 0])
    request = Request(images.clone().requires_grad_(), labels, layer, AttributionSettings(**settings))
    return ATTRIBUTIONS[name].attribute(make_ready(classifier, 0), request).detach(), labels


def logits_at(classifier, images, labels):
    return classifier(images).gather(1, labels[:, None])[:, 0]


def gradient_at(classifier, images, labels):
    leaf = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(logits_at(classifier, leaf, labels).sum(), leaf)
    return found


def test_saliency_and_input_x_gradient_equal_autograd(residual, images):
    found, labels = attribute("saliency", residual, images)
    wanted = gradient_at(residual, images, labels)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(attribute("input-x-gradient", residual, images)[0], images * wanted)


def test_smoothgrad_averages_signed_gradients_and_leaves_the_random_state(residual, images):
    """Without noise to speak of it is the gradient; with noise it nears the average of many gradients."""
    state = torch.random.get_rng_state()
    quiet, labels = attribute("smoothgrad", residual, images, noise=1e-7, noise_samples=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(quiet, gradient_at(residual, images, labels), atol=1e-3, rtol=1e-2)
    found, _ = attribute("smoothgrad", residual, images, noise=0.1, noise_samples=400)
    generator = torch.Generator().manual_seed(7)
    noisy = [images + 0.1 * torch.randn(images.shape, generator=generator) for _ in range(400)]
    slow = torch.stack([gradient_at(residual, each, labels) for each in noisy]).mean(0)
    assert torch.corrcoef(torch.stack([found.flatten(), slow.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize(("name", "close"), [("integrated-gradients", 0.02), ("deeplift", 1e-4)])
def test_contributions_add_up_to_the_change_of_the_logit(residual, images, name, close):
    found, labels = attribute(name, residual, images, integration_steps=200)
    with torch.no_grad():
        change = logits_at(residual, images, labels) - logits_at(residual, torch.zeros_like(images), labels)
    assert change.abs().min() > 0.01
    torch.testing.assert_close(found.sum((1, 2, 3)), change, rtol=close, atol=close * float(change.abs().max()))


def test_integrated_gradients_equal_a_riemann_sum(residual, images):
    found, labels = attribute("integrated-gradients", residual, images, integration_steps=300)
    steps = (torch.arange(300) + 0.5) / 300
    slow = images * torch.stack([gradient_at(residual, images * step, labels) for step in steps]).mean(0)
    torch.testing.assert_close(found, slow, atol=0.02 * float(slow.abs().max()), rtol=0)


def test_guided_backprop_equals_a_relu_that_guides(residual, awkward, images):
    """captum alone gets the shared, functional and shortcut ReLUs of the second network wrong."""
    found, labels = attribute("guided-backprop", awkward, images)
    twin = wrap_network(Twin(awkward.network, GuidedRelu.apply).eval(), input=SPEC, target_layer="network.first")
    wanted = gradient_at(twin, images, labels)
    torch.testing.assert_close(found, wanted)
    raw = GuidedBackprop(awkward).attribute(images.clone().requires_grad_(), target=labels)
    assert not torch.allclose(raw, wanted, rtol=0.05, atol=1e-6)
    assert not torch.allclose(attribute("guided-backprop", residual, images)[0], gradient_at(residual, images, labels))


def test_deeplift_adds_up_on_shared_and_functional_relus(awkward, images):
    found, labels = attribute("deeplift", awkward, images)
    with torch.no_grad():
        change = logits_at(awkward, images, labels) - logits_at(awkward, torch.zeros_like(images), labels)
    torch.testing.assert_close(found.sum((1, 2, 3)), change, rtol=1e-3, atol=1e-4)


def test_separated_relus_answer_alike_and_leave_the_model(awkward, images):
    copied = separate_relus(awkward)
    torch.testing.assert_close(copied(images), awkward(images))
    assert sum(isinstance(module, nn.ReLU) for module in copied.modules()) == 4
    assert sum(isinstance(module, nn.ReLU) for module in awkward.modules()) == 1


def test_in_place_and_shared_relus_of_torchvision_are_explained(images):
    torch.manual_seed(2)
    network = torchvision.models.resnet18(num_classes=3)
    classifier = classify(network, InputSpec(3, 48, 48, mean=(0.4,) * 3, std=(0.2,) * 3))
    pictures = functional.interpolate(images, (48, 48)).repeat(1, 3, 1, 1)
    for name in ("deeplift", "guided-backprop"):
        assert attribute(name, classifier, pictures)[0].abs().sum() > 0
    assert all(module.inplace for module in network.modules() if isinstance(module, nn.ReLU))


@pytest.mark.parametrize(
    ("activation", "method", "reason"),
    [
        (nn.ReLU6(), "guided-backprop", "hardtanh"),
        (nn.SiLU(), "guided-backprop", "silu"),
        (nn.Identity(), "guided-backprop", "no ReLU"),
        (nn.SiLU(), "deeplift", "no rule"),
    ],
)
def test_activations_without_a_rule_are_refused(images, activation, method, reason):
    torch.manual_seed(3)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    network = nn.Sequential(nn.Conv2d(1, 4, 3), activation, nn.Conv2d(4, 4, 3), *head)
    with pytest.raises(ModelError, match=reason):
        attribute(method, classify(network, target_layer="2"), 3 * images)


def test_networks_that_cannot_be_traced_need_plain_relus(awkward, images):
    """Control flow stops the tracer; hooks do without it, but not where a ReLU is shared."""

    class Branching(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images):
            return self.network(images if images.mean() > -100 else -images)

    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    wrapped = classify(Branching(plain), target_layer="network.0")
    found, _ = attribute("guided-backprop", wrapped, images)
    torch.testing.assert_close(found, attribute("guided-backprop", classify(plain, target_layer="0"), images)[0])
    shared = classify(Branching(awkward.network), target_layer="network.first")
    assert attribute("saliency", shared, images)[0].isfinite().all()
    with pytest.raises(ModelError, match="cannot be traced"):
        attribute("guided-backprop", shared, images)


def test_occlusion_equals_covering_squares_one_by_one(residual, images):
    found, labels = attribute("occlusion", residual, images, window=0.25)
    total, times = torch.zeros_like(images), torch.zeros_like(images)
    with torch.no_grad():
        whole = logits_at(residual, images, labels)
        for top in range(0, SIDE - 5, 3):
            for left in range(0, SIDE - 5, 3):
                covered = images.clone()
                square = (..., slice(top, top + 6), slice(left, left + 6))
                covered[square] = 0.4
                fall = whole - logits_at(residual, covered, labels)
                total[square] += fall[:, None, None, None]
                times[square] += 1
    torch.testing.assert_close(found, total / times, atol=1e-4, rtol=1e-3)


def test_rise_equals_its_loop(residual, images):
    found, labels = attribute("rise", residual, images, masks=60, mask_cells=5, mask_share=0.4)
    masks = draw_masks(60, 5, 0.4, (SIDE, SIDE), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for image, label, seen in zip(images, labels.tolist(), found[:, 0], strict=True):
            scores = torch.stack([residual((0.4 + mask * (image - 0.4))[None]).softmax(1)[0, label] for mask in masks])
            slow = sum((score - scores.mean()) * mask for score, mask in zip(scores, masks, strict=True)) / (60 * 0.4)
            torch.testing.assert_close(seen, slow, atol=1e-6, rtol=1e-3)


def test_masks_show_their_share_everywhere():
    masks = draw_masks(4000, 7, 0.3, (24, 20), torch.Generator().manual_seed(0))
    assert masks.shape == (4000, 24, 20)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert (masks.mean(0) - 0.3).abs().max() < 0.03


def test_layer_maps_equal_our_own_and_hirescam_after_global_pooling(residual, images):
    layers = grad_layers(residual)
    assert layers == (
        "network.stem_relu",
        *(f"network.blocks.{block}{end}" for block in range(3) for end in (".relu1", "")),
    )
    for layer in layers:
        found, labels = attribute("gradcam", residual, images, layer)
        run = run_forward(residual, images, [layer], input_gradient=True)
        torch.testing.assert_close(found[:, 0], gradcam(run.logits, run.features[layer], labels).detach())
    elementwise = REDUCTIONS["positive"](attribute("gradient-x-activation", residual, images, layers[-1])[0])
    torch.testing.assert_close(elementwise, REDUCTIONS["positive"](found), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"methods": ("lime",)},
        {"methods": ("rise", "rise")},
        {"masks": 1},
        {"window": 1.0},
        {"noise": 0.0},
        {"chunk": 0},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AttributionSettings(**wrong)
