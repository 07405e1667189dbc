"""The table of known networks: complete, fresh, and quick to search."""

from importlib.util import find_spec

import pytest
import torch

from keyed_xai.models import Recognised, catalogue, recognise_architecture
from tests.saved import torchvision_state


def test_table_lists_every_torchvision_classifier():
    listed = {name for group in catalogue.name_table()["torchvision"] for name in group.architectures}
    assert listed >= set(catalogue.architectures("torchvision"))


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "squeezenet1_1", "mobilenet_v2", "googlenet", "regnet_x_400mf"])
def test_table_agrees_with_a_fresh_one(name):
    committed = {group.digest: group for group in catalogue.name_table()["torchvision"]}
    for fresh in catalogue.make_name_table("torchvision", [name]):
        assert committed[fresh.digest].tensors == fresh.tensors
        assert name in committed[fresh.digest].architectures


@pytest.mark.skipif(find_spec("efficientnet_lite_pytorch") is None, reason="efficientnet_lite_pytorch is not installed")
@pytest.mark.parametrize("number", [0, 1])
def test_efficientnet_lite_is_recognised(number):
    name = f"efficientnet-lite{number}"
    network = catalogue.build_network("efficientnet_lite_pytorch", name, classes=5, channels=3)
    assert recognise_architecture(network.state_dict()) == Recognised(
        architecture=name, source="efficientnet_lite_pytorch", classes=5, channels=3
    )


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_timm_architecture_is_recognised_after_torchvision():
    network = catalogue.build_network("timm", "resnetv2_50", classes=5, channels=1)
    assert recognise_architecture(network.state_dict()) == Recognised(
        architecture="resnetv2_50", source="timm", classes=5, channels=1
    )
    shared = torchvision_state("resnet18")
    assert recognise_architecture(shared).source == "torchvision"
    assert recognise_architecture(shared, arch="timm:resnet18").source == "timm"


def test_channels_and_image_size_may_be_any():
    state = torchvision_state("resnet18")
    state["conv1.weight"] = torch.empty(64, 1, 7, 7, device="meta")
    assert recognise_architecture(state).channels == 1
    assert recognise_architecture(torchvision_state("vit_b_32", image_size=96)).architecture == "vit_b_32"
