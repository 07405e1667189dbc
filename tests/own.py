"""Networks of one's own: known ones with other heads."""

import torch
import torchvision
from torch import nn

from keyed_xai.models import InputSpec

COLOUR = InputSpec(3, 64, 64, mean=(0.5,) * 3, std=(0.25,) * 3)


def headed(name, module, head):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, num_classes=7).eval()
    network.set_submodule(module, head)
    return network.eval()


def perceptron(width, activation):
    return nn.Sequential(nn.Linear(width, 8), activation, nn.Dropout(), nn.Linear(8, 5))
