"""A small classifier and its ONNX model, for tests that change neither."""

import pytest

from tests.exported import (
    LAYERS,
    Both,
    classifier_of,
    exported,
    images_of,
)


@pytest.fixture
def small():
    return exported("SmallResNet")


@pytest.fixture(scope="module")
def every():
    """All layers, traced once: tracing takes longer than all gradients."""
    return Both(classifier_of(LAYERS), images_of())
