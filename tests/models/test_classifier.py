"""The classifier around a network: its input, and the logits among what it returns."""

import pytest
import torch
import torchvision

from keyed_xai.models import (
    InputSpec,
)
from keyed_xai.models.classifier import logits_of


def test_logits_are_found_among_auxiliary_outputs():
    logits = torch.zeros(2, 3)
    assert logits_of(torchvision.models.inception.InceptionOutputs(logits, torch.ones(2, 3))) is logits
    assert logits_of([logits, None]) is logits
    with pytest.raises(TypeError, match="returned dict"):
        logits_of({})


@pytest.mark.parametrize("changes", [{"height": 0}, {"mean": (0.5, 0.5)}, {"std": (-1.0,)}, {"mean": (float("nan"),)}])
def test_input_spec_checks_its_numbers(changes):
    values = {"channels": 1, "height": 8, "width": 8, "mean": (0.5,), "std": (0.5,)} | changes
    with pytest.raises(ValueError, match="must"):
        InputSpec(**values)
