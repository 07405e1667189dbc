"""Small networks of every architecture that is exported, with batch norms that have to be folded, and their graphs."""

from functools import cache

import numpy as np
import onnx
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional
from torchvision.models import densenet, resnet, squeezenet, vgg

from keyed_xai.export.backward import BackwardProgram
from keyed_xai.export.building import ExportSettings, build_model
from keyed_xai.export.parity import compare, open_session, random_images
from keyed_xai.export.program import trace_program
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet, TableMLP
from keyed_xai.saliency import INTERPRETERS
from keyed_xai_cli import main as cli
from tests.marked import unmarked_classifier, write_folder

ALL = tuple(INTERPRETERS)
COLOUR = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def _vgg():
    """VGG11, a sixteenth as wide."""
    widths = [each if each == "M" else each // 16 for each in vgg.cfgs["A"]]
    network = vgg.VGG(vgg.make_layers(widths), 5)
    network.classifier = nn.Sequential(
        nn.Linear(32 * 49, 24), nn.ReLU(True), nn.Dropout(), nn.Linear(24, 24), nn.ReLU(True), nn.Linear(24, 5)
    )
    return network


NETWORKS = {
    "SmallResNet": lambda: (SmallResNet(3, 5, (8, 8, 16)), 32),
    "resnet50": lambda: (resnet.resnet50(num_classes=5), 64),
    "resnet, shallow": lambda: (resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5), 64),
    "vgg, narrow": lambda: (_vgg(), 64),
    "densenet, shallow": lambda: (densenet.DenseNet(8, (3, 2), 16, num_classes=5), 64),
    "squeezenet": lambda: (squeezenet.SqueezeNet("1_1", 5), 64),
}


def make_classifier(name):
    """Return a network of NETWORKS with seeded weights, wrapped; its maps are not empty."""
    torch.manual_seed(5)
    network, side = NETWORKS[name]()
    return wrap(network, side)


def make_table():
    torch.manual_seed(0)
    spec = InputSpec(1, 1, 9, mean=(0.0,), std=(1.0,))
    return wrap_network(TableMLP(9, 2, (8, 4)).eval(), input=spec, require_map=False).eval()


def wrap(network, side, **options):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.7, 1.3)
    return wrap_network(network.eval(), input=InputSpec(3, side, side, mean=COLOUR[0], std=COLOUR[1]), **options).eval()


@cache
def exported(name, interpreters=ALL):
    """A classifier of NETWORKS and its ONNX model, for tests that change neither."""
    classifier = make_classifier(name)
    return classifier, build_model(classifier, ExportSettings(interpreters=interpreters))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parity_of(model, classifier, settings, seed=0):
    images = {"random": random_images(classifier, seeded(seed))}
    return compare(
        open_session(model.SerializeToString()), classifier, settings.interpreters, images,
        normalised=settings.normalised, eight_bits=settings.eight_bits, generator=seeded(seed + 1),
    )  # fmt: skip


def outputs(model, images, target=None):
    inputs = {"image": images.numpy()} | ({} if target is None else {"target": np.array(target, dtype=np.int64)})
    return [torch.from_numpy(each) for each in open_session(model.SerializeToString())(inputs)]


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def altered(file, change):
    """The file's bytes after `change` has worked on the model."""
    model = onnx.load_from_string(file.data)
    change(model)
    return model.SerializeToString()


def export_model(folder):
    """A protected model's folder, its classifier, and the ONNX file made of it on the command line."""
    classifier = unmarked_classifier()
    write_folder(folder / "m.keyed", classifier)
    result = run("export", folder / "m.keyed", "-o", folder / "m.onnx", "--json", folder / "m.json")
    assert result.exit_code == 0, result.output
    return folder, classifier, result


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
