"""Fixtures of the tests of models: networks, optimisers, and files of them."""

import pytest
import torch

from keyed_xai.models.networks import SmallResNet
from tests.rescaled import make_residual
from tests.saved import build


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return SmallResNet(1, 3, (4, 8)).eval()


@pytest.fixture
def saved(network, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def plain():
    return build(0)


@pytest.fixture(scope="module")
def average():
    return build(1)


@pytest.fixture(scope="module")
def optimizer(plain):
    """What an optimiser keeps after a step."""
    parameters = [parameter.detach().clone().requires_grad_() for parameter in plain.parameters()]
    adam = torch.optim.Adam(parameters)
    torch.stack([each.sum() for each in parameters]).sum().backward()
    adam.step()
    return adam.state_dict()


@pytest.fixture
def save(tmp_path):
    def write(content, *, legacy=False):
        torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
        return tmp_path / "c.pt"

    return write


@pytest.fixture
def residual():
    return make_residual()
