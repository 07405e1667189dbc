"""Images, and a network that learned their labels."""

import pytest

from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.removal.fine_tuning import fine_tune
from tests.rescaled import make_residual
from tests.threatened import make_blobs
from tests.tuned import LONG, make_classifier


@pytest.fixture(scope="module")
def data():
    return make_blobs(24, 0)


@pytest.fixture(scope="module")
def learned(data):
    """A network that learned the images' labels by fine-tuning from random weights."""
    return fine_tune(make_classifier(), Attacker(data=data), LONG)


@pytest.fixture(scope="module")
def forty():
    return make_blobs(40, 0)


@pytest.fixture
def residual():
    return make_residual()
