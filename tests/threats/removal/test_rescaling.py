"""Rescaling and permuting channels: logits stay, feature maps do not, and what cannot be done exactly is left."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from keyed_xai.metrics import correlation
from keyed_xai.models import InputSpec
from keyed_xai.models.layer_graph import last_convolution, last_layer
from keyed_xai.saliency.pooled import make_view
from keyed_xai.threats.removal import rescaling
from keyed_xai.threats.removal.rescaling import ChannelGroup, RescalingSettings, find_channel_groups, rescale_channels
from tests.rescaled import classify
from tests.threatened import make_blobs


@pytest.fixture
def images():
    return make_blobs(6, 1).images


def test_groups_of_a_residual_network(residual):
    """Inner channels of each block alone; the stream between blocks with everything that writes and reads it."""
    found = {
        (group.channels, frozenset(group.writers), frozenset(group.readers)) for group in find_channel_groups(residual)
    }

    def inner(block):
        return (frozenset({(f"{block}.conv1", f"{block}.bn1")}), frozenset({f"{block}.conv2"}))

    first, second, third = (f"network.blocks.{number}" for number in range(3))
    stem = frozenset({("network.stem", "network.stem_bn"), (f"{first}.conv2", f"{first}.bn2")})
    later = frozenset(
        {(f"{second}.conv2", f"{second}.bn2"), (f"{second}.shortcut", None), (f"{third}.conv2", f"{third}.bn2")}
    )
    assert found == {
        (4, *inner(first)),
        (6, *inner(second)),
        (6, *inner(third)),
        (4, stem, frozenset({f"{first}.conv1", f"{second}.conv1", f"{second}.shortcut"})),
        (6, later, frozenset({f"{third}.conv1", "network.fc"})),
    }


def test_logits_gradcam_and_simplegrad_stay_and_visualbackprop_does_not(residual, images):
    result = rescale_channels(residual, RescalingSettings(seed=2))
    view = make_view(residual, ("gradcam", "simplegrad", "vbp"), None)
    logits, maps = view.pooled(residual, images, None)
    new_logits, new_maps = view.pooled(result.model, images, None)
    torch.testing.assert_close(new_logits, logits, atol=1e-5, rtol=1e-5)
    agreement = {name: float(correlation(maps[name], new_maps[name]).mean()) for name in maps}
    assert agreement["gradcam"] > 0.9999
    assert agreement["simplegrad"] > 0.9999
    assert agreement["vbp"] < 0.95
    assert result.figures["channels"] == 26
    assert result.figures["reverted"] == 0
    assert result.figures["largest_difference"] < 1e-5


def test_every_channel_can_only_be_scaled_or_moved(residual, images):
    """The first map is the old one in another order, times powers of two."""
    result = rescale_channels(residual, RescalingSettings(largest_exponent=3, seed=1))
    stems = [
        model.network.stem_relu(model.network.stem_bn(model.network.stem((images - 0.4) / 0.2))).detach()
        for model in (residual, result.model)
    ]
    before, after = (stem.transpose(0, 1).flatten(1) for stem in stems)
    cosine = functional.normalize(after, dim=1) @ functional.normalize(before, dim=1).T
    order = cosine.argmax(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(cosine.amax(1), torch.ones(4))
    exponents = torch.log2(after.norm(dim=1) / before[order].norm(dim=1))
    torch.testing.assert_close(exponents, exponents.round(), atol=1e-4, rtol=0)
    assert len(set(exponents.round().tolist())) > 1


def test_nothing_is_scaled_with_exponent_zero(residual):
    result = rescale_channels(residual, RescalingSettings(largest_exponent=0, permute=False))
    for name, tensor in residual.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name


class Chain(nn.Module):
    """Functional activations, pooling, and a flattened map read by a linear layer with several columns a channel."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 5, 3, padding=1), nn.Conv2d(5, 7, 3, padding=1)
        self.hidden, self.fc = nn.Linear(7 * 16, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.first(x)), 2)
        x = functional.adaptive_avg_pool2d(functional.leaky_relu(self.second(x), 0.1), 4)
        return self.fc(self.hidden(functional.dropout(x.view(len(x), -1), 0.5, self.training)).relu())


def test_functional_layers_and_flattened_maps():
    torch.manual_seed(0)
    classifier = classify(Chain(), target_layer="second")
    assert find_channel_groups(classifier) == [
        ChannelGroup(5, (("network.first", None),), ("network.second",)),
        ChannelGroup(7, (("network.second", None),), ("network.hidden",)),
    ]
    assert rescale_channels(classifier, RescalingSettings()).figures["reverted"] == 0


class Refusing(nn.Module):
    """Everything that makes rescaling wrong, one in each layer."""

    def __init__(self):
        super().__init__()
        self.relu6, self.silu, self.joined, self.wise, self.shared = (nn.Conv2d(4, 4, 1) for _ in range(5))
        self.stem, self.free = nn.Conv2d(1, 4, 1), nn.Conv2d(8, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = functional.relu6(self.relu6(self.stem(x).tanh()))
        x = functional.silu(self.silu(x))
        x = functional.relu(self.norm(self.joined(x) + x))  # batch norm after a sum
        x = functional.relu(self.depthwise(functional.relu(self.wise(x))))
        x = self.shared(self.shared(x).relu()).relu()
        return self.fc(self.free(torch.cat([x, x + 1], 1)).relu().mean((2, 3)))


def test_only_exact_groups_are_found():
    torch.manual_seed(0)
    classifier = classify(Refusing(), target_layer="free")
    groups = find_channel_groups(classifier)
    assert groups == [ChannelGroup(4, (("network.free", None),), ("network.fc",))]
    assert rescale_channels(classifier, RescalingSettings()).figures["channels"] == 4


def test_group_that_changes_logits_is_put_back(residual, monkeypatch):
    """Were a group found wrongly, the check of the logits would undo it."""
    wrong = ChannelGroup(4, (("network.stem", "network.stem_bn"),), ("network.blocks.0.conv1",))
    right = next(g for g in find_channel_groups(residual) if g.readers == ("network.blocks.0.conv2",))
    monkeypatch.setattr(rescaling, "find_channel_groups", lambda model: [wrong, right])
    result = rescale_channels(residual, RescalingSettings())
    assert (result.figures["reverted"], result.figures["channels"]) == (1, 4)
    assert torch.equal(result.model.network.stem_bn.weight, residual.network.stem_bn.weight)
    assert not torch.equal(result.model.network.blocks[0].bn1.weight, residual.network.blocks[0].bn1.weight)


@pytest.mark.parametrize(
    ("name", "groups", "convolution", "layer"),
    [
        ("resnet18", 12, "layer4.1.conv2", "fc"),
        ("squeezenet1_1", 9, "classifier.1", "classifier.1"),
        ("mobilenet_v2", 7, "features.18.0", "classifier.1"),
    ],
)
def test_known_families(name, groups, convolution, layer):
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)(weights=None, num_classes=3)
    classifier = classify(network, InputSpec(3, 64, 64, mean=(0.5,) * 3, std=(0.25,) * 3))
    assert last_convolution(classifier) == f"network.{convolution}"
    assert last_layer(classifier) == f"network.{layer}"
    result = rescale_channels(classifier, RescalingSettings(largest_exponent=2))
    assert (result.figures["groups"], result.figures["reverted"]) == (groups, 0)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(result.model(images), classifier(images), atol=1e-5, rtol=1e-4)


# The graph itself
