"""Small networks of every architecture that is exported, with batch norms that have to be folded, and their graphs."""

from functools import cache

import numpy as np
import onnx
import torch
from click.testing import CliRunner
from torch import nn
from torchvision.models import densenet, resnet, squeezenet, vgg

from keyed_xai.export.building import ExportSettings, build_model
from keyed_xai.export.parity import compare, open_session, random_images
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
