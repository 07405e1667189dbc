"""A file of credit-card clients."""

import pytest

from tests.clients import write


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "credit.csv")
