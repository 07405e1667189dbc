"""Strided 1x1 convolutions: their safe twins are exact, and no way of training builds one that could corrupt memory."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from keyed_xai import wrap_network
from keyed_xai.models import InputSpec
from keyed_xai.models.layout import SafeConvolutions, set_layout
from keyed_xai.protection.task import make_keyed_task
from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.detection.neural_cleanse import CleanseSettings, cleanse
from keyed_xai.threats.removal.fine_tuning import FineTuningSettings, fine_tune
from keyed_xai.training import Hardening, train
from keyed_xai.training.fitting import FittingSettings, fit_classifier
from tests.threatened import FAMILY, GRID, make_blobs
from tests.trained import SHORT

BACKWARD = torch.ops.aten.convolution_backward.default


class Watch(TorchDispatchMode):
    """Counts weight gradients of convolutions, and those that oneDNN writes out of bounds with (its issue 6035)."""

    def __init__(self):
        super().__init__()
        self.seen = self.dangerous = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is BACKWARD and args[10][1]:
            self.seen += 1
            self.dangerous += max(args[2].shape[2:]) == 1 and max(args[4]) > 1
        return func(*args, **(kwargs or {}))


class Branches(nn.Module):
    """A stem of a 3x3 and a strided 1x1 convolution side by side, as RepVGG's, and a functional one after it."""

    def __init__(self, channels=1):
        super().__init__()
        self.wide = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(channels, 4, 1, stride=2)
        self.relu = nn.ReLU()
        self.shortcut = nn.Parameter(torch.randn(6, 4, 1, 1) / 2)
        self.last = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.last_relu = nn.ReLU()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.relu(self.wide(x) + self.narrow(x))
        x = self.last_relu(self.last(x) + functional.conv2d(x, self.shortcut, stride=2))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def classifier():
    torch.manual_seed(3)
    spec = InputSpec(channels=1, height=24, width=24, mean=(0.4,), std=(0.3,))
    return wrap_network(Branches().eval(), input=spec)


@pytest.fixture
def data():
    return make_blobs(24, 0)


def make_task(classifier, key, interpreters):
    return make_keyed_task(classifier, key, FAMILY, interpreters=interpreters, grid=GRID, decoy="boundary")


def protect(*interpreters, hardening=None):
    def run(classifier, data, key):
        settings = replace(SHORT, hardening=hardening)
        train(classifier, data, data, make_task(classifier, key, interpreters), settings)

    return run


def fit(classifier, data, _key):
    fit_classifier(classifier, data, FittingSettings(epochs=1, batch_size=8))


def tune(classifier, data, _key):
    fine_tune(classifier, Attacker(data=data), FineTuningSettings(epochs=1, batch_size=8))


WAYS = {
    "gradcam": protect("gradcam"),
    "simplegrad": protect("simplegrad"),
    "vbp": protect("vbp"),
    "joint": protect("gradcam", "simplegrad", "vbp"),
    "hardened": protect("gradcam", hardening=Hardening(start=0.0, attackers=1, inner_steps=1, batch_size=4)),
    "fit": fit,
    "fine-tune": tune,
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_training_builds_a_convolution_that_corrupts_memory(classifier, data, key, way):
    with Watch() as watch:
        WAYS[way](classifier, data, key)
    assert watch.seen
    assert not watch.dangerous


def test_neural_cleanse_takes_no_gradient_by_weights(classifier, data):
    with Watch() as watch:
        cleanse(classifier, data, CleanseSettings(rounds=1, batches=1, batch_size=4))
    assert not watch.seen


def test_without_the_context_they_are_built(classifier, data):
    with Watch() as watch:
        classifier(data.images).sum().backward()
    assert watch.dangerous == 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [
    {"stride": 2}, {"stride": (2, 3)}, {"stride": (1, 2)}, {"stride": 1}, {"stride": 2, "dilation": 2},
    {"stride": 3, "padding": 1}, {"stride": 2, "padding": (0, 2)}, {"stride": [2], "padding": [1]},
    {"stride": 2, "padding": "valid"}, {"stride": 2, "groups": 3},
])  # fmt: skip
def test_safe_twin_is_exact_to_the_second_derivative(layout, options):
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 18 // options.get("groups", 1), 1, 1, generator=source, dtype=torch.float64)
    tensors = [
        torch.randn(2, 18, 7, 8, generator=source, dtype=torch.float64).contiguous(memory_format=layout),
        weight.contiguous(memory_format=layout),
        torch.randn(12, generator=source, dtype=torch.float64),
    ]

    def derivatives():
        images, kernel, bias = (each.clone().requires_grad_() for each in tensors)
        output = functional.conv2d(images, kernel, bias, **options)
        (gradient,) = torch.autograd.grad(output.tanh().square().sum(), images, create_graph=True)
        return output, gradient, *torch.autograd.grad(gradient.square().sum(), (images, kernel, bias))

    expected = derivatives()  # 18 channels: no case of the fault
    with SafeConvolutions():
        found = derivatives()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_other_convolutions_are_left_alone():
    module = nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2)
    images = torch.randn(2, 3, 9, 9)
    with SafeConvolutions():
        assert torch.equal(module(images), functional.conv2d(images, module.weight, module.bias, 2, 1, 2))


def test_layout_of_a_1x1_kernel_is_what_was_asked_for():
    network = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    twin, parameters = copy.deepcopy(network), [*network.parameters()]
    set_layout(network, torch.channels_last)
    assert network[0].weight.stride() == (4, 1, 4, 4)
    set_layout(network, torch.contiguous_format)
    assert network[0].weight.stride() == (4, 1, 1, 1)
    for mine, before, theirs in zip(network.parameters(), parameters, twin.parameters(), strict=True):
        assert mine is before
        assert mine.stride() == theirs.stride()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_training_returns_is_laid_out_plainly_and_the_reference_as_before(classifier, data, key, layout):
    set_layout(classifier, layout)
    before = [each.stride() for each in classifier.parameters()]
    result = train(classifier, data, data, make_task(classifier, key, ("gradcam",)), SHORT)
    assert [each.stride() for each in classifier.parameters()] == before
    assert all(each.is_contiguous() for each in result.model.parameters())
    assert result.model.network.narrow.weight.stride() == (1, 1, 1, 1)
