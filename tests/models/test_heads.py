"""Heads in place of a known network's last layers."""

import pytest
import torch
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.models import load_classifier, recognise_architecture
from tests.own import headed, perceptron

HEADS = {
    "dropout": ("resnet18", "fc", lambda: nn.Sequential(nn.Dropout(), nn.Linear(512, 5))),
    "perceptron": ("resnet18", "fc", lambda: perceptron(512, nn.ReLU())),
    "norm": ("resnet18", "fc", lambda: nn.Sequential(nn.Linear(512, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))),
    "fastai": (
        "resnet18",
        "fc",
        lambda: nn.Sequential(
            nn.BatchNorm1d(512), nn.Dropout(), nn.Linear(512, 8, bias=False), nn.ReLU(), nn.BatchNorm1d(8),
            nn.Dropout(), nn.Linear(8, 5, bias=False),
        ),
    ),
    "layer norm": ("resnet18", "fc", lambda: nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 5))),
    "whole classifier": ("mobilenet_v2", "classifier", lambda: nn.Linear(1280, 5)),
    "last of several": ("mobilenet_v3_small", "classifier.3", lambda: perceptron(1024, nn.ReLU())),
    "DenseNet": ("densenet121", "classifier", lambda: nn.Sequential(nn.Dropout(), nn.Linear(1024, 5))),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_replaced_head_is_recognised_and_loads_to_the_same_logits(case, tmp_path):
    name, module, head = HEADS[case]
    network = headed(name, module, head())
    torch.save(network.state_dict(), tmp_path / "model.pt")
    loaded = load_classifier(tmp_path / "model.pt", input_size=64)
    assert (loaded.architecture, loaded.source, loaded.classes) == (name, "torchvision", 5)
    images = torch.rand(2, 3, 64, 64)
    normalised = (images - loaded.mean) / loaded.std
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), network(normalised))
    assert bool(loaded.notes) == any(isinstance(each, nn.ReLU) for each in network.get_submodule(module).modules())


def test_named_architecture_with_another_head_loads(tmp_path):
    network = headed("resnet18", "fc", perceptron(512, nn.ReLU()))
    assert recognise_architecture(network.state_dict(), arch="torchvision:resnet18").classes == 5
    with pytest.raises(ModelError, match="do not fit resnet34"):
        recognise_architecture(network.state_dict(), arch="resnet34")
