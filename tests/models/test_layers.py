"""The target layer and the taps of every family, of user modules, and what is refused; the network is left alone."""

import copy
from collections import OrderedDict
from functools import cache

import pytest
import torch
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.models import InputSpec, catalogue, derive_taps, find_target_layer
from keyed_xai.models.layers import trace_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.tensors import Tap


def spec_of(side, channels=3):
    return InputSpec(channels, side, side, mean=(0.5,) * channels, std=(0.5,) * channels)


@cache
def network_of(name):
    """Return a network whose weights are zeros: only names and shapes matter here."""

    def build():
        return catalogue.build_network("torchvision", name, classes=5, channels=3)

    network = catalogue.build_without_memory(build).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.zero_()
    return network


class Plain(nn.Module):
    """A user's network: functional activations, so that only convolutions can be hooked."""

    def __init__(self, classes=4):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 5, stride=2, padding=2)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


TARGETS = {
    "resnet18": (64, "layer4"),
    "resnet50": (64, "layer4"),
    "vgg11": (64, "features.19"),
    "vgg11_bn": (64, "features.27"),
    "densenet121": (64, "features.norm5"),
    "squeezenet1_0": (96, "features.12"),
    "squeezenet1_1": (96, "features.12"),
    "mobilenet_v2": (64, "features.18"),
    "mobilenet_v3_small": (64, "features.12"),
    "efficientnet_b0": (64, "features.8"),
    "alexnet": (96, "features.11"),
    "googlenet": (64, "inception5b"),
    "shufflenet_v2_x0_5": (64, "conv5"),
    "regnet_y_400mf": (64, "trunk_output.block4"),
    "convnext_tiny": (64, "features.7"),
    "mnasnet0_5": (64, "layers.16"),
}


@pytest.mark.parametrize(("name", "side", "target"), [(name, *rest) for name, rest in TARGETS.items()])
def test_target_layer_is_the_last_map_before_the_head(name, side, target):
    network = network_of(name)
    assert find_target_layer(network, spec_of(side)) == target
    taps = derive_taps(network, spec_of(side))
    assert len(taps) > 4
    assert all(tap.kernel >= tap.stride >= 1 for tap in taps)
    names = [name for name, _ in network.named_modules()]
    assert {tap.layer for tap in taps} <= set(names)


def test_vgg19_is_read_before_the_last_pooling_at_every_relu():
    vgg = network_of("vgg19")
    assert find_target_layer(vgg, spec_of(32)) == "features.35"
    taps = derive_taps(vgg, spec_of(32))
    relus = [f"features.{name}" for name, module in vgg.features.named_children() if isinstance(module, nn.ReLU)]
    assert [tap.layer for tap in taps] == relus
    assert [tap.stride for tap in taps] == [1, 1, 2, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1]
    assert {tap.kernel for tap in taps} == {3}


def test_resnet_taps_are_stem_and_blocks():
    assert derive_taps(network_of("resnet18"), spec_of(64)) == (
        Tap("relu", 7, 2),
        Tap("layer1.0", 3, 2),
        Tap("layer1.1", 3, 1),
        Tap("layer2.0", 3, 2),
        Tap("layer2.1", 3, 1),
        Tap("layer3.0", 3, 2),
        Tap("layer3.1", 3, 1),
        Tap("layer4.0", 3, 2),
        Tap("layer4.1", 3, 1),
    )


def test_densenet_taps_are_stem_blocks_and_transitions():
    taps = derive_taps(network_of("densenet121"), spec_of(64))
    parts = ["relu0", "denseblock1", "transition1", "denseblock2", "transition2", "denseblock3", "transition3"]
    assert [tap.layer for tap in taps] == [f"features.{part}" for part in [*parts, "denseblock4"]]
    assert taps[0] == Tap("features.relu0", 7, 2)
    assert taps[2] == Tap("features.transition1", 2, 2)


def test_squeezenet_taps_are_stem_and_fires():
    taps = derive_taps(network_of("squeezenet1_1"), spec_of(96))
    assert [tap.layer for tap in taps] == [f"features.{number}" for number in (1, 3, 4, 6, 7, 9, 10, 11, 12)]


@pytest.mark.parametrize(("name", "last"), [("mobilenet_v2", 18), ("efficientnet_b0", 8)])
def test_mobile_taps_are_stem_and_blocks(name, last):
    taps = derive_taps(network_of(name), spec_of(64))
    assert [tap.layer for tap in taps] == [f"features.{number}" for number in range(last + 1)]


@pytest.mark.parametrize("widths", [(16, 32, 64), (8, 8, 8, 8)])
def test_small_resnet_ends_at_its_last_block(widths):
    network = SmallResNet(1, 10, widths)
    assert find_target_layer(network, spec_of(32, 1)) == f"blocks.{len(widths) - 1}"
    layers = [tap.layer for tap in derive_taps(network, spec_of(32, 1))]
    assert layers == ["stem_relu", *(f"blocks.{number}" for number in range(len(widths)))]


def test_strides_multiply_up_to_the_reduction_of_the_image():
    for name in ("resnet18", "mobilenet_v2", "densenet121"):
        taps = derive_taps(network_of(name), spec_of(64))
        assert torch.tensor([tap.stride for tap in taps]).prod() == 32


def test_class_count_equal_to_the_channels_does_not_hide_the_target():
    network = SmallResNet(1, 64, (16, 32, 64))
    assert find_target_layer(network, spec_of(32, 1)) == "blocks.2"


def test_image_too_small_for_the_last_block_moves_the_target_up_whole_blocks():
    assert find_target_layer(network_of("resnet50"), spec_of(32)) == "layer3"


def test_user_module_without_activation_modules_is_read_at_its_convolutions():
    assert find_target_layer(Plain(), spec_of(16, 1)) == "second"
    assert derive_taps(Plain(), spec_of(16, 1)) == (Tap("first", 5, 2), Tap("second", 3, 1))


def test_images_need_not_be_square():
    spec = InputSpec(1, 16, 40, mean=(0.0,), std=(1.0,))
    assert find_target_layer(Plain(), spec) == "second"


def test_layers_named_are_taken_in_the_order_of_the_forward():
    taps = derive_taps(network_of("resnet18"), spec_of(64), layers=["layer3", "layer1"])
    assert taps == (Tap("layer1", 7, 4), Tap("layer3", 4, 4))


def test_taps_stop_at_a_target_layer_named():
    taps = derive_taps(network_of("resnet18"), spec_of(64), target_layer="layer2")
    assert taps[-1].layer == "layer2.1"


@pytest.mark.parametrize("layer", ["layer9", "fc", "layer1.0.relu"])
def test_layer_named_without_one_map_is_refused(layer):
    with pytest.raises(ModelError, match=rf"'{layer}' was named, which .*would do: .*layer4"):
        derive_taps(network_of("resnet18"), spec_of(64), layers=[layer])


def test_mlp_has_no_target_layer():
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ModelError, match="--target-layer"):
        find_target_layer(mlp, spec_of(8, 1))


def test_vision_transformer_has_no_target_layer():
    import torchvision

    network = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=3)
    with pytest.raises(ModelError, match="--target-layer"):
        find_target_layer(network, spec_of(32))


def test_wrong_image_size_is_explained():
    with pytest.raises(ModelError, match=r"cannot take images of 3 channels and 16x16 pixels.*--input-size"):
        find_target_layer(Plain(), spec_of(16, 3))


def test_output_that_is_no_logits_is_refused():
    network = nn.Sequential(nn.Conv2d(1, 4, 3))
    with pytest.raises(ModelError, match="logits"):
        find_target_layer(network, spec_of(8, 1))


def test_network_is_left_as_it_was():
    network = nn.Sequential(
        OrderedDict(body=nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), drop=nn.Dropout(),
                    pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4, 3))
    )  # fmt: skip
    network.train()
    network.body[1].eval()
    seen = []
    network.body.register_forward_hook(lambda *_: seen.append(1))
    before, flags = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    random = torch.get_rng_state()

    derive_taps(network, spec_of(8, 1))

    assert seen == [1]
    assert [module.training for module in network.modules()] == flags
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [len(module._forward_hooks) for module in network.modules()].count(1) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_hooks_are_removed_when_the_forward_fails():
    network = Plain()
    with pytest.raises(ModelError):
        find_target_layer(network, spec_of(16, 3))
    assert not any(module._forward_hooks for module in network.modules())
    assert network.training


class Attention(nn.Module):
    """A convolution, then one window of attention whose weights are a row and a column for each cell."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.softmax = nn.Softmax(dim=-1)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        weights = self.drop(self.softmax((tokens @ tokens.transpose(1, 2))[:, None]))
        return self.fc((weights[:, 0] @ tokens).mean(1))


def test_attention_weights_are_no_feature_map():
    spec = InputSpec(3, 32, 32, mean=(0.5,) * 3, std=(0.25,) * 3)
    trace = trace_network(Attention().eval(), spec)
    assert [call.name for call in trace.maps()] == ["conv"]
    for layer in ("softmax", "drop"):
        with pytest.raises(ModelError, match=r"The last ones that would do: conv\.$"):
            trace.map_of(layer)
