"""Architectures are recognised from tensor names and shapes; what fits nothing, or too much, is refused clearly."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.models import Recognised, catalogue, recognise_architecture
from keyed_xai.models.networks import SmallResNet, TableMLP
from tests.saved import torchvision_state

TORCHVISION = [
    "alexnet", "convnext_base", "convnext_small", "convnext_tiny", "densenet121", "densenet161", "efficientnet_b0",
    "efficientnet_b1", "efficientnet_b2", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mnasnet1_3", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf", "resnet101", "resnet18",
    "resnet34", "resnet50", "resnext101_64x4d", "resnext50_32x4d", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0",
    "squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn", "vgg13", "vgg16", "vgg19", "vgg19_bn",
    "vit_b_16", "vit_b_32", "wide_resnet50_2",
]  # fmt: skip
"""Every family, and those that share tensor names; the table's own test covers the rest."""


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_architecture_is_recognised(name):
    assert recognise_architecture(torchvision_state(name)) == Recognised(
        architecture=name, source="torchvision", classes=5, channels=3
    )


def test_recognition_builds_few_networks(monkeypatch):
    state, built = torchvision_state("resnet18"), []
    build = catalogue.build_without_memory
    monkeypatch.setattr(catalogue, "build_without_memory", lambda make: built.append(make) or build(make))
    catalogue._signature.cache_clear()
    assert recognise_architecture(state).architecture == "resnet18"
    assert 1 <= len(built) <= 5


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_missing_auxiliary_heads_are_fine(name):
    state = torchvision_state(name, aux_logits=False)
    assert not any("aux" in key.lower() for key in state)
    assert recognise_architecture(state) == Recognised(architecture=name, source="torchvision", classes=5, channels=3)


@pytest.mark.parametrize("widths", [(8,), (8, 16), (16, 32, 64), (16, 32, 64, 128), (8, 8, 8, 8, 8)])
def test_small_resnet_is_recognised_by_its_weights(widths):
    state = SmallResNet(2, 7, widths).state_dict()
    assert recognise_architecture(state) == Recognised(
        architecture="SmallResNet", source="keyed_xai", classes=7, channels=2
    )
    shapes = catalogue.shapes_of(state)
    assert catalogue.small_resnet_widths(shapes) == widths
    rebuilt = catalogue.build_network("keyed_xai", "SmallResNet", classes=7, channels=2, shapes=shapes)
    assert catalogue.shapes_of(rebuilt.state_dict()) == shapes


@pytest.mark.parametrize(
    ("features", "classes", "widths"), [(33, 2, (64, 32)), (1, 5, (1000, 7)), (1000, 1000, (3, 3))]
)
def test_table_mlp_is_recognised_by_its_weights(features, classes, widths):
    state = TableMLP(features, classes, widths).state_dict()
    assert recognise_architecture(state) == Recognised(
        architecture="TableMLP", source="keyed_xai", classes=classes, channels=1
    )
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    assert recognise_architecture(wrapped, arch="TableMLP").classes == classes
    shapes = catalogue.shapes_of(state)
    rebuilt = catalogue.build_network("keyed_xai", "TableMLP", classes=classes, channels=1, shapes=shapes)
    assert catalogue.shapes_of(rebuilt.state_dict()) == shapes
    assert catalogue.default_size("keyed_xai", "TableMLP", shapes) == (1, features)


def test_width_of_a_thousand_is_not_taken_for_the_head():
    assert recognise_architecture(SmallResNet(1, 7, (1000,)).state_dict()).classes == 7


def linear_networks():
    """Networks of linear layers alone, none of them a TableMLP."""
    table = TableMLP(4, 2, (5, 3)).state_dict()
    yield nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)).state_dict()
    yield table | {"more.weight": torch.zeros(2, 2)}
    yield {name: tensor for name, tensor in table.items() if name != "fc.bias"}
    yield table | {"hidden.weight": torch.zeros(3, 6)}
    yield table | {"hidden.weight": torch.zeros(3)}
    yield table | {"columns.weight": torch.zeros(5, 0)}
    yield table | {"fc.weight": torch.zeros(2, 4)}


@pytest.mark.parametrize("state", list(linear_networks()))
def test_other_linear_networks_are_not_taken_for_a_table_mlp(state):
    with pytest.raises(ModelError, match=r"fit no architecture of .*wrap_network"):
        recognise_architecture(state)


def test_weights_that_are_not_a_table_mlp_say_what_differs():
    with pytest.raises(ModelError, match=r"do not fit TableMLP .*tensors missing \(columns\.weight"):
        recognise_architecture(torchvision_state("resnet18"), arch="TableMLP")


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
@pytest.mark.parametrize("architecture", ["tresnet_m", "visformer_tiny"])
def test_first_weight_need_not_be_of_the_image_s_channels(architecture):
    """One folds squares of pixels into channels first, the other's first weight of four axes is no convolution's."""
    state = {n: torch.empty(shape, device="meta") for n, shape in catalogue.signature("timm", architecture).items()}
    assert recognise_architecture(state, arch=f"timm:{architecture}").channels == 3


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_identical_weights_of_several_architectures_ask_for_arch():
    state = catalogue.build_network("timm", "efficientnet_b0", classes=5, channels=3).state_dict()
    with pytest.raises(ModelError, match=r"timm:tf_efficientnet_b0.*--arch"):
        recognise_architecture(state)
    assert recognise_architecture(state, arch="tf_efficientnet_b0").architecture == "tf_efficientnet_b0"
    assert recognise_architecture(state, hints=["efficientnet_b0"]).architecture == "efficientnet_b0"


def test_arch_accepts_other_spellings_and_lists_near_ones():
    state = torchvision_state("resnet18")
    assert recognise_architecture(state, arch="ResNet18").architecture == "resnet18"
    with pytest.raises(ModelError, match=r"no architecture is called 'resnet17'.*resnet1"):
        recognise_architecture(state, arch="resnet17")


def test_arch_that_does_not_fit_says_what_differs():
    with pytest.raises(ModelError, match=r"do not fit resnet34 .*tensors missing \(layer1\.2"):
        recognise_architecture(torchvision_state("resnet18"), arch="torchvision:resnet34")


def test_missing_tensor_names_the_nearest_architecture():
    state = torchvision_state("resnet18")
    del state["layer2.0.conv1.weight"]
    with pytest.raises(ModelError, match=r"nearest is resnet18 .*1 tensors missing \(layer2\.0\.conv1\.weight\)"):
        recognise_architecture(state)


def test_extra_tensor_names_the_nearest_architecture():
    state = torchvision_state("vgg11") | {"classifier.7.weight": torch.empty(2, 9)}
    with pytest.raises(ModelError, match=r"nearest is vgg11 .*1 tensors not expected \(classifier\.7\.weight\)"):
        recognise_architecture(state)


def test_misshaped_tensor_shows_both_shapes():
    state = torchvision_state("resnet18")
    state["layer1.0.conv1.weight"] = torch.empty(64, 63, 3, 3)
    with pytest.raises(ModelError, match=r"layer1\.0\.conv1\.weight \[64, 63, 3, 3\] instead of \[64, 64, 3, 3\]"):
        recognise_architecture(state)


def test_misshaped_tensor_is_named_where_timm_is_not_installed(monkeypatch):
    state = torchvision_state("resnet18")
    state["layer1.0.conv1.weight"] = torch.empty(64, 63, 3, 3)
    monkeypatch.setattr(catalogue, "installed", lambda source: source != "timm")
    with pytest.raises(ModelError, match=r"instead of \[64, 64, 3, 3\].* could be timm's resnet18.* install timm"):
        recognise_architecture(state)


@pytest.mark.parametrize("shape", [(), (5,), (0, 512)])
def test_broken_head_is_refused(shape):
    state = torchvision_state("resnet18")
    state["fc.weight"] = torch.empty(shape)
    with pytest.raises(ModelError, match=r"fit no architecture|nearest"):
        recognise_architecture(state)


@pytest.mark.parametrize("state", [{}, {"a": torch.zeros(3)}, nn.Linear(3, 2).state_dict()])
def test_weights_of_nothing_known_are_refused(state):
    with pytest.raises(ModelError, match=r"fit no architecture of .*wrap_network"):
        recognise_architecture(state)
