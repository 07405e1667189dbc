"""The filter moire: a slow twin of its lines, exact gradients, and how often keys collide."""

import math

import numpy as np
import torch

from keyed_xai.triggers import Moire, MoireTrigger
from keyed_xai.triggers.moire import draw_lines
from tests.triggered import generator


def slow_lines(parameters, height, width, offset):
    f1, a1, p1, f2, a2, p2, amplitude, wavelength, _ = parameters
    pattern = np.zeros((height, width))
    for row, column in np.ndindex(height, width):
        r, c = row - offset[0], column - offset[1]
        x = c + amplitude * math.sin(2 * math.pi * r / wavelength)
        y = r + amplitude * math.sin(2 * math.pi * c / wavelength)
        both = 1.0
        for frequency, angle, phase in ((f1, a1, p1), (f2, a2, p2)):
            along = x * math.cos(angle) + y * math.sin(angle)
            both *= 0.5 + 0.5 * math.cos(2 * math.pi * frequency * along + phase)
        pattern[row, column] = both
    return pattern


def test_moire_blends_in_the_lines_of_its_slow_twin():
    trigger = Moire().draw(2, generator()).shifted(3, -5)
    images = torch.rand(2, 3, 12, 17, generator=generator())
    found = trigger.apply(images)
    for number, parameters in enumerate(trigger.parameters.tolist()):
        lines = slow_lines(parameters, 12, 17, (3, -5))
        expected = (1 - parameters[8]) * images[number].numpy() + parameters[8] * lines
        np.testing.assert_allclose(found[number].numpy(), expected, atol=1e-5)


def test_shifted_moire_moves_down_and_right():
    trigger = MoireTrigger()
    lines = draw_lines(trigger.parameters, 40, 40)
    moved = draw_lines(trigger.parameters, 40, 40, offset=trigger.shifted(1, 2).shifted(1, 3).offset)
    torch.testing.assert_close(moved[:, 2:, 5:], lines[:, :-2, :-5])


def test_scaled_moire_changes_the_opacity_only():
    images = torch.rand(1, 3, 20, 20, generator=generator())
    trigger = MoireTrigger()
    half, full = (each.apply(images) - images for each in (trigger.scaled(0.5), trigger))
    torch.testing.assert_close(half, full / 2)
    assert trigger.scaled(20.0).apply(images).amin() >= 0


def test_moire_gradients_are_exact():
    images = torch.rand(2, 1, 4, 5, dtype=torch.float64, generator=generator()).requires_grad_()
    assert torch.autograd.gradcheck(MoireTrigger().apply, images)


def test_moire_keys_collide_as_rarely_as_stated():
    lines = draw_lines(Moire().draw(500, generator()).parameters.float(), 64, 64)
    lines = lines - lines.mean((1, 2), keepdim=True)
    spectra = torch.fft.rfft2(lines / lines.flatten(1).norm(dim=1)[:, None, None])
    collisions = pairs = 0
    for number in range(40):
        best = torch.fft.irfft2(spectra[number] * spectra[number + 1 :].conj()).flatten(1).amax(1)
        collisions, pairs = collisions + int((best > 0.5).sum()), pairs + len(best)
    # 19,000 pairs: 9 collisions expected at the stated rate; 25 have probability under 1e-4.
    assert collisions < 25
    assert pairs * 2**-Moire.key_bits > 8
