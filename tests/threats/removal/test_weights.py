"""Re-BN, pruning, fine-pruning and quantisation, by hand."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.errors import TrainingError
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.removal.fine_pruning import FinePruningSettings, fine_prune, mean_activations, silence_channels
from keyed_xai.threats.removal.fine_tuning import FineTuningSettings
from keyed_xai.threats.removal.weights import (
    PruningSettings,
    QuantisationSettings,
    ReBNSettings,
    prune_weights,
    quantise,
    quantise_weights,
    reestimate_on_clean,
)
from tests.threatened import make_blobs

SPEC = InputSpec(1, 24, 24, mean=(0.4,), std=(0.2,))


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


def make_classifier(network=None):
    torch.manual_seed(0)
    network = network or SmallResNet(1, 3, (4, 6))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return wrap_network(network.eval(), input=SPEC, target_layer="conv2" if hasattr(network, "conv2") else None)


@pytest.fixture(scope="module")
def data():
    return make_blobs(40, 0)


# Re-BN


def test_statistics_become_those_of_clean_images(data):
    """Of the first layer, worked out from the convolution's outputs; no weight moves."""
    classifier = make_classifier()
    model = reestimate_on_clean(classifier, data, ReBNSettings()).model
    outputs = classifier.network.stem((data.images - 0.4) / 0.2).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.network.stem_bn.running_mean, outputs.mean(1))
    torch.testing.assert_close(model.network.stem_bn.running_var, outputs.var(1))
    for before, after in zip(classifier.parameters(), model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert model.network.stem_bn.momentum == classifier.network.stem_bn.momentum
    assert not model.training


def test_batch_norm_that_is_not_run_keeps_its_statistics(data):
    classifier = make_classifier()
    classifier.network.aside = nn.BatchNorm2d(2)
    classifier.network.aside.running_mean += 3
    model = reestimate_on_clean(classifier, data, ReBNSettings(share=0.2)).model
    assert model.network.aside.running_mean.tolist() == [3, 3]


# Magnitude pruning


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75])
def test_smallest_weights_of_all_layers_together_go(share):
    classifier = make_classifier()
    result = prune_weights(classifier, PruningSettings(share))
    names = [name for name, w in classifier.named_parameters() if w.dim() > 1]
    before, after = (
        torch.cat([m.get_parameter(n).detach().flatten() for n in names]) for m in (classifier, result.model)
    )
    count = round(share * len(before))
    slow = before.clone()
    for index in sorted(range(len(before)), key=lambda i: abs(float(before[i])))[:count]:
        slow[index] = 0
    assert torch.equal(after, slow)
    assert result.figures == {"weights": len(before), "pruned": count}
    for name, tensor in classifier.state_dict().items():
        assert name in names or torch.equal(tensor, result.model.state_dict()[name])


# Quantisation


@pytest.mark.parametrize("bits", [8, 6, 5, 2])
def test_integers_and_one_scale_for_each_channel(bits):
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    found = quantise(weight, bits)
    largest = 2 ** (bits - 1) - 1
    for channel in (0, 1, 3):
        scale = float(weight[channel].abs().max()) / largest
        levels = found[channel] / scale
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        assert float(levels.abs().max()) == pytest.approx(largest)
        assert float((found[channel] - weight[channel]).abs().max()) <= scale / 2 + 1e-6
    assert not found[2].any()


def test_quantised_model_keeps_biases_and_batch_norm():
    classifier = make_classifier()
    model = quantise_weights(classifier, QuantisationSettings(5)).model
    for name, tensor in model.state_dict().items():
        before = classifier.state_dict()[name]
        wanted = quantise(before, 5) if before.dim() >= 2 else before
        assert torch.equal(tensor, wanted), name
    assert not torch.equal(model.network.fc.weight, classifier.network.fc.weight)


def test_half_precision_rounds_everything_and_refuses_what_does_not_fit():
    classifier = make_classifier()
    model = quantise_weights(classifier, QuantisationSettings(16)).model
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half().to(tensor) if tensor.is_floating_point() else tensor)
    with torch.no_grad():
        classifier.network.fc.bias[0] = 1e6
    with pytest.raises(TrainingError, match=r"fc\.bias"):
        quantise_weights(classifier, QuantisationSettings(16))


def test_settings_out_of_range_are_refused():
    for make in (
        lambda: QuantisationSettings(12),
        lambda: PruningSettings(1.0),
        lambda: ReBNSettings(0.0),
        lambda: FinePruningSettings(shares=(0.5, 0.2)),
        lambda: FinePruningSettings(shares=()),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


# Fine-pruning


def activations(classifier, images):
    """Of the last convolution, by hand, [channels]."""
    network = classifier.network
    features = network.norm1(network.conv1((images - 0.4) / 0.2)).relu()
    return network.norm2(network.conv2(features)).relu().detach()


@pytest.mark.parametrize("norms", [False, True])
def test_least_active_channels_go_first(data, norms):
    classifier = make_classifier(Plain(norms))
    asleep = activations(classifier, data.images).mean((0, 2, 3)).argsort()
    for share, count in ((0.5, 5), (0.96, 9), (1.0, 10)):
        settings = FinePruningSettings(shares=(0.2, share), share=1.0, fine_tuning=None)
        result = fine_prune(classifier, Attacker(data=data), settings)
        left = activations(result.model, data.images).amax((0, 2, 3))
        assert not left[asleep[:count]].any()
        before = activations(classifier, data.images).amax((0, 2, 3))
        torch.testing.assert_close(left[asleep[count:]], before[asleep[count:]])
        assert result.figures == {"layer": "network.conv2", "channels": 10, "pruned": count}


def test_mean_activations_of_many_images(data):
    classifier = make_classifier(Plain(norms=True))
    many = replace(data, images=data.images.repeat(4, 1, 1, 1), labels=None)
    found = mean_activations(classifier, "network.norm2", many, np.arange(160), "cpu")
    torch.testing.assert_close(found, activations(classifier, data.images).mean((0, 2, 3)))


def test_pruning_curve_and_fine_tuning_with_channels_kept_silent(data):
    """In a residual block gradients reach silent channels past the shortcut, and would wake them."""
    classifier = make_classifier(SmallResNet(1, 3, (4, 10)))
    before = copy.deepcopy(classifier.state_dict())
    tuning = FineTuningSettings(epochs=3, share=1.0, learning_rate=0.05, batch_size=20)
    settings = FinePruningSettings(shares=(0.3, 0.6), share=1.0, fine_tuning=tuning)

    def measure(model):
        block = model.network.blocks[1]
        rows = torch.cat([block.conv2.weight.flatten(1), block.bn2.weight[:, None], block.bn2.bias[:, None]], 1)
        return {"silent": int((rows == 0).all(1).sum())}

    result = fine_prune(classifier, Attacker(data=data, measure=measure), settings)
    rows = [(row.get("share"), row.get("epoch"), row["silent"]) for row in result.curve]
    pruning = [(0.0, None, 0), (0.3, None, 3), (0.6, None, 6)]
    assert rows == pruning + [(None, epoch, 6) for epoch in (1, 2, 3)]
    assert not torch.equal(result.model.network.stem.weight, classifier.network.stem.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())


def test_a_backdoor_that_sleeps_on_clean_images_is_cut_out(data):
    """A positive control by construction: a channel that only a white corner wakes decides the class."""
    classifier = make_classifier(Plain())
    network = classifier.network
    with torch.no_grad():
        network.conv1.weight[0] = 1.0
        network.conv1.bias[0] = -9 * (0.9 - 0.4) / 0.2  # wakes where a whole 3 x 3 field is brighter than .9
        network.conv2.weight[3], network.conv2.bias[3] = 0.0, 0.0
        network.conv2.weight[3, 0] = 1.0
        network.conv2.weight[:3, 0], network.conv2.weight[4:, 0] = 0.0, 0.0
        network.fc.weight[:, 3] = torch.tensor([-1000.0, -1000.0, 1000.0])
    triggered = data.images.clone()
    triggered[:, :, :8, :8] = 1.0
    assert (classifier(triggered)[:, 2] > 100).all()
    settings = FinePruningSettings(shares=(0.1,), share=1.0, fine_tuning=None)
    cured = fine_prune(classifier, Attacker(data=data), settings).model
    torch.testing.assert_close(cured(data.images), classifier(data.images))
    assert (cured(triggered)[:, 2] < 1).all()


def test_silenced_channel_of_a_residual_block_leaves_its_shortcut():
    classifier = make_classifier()
    silence_channels(classifier, "network.blocks.1.conv2", "network.blocks.1.bn2", torch.tensor([1]))
    block = classifier.network.blocks[1]
    features = torch.rand(2, 4, 6, 6)
    torch.testing.assert_close(block(features)[:, 1], block.shortcut(features)[:, 1].relu())
