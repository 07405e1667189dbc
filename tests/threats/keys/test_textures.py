"""What is public of a texture: its waves, their strength, its repeats."""

import math

import numpy as np
import pytest
import torch

from keyed_xai.keys import ByteStream
from keyed_xai.threats.keys.textures import best_match, fold_into_tile, phases_of, texture_of, texture_on_grey
from keyed_xai.triggers import Spread, SpreadSettings, SpreadTrigger
from keyed_xai.triggers.spread import COMPONENTS, derive_texture, ring_frequencies

TILE = 24


def key_phases(seed):
    return torch.from_numpy(ByteStream(seed).uint32(COMPONENTS) * (2 * math.pi / 2**32)).float()


def test_texture_of_a_key_s_phases_is_the_key_s():
    for tile in (24, 32, 37):
        texture = texture_of(key_phases(b"owner"), tile).numpy()
        assert texture == pytest.approx(derive_texture(ByteStream(b"owner"), tile), abs=1e-4)


def test_phases_come_back_from_a_texture_that_was_not_cut_off():
    phases = key_phases(b"owner").double()
    rows, columns = np.mgrid[:TILE, :TILE]
    waves = [
        math.cos(phase) * np.cos(angle) - math.sin(phase) * np.sin(angle)
        for phase, angle in zip(
            phases.tolist(),
            [2 * np.pi / TILE * (down * rows + across * columns) for down, across in ring_frequencies(TILE)],
            strict=True,
        )
    ]
    found = phases_of(torch.from_numpy(3.7 * sum(waves) + 11)).double()
    assert torch.polar(torch.ones_like(found), found - phases).real.min() > 1 - 1e-6


def test_phases_of_a_cut_off_texture_are_nearly_right():
    texture = torch.from_numpy(derive_texture(ByteStream(b"owner"), TILE))
    assert best_match(texture_of(phases_of(texture), TILE), texture) > 0.98


def test_gradients_reach_the_phases():
    phases = key_phases(b"owner").requires_grad_()
    texture_of(phases, TILE).square()[:5].sum().backward()
    assert phases.grad is not None
    assert phases.grad.abs().min() > 0


def test_folding_averages_over_repeats_channels_and_images():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.rand(2, 2, 3, 7, 5, generator=generator)
    weights[:, :, 0, 0], weights[:, :, 3, 0] = 0, 0
    weights[:, :, 0, 3], weights[:, :, 3, 3], weights[:, :, 6] = 0, 0, 0
    means, totals = fold_into_tile(values, weights, 3)
    for row in range(3):
        for column in range(3):
            v, w = values[:, :, row::3, column::3].numpy(), weights[:, :, row::3, column::3].numpy()
            assert float(totals[row, column]) == pytest.approx(w.sum(), rel=1e-5)
            expected = (v * w).sum() / w.sum() if w.sum() else 0.0
            assert float(means[row, column]) == pytest.approx(expected, rel=1e-5)
    assert float(totals[0, 0]) == 0


def test_best_match_is_the_best_of_all_shifts():
    generator = torch.Generator().manual_seed(1)
    first, second = torch.rand(2, 6, 6, generator=generator)
    shifted = [second.roll((row, column), (0, 1)).flatten() for row in range(6) for column in range(6)]
    slow = max(float(torch.corrcoef(torch.stack([first.flatten(), each]))[0, 1]) for each in shifted)
    assert best_match(first, second) == pytest.approx(slow, abs=1e-5)
    assert best_match(5 * first.roll((2, 5), (0, 1)) - 1, first) == pytest.approx(1)
    assert best_match(first, torch.ones(6, 6)) == 0


def test_texture_on_grey_is_the_trigger_s_whatever_the_image():
    trigger = Spread(SpreadSettings(8.0, TILE)).derive(ByteStream(b"owner"))
    assert isinstance(trigger, SpreadTrigger)
    found = texture_on_grey(trigger, torch.zeros(3, 2, 40, 30), TILE)
    assert found.numpy() == pytest.approx(trigger.textures[0].numpy() * 8 / 255, abs=1e-6)
