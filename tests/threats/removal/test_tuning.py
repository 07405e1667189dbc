"""What all tuning has in common: its settings, and steps that look for sharp points."""

import math

import pytest
import torch
from torch import nn

from keyed_xai.threats.removal.distillation import DistillationSettings
from keyed_xai.threats.removal.tuning import TuningSettings, _at_sharpest_point


def test_settings_out_of_range_are_refused():
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"epochs": 0}, {"learning_rate": 0.0}, {"sam_radius": -1.0}):
        with pytest.raises(ValueError, match=r"xpected"):
            TuningSettings(**wrong)
    with pytest.raises(ValueError, match="temperature"):
        DistillationSettings(temperature=0.0)


def test_sharpest_point_by_hand():
    """rho w^2 g / |w g|, and weights are put back."""
    w, unused = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([3.0]))
    gradient = torch.tensor([0.5, 1.0])
    norm = math.hypot(1.0 * 0.5, 2.0 * 1.0)
    with _at_sharpest_point([w, unused], [gradient, None], 0.1):
        wanted = [1.0 + 0.1 * 1.0 * 0.5 / norm, -2.0 + 0.1 * 4.0 * 1.0 / norm]
        assert w.tolist() == pytest.approx(wanted)
        assert unused.tolist() == [3.0]
    assert w.tolist() == [1.0, -2.0]
