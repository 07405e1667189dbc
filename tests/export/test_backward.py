"""A program run forwards and backwards: the network's logits, and gradients that agree with finite differences."""

import torch
from torch import nn

from tests.exported import (
    Both,
    classifier_of,
    images_of,
)


def test_logits_are_those_of_the_network(every):
    torch.testing.assert_close(every.values[every.program.logits], every.logits.detach(), rtol=1e-5, atol=1e-5)


def test_gradient_agrees_with_finite_differences():
    smooth = {"smooth": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Tanh())}
    images = images_of()
    both = Both(classifier_of(smooth), images)
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    slope = (both.gradients()[0] * direction).sum()
    with torch.no_grad():
        runs = [both.backward.run(images + step * direction) for step in (1e-6, -1e-6)]
    up, down = ((run[both.program.logits] @ torch.tensor([1.0, -2.0, 0.5]).double()).sum() for run in runs)
    torch.testing.assert_close(slope, (up - down) / 2e-6, rtol=1e-6, atol=1e-8)
