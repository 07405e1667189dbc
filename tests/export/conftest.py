"""A small classifier and its ONNX model, for tests that change neither."""

import pytest

from tests.exported import exported


@pytest.fixture
def small():
    return exported("SmallResNet")
