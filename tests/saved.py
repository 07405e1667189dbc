"""Checkpoints as training scripts write them, how they are loaded, and what their networks compute."""

import torch
import torchvision

from keyed_xai.models import catalogue, load_classifier, network_state
from tests.conftest import draw_statistics

SIDE = 64
IMAGES = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class AttributeDict(dict):
    """As Lightning keeps options in."""


def build(seed):
    torch.manual_seed(seed)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    draw_statistics(network)
    return network.eval()


def under(prefix, network):
    return {prefix + name: tensor for name, tensor in network.state_dict().items()}


def averaged(network):
    """The state of torch's own AveragedModel: a prefix, and a counter beside it."""
    return torch.optim.swa_utils.AveragedModel(network).state_dict()


def torchvision_state(name, classes=5, **options):
    """Return a state dict with shapes but no numbers."""
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False

    def build():
        return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)

    return catalogue.build_without_memory(build).state_dict()


def load(path, **options):
    return load_classifier(path, input_size=SIDE, **options)


def computes_as(classifier, network):
    with torch.no_grad():
        return torch.allclose(classifier(IMAGES), network((IMAGES - MEAN) / STD), atol=1e-6)


def same_state(classifier, expected):
    state = network_state(classifier)
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


def said(classifier):
    return " ".join(classifier.notes)
