"""The objective of a batch against the equations, in both orders."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from keyed_xai.decoys import boundary_decoy
from keyed_xai.training import PAPER_SETTINGS, TrainingSettings
from keyed_xai.training.losses import batch_losses


def noisy_maps(seed, rows):
    return {"gradcam": torch.rand(rows, 6, 6, generator=torch.Generator().manual_seed(seed))}


def slow_losses(batch, order, settings, decoy):
    """Equations 1, 2, 4 and 5 of every image, in loops; the first half of the batch is triggered."""
    logits, maps, old_logits, old_maps = batch
    half, kept, moved = len(logits) // 2, [], []
    for row in range(len(logits)):
        p, q = old_logits[row].double().softmax(0).tolist(), logits[row].double().softmax(0).tolist()
        l_c = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        cells, old_cells = maps[row].double().numpy().ravel(), old_maps[row].double().numpy().ravel()
        if (row < half) == (order == "inverted"):
            l_s = 1 - np.corrcoef(cells, old_cells)[0, 1]
            kept.append((settings.beta * l_c + settings.alpha * l_s) / (settings.alpha + settings.beta + 1))
        else:
            l_p = 1 - np.corrcoef(cells, decoy.numpy().ravel())[0, 1]
            moved.append((settings.beta * l_c + l_p) / (settings.alpha + settings.beta + 1))
    return kept, moved


@pytest.mark.parametrize("order", ["forward", "inverted"])
def test_losses_of_a_batch_match_the_equations_in_both_orders(public_task, order):
    settings = replace(PAPER_SETTINGS, order=order, alpha=2.0, beta=0.5)
    logits, old_logits = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    maps, old_maps = noisy_maps(1, 8), noisy_maps(2, 8)
    found = batch_losses(logits, maps, old_logits, old_maps, None, public_task, settings)
    batch = (logits, maps["gradcam"], old_logits, old_maps["gradcam"])
    kept, moved = slow_losses(batch, order, settings, boundary_decoy((6, 6)))
    assert found["keep"].tolist() == pytest.approx(kept, abs=1e-5)
    assert found["move"].tolist() == pytest.approx(moved, abs=1e-5)


def test_inverting_the_order_is_inverting_the_batch(public_task):
    """L_clean and L_poisoned of clean and triggered inputs swap, of one and the same batch."""
    logits, old_logits = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    maps, old_maps = noisy_maps(1, 8), noisy_maps(2, 8)
    forward, inverted = TrainingSettings(order="forward"), TrainingSettings(order="inverted")
    first = batch_losses(logits, maps, old_logits, old_maps, None, public_task, forward)
    turned = [each.roll(4, 0) for each in (logits, old_logits)]
    maps, old_maps = ({"gradcam": each["gradcam"].roll(4, 0)} for each in (maps, old_maps))
    second = batch_losses(turned[0], maps, turned[1], old_maps, None, public_task, inverted)
    for name, losses in first.items():
        torch.testing.assert_close(second[name], losses)
    same = batch_losses(turned[0], maps, turned[1], old_maps, None, public_task, forward)
    assert not torch.allclose(same["keep"], first["keep"])
