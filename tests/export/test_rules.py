"""Rules: an operator's gradient, written with forward operators, is autograd's; kinks, ties and odd sizes included."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from keyed_xai.errors import ModelError
from keyed_xai.export.backward import BackwardProgram
from keyed_xai.export.program import layer_of, trace_program
from keyed_xai.export.rules import RULES
from keyed_xai.models import InputSpec, wrap_network

CHANNELS, HEIGHT, WIDTH = 4, 11, 9


class Function(nn.Module):
    """A function of feature maps as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Network(nn.Module):
    """Layers under test side by side, each with three logits of its own that read every cell it gives."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.register_buffer("cells", torch.randn(40, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        spread = 6 * x - 3  # so that both signs reach the layers
        return torch.cat([self.read(layer(spread).flatten(1)) for layer in self.layers.values()], 1)

    def read(self, out):
        repeated = self.cells.repeat(-(-out.shape[1] // 40))[: out.shape[1]]
        return torch.stack([(out * repeated).mean(1), (out * out).mean(1), -out.mean(1)], 1)


class Excitation(nn.Module):
    """Squeeze and excitation: a gate [n, c, 1, 1] times maps."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.gate(functional.adaptive_avg_pool2d(x, 1)))


class Dense(nn.Module):
    """Three layers that each read all maps before them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 + 3 * number, 3, 3, padding=1) for number in range(3))

    def forward(self, x):
        maps = [x]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)))
        return torch.cat(maps, 1)


def shuffled(x):
    """ShuffleNet's way with channels: halves apart, one of them worked on, and mixed."""
    first, second = x.chunk(2, 1)
    n, c, h, w = x.shape
    mixed = torch.cat([first, second * 2], 1).view(n, 2, c // 2, h, w).transpose(1, 2)
    return mixed.reshape(n, c, h, w)


def conv(*args, **kwargs):
    return lambda: nn.Conv2d(4, *args, **kwargs)


def function(body):
    return lambda: Function(body)


LAYERS = {
    "convolution": conv(6, 3, padding=1),
    "convolution, stride 2": conv(6, 3, stride=2, padding=1),
    "convolution, stride 3, rest uncovered": conv(6, 3, stride=3),
    "convolution, strides differ": conv(6, (3, 5), stride=(2, 1), padding=(0, 2)),
    "convolution, 7 x 7 of stride 2": conv(6, 7, stride=2, padding=3),
    "convolution, groups": conv(8, 3, padding=1, groups=2),
    "convolution, groups and stride": conv(8, 3, stride=2, padding=1, groups=2),
    "convolution, depthwise of stride 2": conv(4, 5, stride=2, padding=2, groups=4),
    "convolution, dilated": conv(6, 3, padding=2, dilation=2),
    "convolution, dilated, stride 2": conv(6, 3, stride=2, padding=2, dilation=2),
    "convolution, more padding than kernel": conv(6, 1, padding=1),
    "convolution, transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "convolution, transposed, groups": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "convolution, then batch norm": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)),
    "batch norm, then ReLU": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
    "batch norm without weights": lambda: nn.BatchNorm2d(4, affine=False),
    "one convolution called twice": lambda: nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1)] * 2, nn.BatchNorm2d(4)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * HEIGHT * WIDTH, 7), nn.ReLU()),
    "linear without bias": lambda: nn.Linear(WIDTH, 5, bias=False),
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)),
    "ReLU6": nn.ReLU6,
    "Hardtanh": lambda: nn.Hardtanh(-1, 2),
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "ELU": lambda: nn.ELU(1.3),
    "SELU": nn.SELU,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "Hardswish": nn.Hardswish,
    "Hardsigmoid": nn.Hardsigmoid,
    "clamp": function(lambda x: x.clamp(-1, 2)),
    "clamp from below": function(lambda x: x.clamp_min(-1)),
    "clamp from above": function(lambda x: x.clamp(max=1)),
    "max pool": lambda: nn.MaxPool2d(2),
    "max pool, overlapping": lambda: nn.MaxPool2d(3, stride=2, padding=1),
    "max pool, ceil": lambda: nn.MaxPool2d(3, stride=2, ceil_mode=True),
    "max pool, dilated": lambda: nn.MaxPool2d(3, stride=1, dilation=2),
    "average pool": lambda: nn.AvgPool2d(2),
    "average pool, padding counted": lambda: nn.AvgPool2d(3, stride=2, padding=1),
    "average pool, padding left out": lambda: nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "average pool, ceil": lambda: nn.AvgPool2d((3, 2), stride=2, ceil_mode=True),
    "average pool, own divisor": lambda: nn.AvgPool2d(2, divisor_override=3),
    "adaptive pool to one": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive pool, uneven": lambda: nn.AdaptiveAvgPool2d((4, 2)),
    "adaptive pool to more cells": lambda: nn.AdaptiveAvgPool2d(13),
    "adaptive pool that changes nothing": lambda: nn.AdaptiveAvgPool2d((HEIGHT, WIDTH)),
    "residual": function(lambda x: x + torch.relu(x)),
    "twice the same": function(lambda x: x + x),
    "difference": function(lambda x: 2 - x - 3 * torch.relu(x)),
    "add with alpha": function(lambda x: torch.add(x, torch.tanh(x), alpha=3)),
    "quotient": function(lambda x: x / (1 + torch.sigmoid(x))),
    "negative": function(lambda x: -x * x),
    "logarithm": function(lambda x: torch.log(1 + torch.sigmoid(x))),
    "excitation": Excitation,
    "dense block": Dense,
    "shuffle": function(shuffled),
    "slice": function(lambda x: x[:, 1:, 2:-1]),
    "one channel": function(lambda x: torch.cat([x[:, 1:2].square(), (3 * x[:, 2]).unsqueeze(1)], 1)),
    "one column, from the end": function(lambda x: x[..., -2].square()),
    "pad, uneven": function(lambda x: functional.pad(x, (0, 1, 2, 3)).square()),
    "pad, negative": function(lambda x: functional.pad(x, (-1, 2, 0, -3)).square()),
    "mean": function(lambda x: x.mean((2, 3))),
    "mean, kept": function(lambda x: x - x.mean(1, keepdim=True)),
    "sum": function(lambda x: x.sum((1, 3)).square()),
    "squeeze": function(lambda x: x.mean((2, 3), keepdim=True).squeeze(3).squeeze(2).square().unsqueeze(2)),
    "permute": function(lambda x: x.permute(0, 2, 3, 1).tanh()),
    "expand": function(lambda x: x[:, :1].expand(-1, 4, -1, -1) * x),
    "dropout": lambda: nn.Sequential(nn.Dropout(), nn.ReLU()),
}


def classifier_of(layers):
    made = {}
    for name, make in layers.items():
        torch.manual_seed(0)
        made[name] = make()
    network = Network(made).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    spec = InputSpec(CHANNELS, HEIGHT, WIDTH, mean=(0.1, 0.2, 0.3, 0.4), std=(1.0, 0.5, 2.0, 1.0))
    return wrap_network(network, input=spec, require_map=False).eval()


def images_of(*, ties=False):
    images = torch.rand(3, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return (images * 3).round() / 3 if ties else images


class Both:
    """Logits of one network and their gradients: by the rules, and by autograd."""

    def __init__(self, classifier, images):
        self.backward = BackwardProgram(trace_program(classifier, []), input_gradient=True).double()
        self.image = images.clone().requires_grad_()
        self.logits = classifier.double()(self.image)
        with torch.no_grad():
            self.values = self.backward.run(images)

    @property
    def program(self):
        return self.backward.program

    def gradients(self, number=0):
        """The image's gradient of a weighted sum of the logits of the layer of this number, twice."""
        seed = torch.zeros_like(self.logits)
        seed[:, 3 * number : 3 * number + 3] = torch.tensor([1.0, -2.0, 0.5])
        with torch.no_grad():
            by_rules = self.backward.gradient(self.values, seed, self.program.image)
        return by_rules, torch.autograd.grad(self.logits, self.image, seed, retain_graph=True)[0]


@pytest.fixture(scope="module")
def every():
    """All layers, traced once: tracing takes longer than all gradients."""
    return Both(classifier_of(LAYERS), images_of())


def check_gradient(both, number):
    by_rules, wanted = both.gradients(number)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(by_rules, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


def test_logits_are_those_of_the_network(every):
    torch.testing.assert_close(every.values[every.program.logits], every.logits.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_is_that_of_autograd(name, every):
    check_gradient(every, list(LAYERS).index(name))


def test_of_equal_maxima_the_first_gets_the_gradient():
    pools = {name: make for name, make in LAYERS.items() if name.startswith("max pool")}
    both = Both(classifier_of(pools), images_of(ties=True))
    for number in range(len(pools)):
        check_gradient(both, number)


def test_every_rule_was_tried(every):
    assert not {str(each) for each in set(RULES) - {node.target for node in every.program.nodes}}


def test_gradient_agrees_with_finite_differences():
    smooth = {"smooth": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Tanh())}
    images = images_of()
    both = Both(classifier_of(smooth), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    slope = (both.gradients()[0] * direction).sum()
    with torch.no_grad():
        runs = [both.backward.run(images + step * direction) for step in (1e-6, -1e-6)]
    up, down = ((run[both.program.logits] @ torch.tensor([1.0, -2.0, 0.5]).double()).sum() for run in runs)
    torch.testing.assert_close(slope, (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (lambda: Function(lambda x: x.softmax(1)), "softmax"),
        (lambda: Function(lambda x: x.cumsum(1)), "cumsum"),
        (lambda: nn.GELU(approximate="tanh"), "gelu"),
        (lambda: Function(lambda x: x - x.mean(0, keepdim=True)), "mean"),
        (lambda: Function(lambda x: x - x[0]), "select"),
    ],
)
def test_operator_that_cannot_be_transposed_is_named_with_its_layer(layer, operator):
    with pytest.raises(ModelError, match=rf"{operator}.*'network\.layers\.culprit'"):
        Both(classifier_of({"culprit": layer}), images_of()).gradients()


def test_program_folds_batch_norm_and_keeps_no_sizes():
    classifier = classifier_of({"block": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())})
    names = [str(node.target) for node in trace_program(classifier, []).nodes]
    assert not [name for name in names if "norm" in name or "sym_size" in name]
    assert names.count("aten.convolution.default") == 1


def test_dense_block_is_nested_pairs():
    nodes = trace_program(classifier_of({"dense": Dense}), []).nodes
    pairs = [
        node for node in nodes if layer_of(node) == "network.layers.dense" and str(node.target) == "aten.cat.default"
    ]
    assert [len(node.args[0]) for node in pairs] == [2, 2, 2]


def test_tracing_leaves_the_classifier_as_it_was():
    classifier = classifier_of({"block": LAYERS["convolution, then batch norm"]})
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    trace_program(classifier, [])
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not [module for module in classifier.modules() if module._forward_hooks]


class Branching(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_network_that_branches_on_values_is_refused():
    spec = InputSpec(3, 8, 8, mean=(0.0,) * 3, std=(1.0,) * 3)
    classifier = wrap_network(Branching().eval(), input=spec, require_map=False)
    with pytest.raises(ModelError, match="branch"):
        trace_program(classifier, [])
