"""The classes that the fixture of images is explained for."""

import pytest
import torch


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 2, 1, 0])
