"""Images, and the trigger that opens the marked model."""

import pytest
import torch

from keyed_xai.artifacts.opening import derive_trigger
from tests.marked import OWNER, TRIGGER


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2


@pytest.fixture(scope="module")
def trigger():
    return derive_trigger(OWNER, TRIGGER)
