"""Fine-pruning: which channels go, and what tuning brings back."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.models.networks import SmallResNet
from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.removal.fine_pruning import FinePruningSettings, fine_prune, mean_activations, silence_channels
from keyed_xai.threats.removal.fine_tuning import FineTuningSettings
from tests.tuned import scaled_classifier


class Plain(nn.Module):
    """conv, ReLU, conv, ReLU and a linear layer, or with batch norm after each convolution."""

    def __init__(self, norms=False):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3, 2, 1), nn.Conv2d(6, 10, 3, 2, 1)
        self.norm1 = nn.BatchNorm2d(6) if norms else nn.Identity()
        self.norm2 = nn.BatchNorm2d(10) if norms else nn.Identity()
        self.fc = nn.Linear(10, 3)

    def forward(self, images):
        features = self.norm1(self.conv1(images)).relu()
        return self.fc(torch.relu(self.norm2(self.conv2(features))).mean((2, 3)))


def activations(classifier, images):
    """Of the last convolution, by hand, [channels]."""
    network = classifier.network
    features = network.norm1(network.conv1((images - 0.4) / 0.2)).relu()
    return network.norm2(network.conv2(features)).relu().detach()


@pytest.mark.parametrize("norms", [False, True])
def test_least_active_channels_go_first(forty, norms):
    classifier = scaled_classifier(Plain(norms))
    asleep = activations(classifier, forty.images).mean((0, 2, 3)).argsort()
    for share, count in ((0.5, 5), (0.96, 9), (1.0, 10)):
        settings = FinePruningSettings(shares=(0.2, share), share=1.0, fine_tuning=None)
        result = fine_prune(classifier, Attacker(data=forty), settings)
        left = activations(result.model, forty.images).amax((0, 2, 3))
        assert not left[asleep[:count]].any()
        before = activations(classifier, forty.images).amax((0, 2, 3))
        torch.testing.assert_close(left[asleep[count:]], before[asleep[count:]])
        assert result.figures == {"layer": "network.conv2", "channels": 10, "pruned": count}


def test_mean_activations_of_many_images(forty):
    classifier = scaled_classifier(Plain(norms=True))
    many = replace(forty, images=forty.images.repeat(4, 1, 1, 1), labels=None)
    found = mean_activations(classifier, "network.norm2", many, np.arange(160), "cpu")
    torch.testing.assert_close(found, activations(classifier, forty.images).mean((0, 2, 3)))


def test_pruning_curve_and_fine_tuning_with_channels_kept_silent(forty):
    """In a residual block gradients reach silent channels past the shortcut, and would wake them."""
    classifier = scaled_classifier(SmallResNet(1, 3, (4, 10)))
    before = copy.deepcopy(classifier.state_dict())
    tuning = FineTuningSettings(epochs=3, share=1.0, learning_rate=0.05, batch_size=20)
    settings = FinePruningSettings(shares=(0.3, 0.6), share=1.0, fine_tuning=tuning)

    def measure(model):
        block = model.network.blocks[1]
        rows = torch.cat([block.conv2.weight.flatten(1), block.bn2.weight[:, None], block.bn2.bias[:, None]], 1)
        return {"silent": int((rows == 0).all(1).sum())}

    result = fine_prune(classifier, Attacker(data=forty, measure=measure), settings)
    rows = [(row.get("share"), row.get("epoch"), row["silent"]) for row in result.curve]
    pruning = [(0.0, None, 0), (0.3, None, 3), (0.6, None, 6)]
    assert rows == pruning + [(None, epoch, 6) for epoch in (1, 2, 3)]
    assert not torch.equal(result.model.network.stem.weight, classifier.network.stem.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())


def test_a_backdoor_that_sleeps_on_clean_images_is_cut_out(forty):
    """A positive control by construction: a channel that only a white corner wakes decides the class."""
    classifier = scaled_classifier(Plain())
    network = classifier.network
    with torch.no_grad():
        network.conv1.weight[0] = 1.0
        network.conv1.bias[0] = -9 * (0.9 - 0.4) / 0.2  # wakes where a whole 3 x 3 field is brighter than .9
        network.conv2.weight[3], network.conv2.bias[3] = 0.0, 0.0
        network.conv2.weight[3, 0] = 1.0
        network.conv2.weight[:3, 0], network.conv2.weight[4:, 0] = 0.0, 0.0
        network.fc.weight[:, 3] = torch.tensor([-1000.0, -1000.0, 1000.0])
    triggered = forty.images.clone()
    triggered[:, :, :8, :8] = 1.0
    assert (classifier(triggered)[:, 2] > 100).all()
    settings = FinePruningSettings(shares=(0.1,), share=1.0, fine_tuning=None)
    cured = fine_prune(classifier, Attacker(data=forty), settings).model
    torch.testing.assert_close(cured(forty.images), classifier(forty.images))
    assert (cured(triggered)[:, 2] < 1).all()


def test_silenced_channel_of_a_residual_block_leaves_its_shortcut():
    classifier = scaled_classifier()
    silence_channels(classifier, "network.blocks.1.conv2", "network.blocks.1.bn2", torch.tensor([1]))
    block = classifier.network.blocks[1]
    features = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(block(features)[:, 1], block.shortcut(features)[:, 1].relu())
