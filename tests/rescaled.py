"""Classifiers whose batch norms scale and shift every channel, with statistics as after training."""

import torch
from torch import nn

from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from tests.threatened import SIDE

SPEC = InputSpec(1, SIDE, SIDE, mean=(0.4,), std=(0.2,))


def classify(network, spec=SPEC, **options):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return wrap_network(network.eval(), input=spec, **options)


def make_residual():
    torch.manual_seed(0)
    return classify(SmallResNet(1, 3, (4, 6, 6)))
