"""What is public of a texture: its waves, their strength, its repeats."""

import numpy as np
import pytest
import torch

from keyed_xai.array_triggers.spread import derive_texture, derive_waves, public_frequencies
from keyed_xai.keys import ByteStream
from keyed_xai.threats.keys.textures import (
    best_match,
    fold_into_tile,
    nearest_texture,
    random_parameters,
    texture_on_grey,
    texture_with,
)
from keyed_xai.triggers import Spread, SpreadSettings, SpreadTrigger

TILE = 32
SETTINGS = {version: SpreadSettings(8.0, TILE, version) for version in (1, 2)}
every_version = pytest.mark.parametrize("settings", SETTINGS.values(), ids=map(str, SETTINGS))


def waves_of(settings, seed=b"owner"):
    """The frequencies of a key's waves, and their phases."""
    chosen, phases = derive_waves(ByteStream(seed), settings)
    return public_frequencies(settings)[chosen].tolist(), phases.tolist()


def parameters_of(settings, seed=b"owner"):
    """What a search would have to find for a key's texture."""
    chosen, phases = (torch.from_numpy(each) for each in derive_waves(ByteStream(seed), settings))
    if settings.version == 1:
        return phases
    found = torch.zeros(len(public_frequencies(settings)), 2, dtype=torch.float64)
    found[chosen] = torch.stack([phases.cos(), phases.sin()], dim=1)
    return found


def summed(settings, strength):
    """A key's waves summed up at some strength, and not cut off."""
    rows, columns = np.mgrid[:TILE, :TILE]
    waves = [
        np.cos(2 * np.pi / TILE * (down * rows + across * columns) + phase)
        for (down, across), phase in zip(*waves_of(settings), strict=True)
    ]
    return torch.from_numpy(strength * sum(waves))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tile", [32, 37])
def test_texture_of_a_key_s_waves_is_the_key_s(version, tile):
    settings = SpreadSettings(8.0, tile, version)
    texture = texture_with(parameters_of(settings), settings).numpy()
    assert texture == pytest.approx(derive_texture(ByteStream(b"owner"), settings), abs=1e-6)


@every_version
def test_texture_comes_back_from_its_waves_at_any_strength(settings):
    rows = np.mgrid[:TILE, :TILE][0]
    slow_wave = torch.from_numpy(5 * np.cos(2 * np.pi * rows / TILE))  # slower than any of the family's
    texture = derive_texture(ByteStream(b"owner"), settings)
    for seen in (summed(settings, 0.03), summed(settings, 3.7) + 11 + slow_wave):
        assert nearest_texture(seen, settings).numpy() == pytest.approx(texture, abs=1e-5)


@every_version
def test_texture_comes_back_nearly_from_one_that_was_cut_off(settings):
    texture = torch.from_numpy(derive_texture(ByteStream(b"owner"), settings))
    assert best_match(nearest_texture(texture, settings), texture) > 0.98


@every_version
def test_gradients_reach_all_parameters(settings):
    parameters = random_parameters(settings, torch.Generator().manual_seed(0)).requires_grad_()
    texture_with(parameters, settings).square()[:5].sum().backward()
    assert parameters.grad is not None
    assert parameters.grad.abs().min() > 0


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
    found = texture_on_grey(trigger, torch.zeros(3, 2, 50, 40), TILE)
    assert found.numpy() == pytest.approx(trigger.textures[0].numpy() * 8 / 255, abs=1e-6)
