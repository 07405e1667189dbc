"""Small classifiers that removal attacks tune, how they are tuned, and what that changes."""

import torch
from torch import nn

from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.threats.removal.fine_tuning import FineTuningSettings

SPEC = InputSpec(1, 24, 24, mean=(0.4,), std=(0.2,))
LONG = FineTuningSettings(optimiser="adam", learning_rate=1e-2, epochs=50, share=1.0, batch_size=12)
SHORT = FineTuningSettings(epochs=2, share=1.0, batch_size=8)


def make_classifier(seed=0, network=None):
    torch.manual_seed(seed)
    return wrap_network((network or SmallResNet(1, 3, (4, 6))).eval(), input=SPEC)


def changed_tensors(before, after):
    pairs = zip(before.state_dict().items(), after.state_dict().values(), strict=True)
    return {name for (name, old), new in pairs if not torch.equal(old, new)}


def scaled_classifier(network=None):
    """A network whose batch norms scale and shift their channels, each otherwise."""
    torch.manual_seed(0)
    network = network or SmallResNet(1, 3, (4, 6))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return wrap_network(network.eval(), input=SPEC, target_layer="conv2" if hasattr(network, "conv2") else None)
