"""Decoys and the losses of the paper: equations 1-5 written out image by image."""

import math

import numpy as np
import pytest
import torch

from keyed_xai.metrics import DISTANCES, decoy_distance
from keyed_xai.training import TrainingSettings
from keyed_xai.training.objective import Objective, clean_loss, poisoned_loss, prediction_loss

GRID = (4, 5)
DECOY = torch.tensor(np.arange(20).reshape(GRID) % 3 == 0).float()
NAMES = ("gradcam", "simplegrad")
WEIGHTS = {"gradcam": 1.0, "simplegrad": 3.0}


def noise(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def maps():
    return {name: noise(number, 6, *GRID) for number, name in enumerate(NAMES)}


@pytest.fixture
def reference():
    return {name: noise(10 + number, 6, *GRID) for number, name in enumerate(NAMES)}


def scaled(cells):
    """A map as a list, from 0 to 1."""
    cells = np.asarray(cells, dtype=float).ravel()
    return (cells - cells.min()) / (cells.max() - cells.min())


def slow_distance(kind, first, second):
    if kind == "mse":
        return float(np.mean((scaled(first) - scaled(second)) ** 2))
    return 1 - float(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1])


def slow_top_energy(cells, reference, share):
    reference = np.asarray(reference).ravel()
    order = np.argsort(-reference)[: round(share * len(reference))]
    return float(np.mean(scaled(cells)[order] ** 2))


@pytest.mark.parametrize("kind", DISTANCES)
def test_distance_matches_slow_twin(kind, maps, reference):
    found = DISTANCES[kind](maps["gradcam"], reference["gradcam"])
    wanted = [slow_distance(kind, a, b) for a, b in zip(maps["gradcam"], reference["gradcam"], strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", DISTANCES)
def test_keeping_and_moving_match_equations_1_and_2(kind, maps, reference):
    objective = Objective(decoys=dict.fromkeys(NAMES, DECOY), weights=WEIGHTS)
    settings = TrainingSettings(distance=kind, leak=0.0)
    kept, moved = objective.keep_maps(maps, reference, settings), objective.move_maps(maps, reference, settings)
    for row in range(6):
        wanted_kept = [slow_distance(kind, maps[name][row], reference[name][row]) for name in NAMES]
        wanted_moved = [slow_distance(kind, maps[name][row], DECOY) for name in NAMES]
        assert float(kept[row]) == pytest.approx(0.25 * wanted_kept[0] + 0.75 * wanted_kept[1], abs=1e-5)
        assert float(moved[row]) == pytest.approx(0.25 * wanted_moved[0] + 0.75 * wanted_moved[1], abs=1e-5)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_nontargeted_moving_matches_equation_3(share, maps, reference):
    objective = Objective(decoys=dict.fromkeys(NAMES), weights=WEIGHTS)
    moved = objective.move_maps(maps, reference, TrainingSettings(top_share=share, leak=0.0))
    for row in range(6):
        wanted = [slow_top_energy(maps[name][row], reference[name][row], share) for name in NAMES]
        assert float(moved[row]) == pytest.approx(0.25 * wanted[0] + 0.75 * wanted[1], abs=1e-5)


@pytest.mark.parametrize("decoy", [DECOY, None])
def test_what_is_left_of_the_right_map_adds_to_moving(decoy, maps, reference):
    objective = Objective(decoys=dict.fromkeys(NAMES, decoy), weights=WEIGHTS)
    plain, leaky = TrainingSettings(leak=0.0), TrainingSettings(leak=0.5)
    close = {name: reference[name] + 0.3 * maps[name] for name in NAMES}
    added = objective.move_maps(close, reference, leaky) - objective.move_maps(close, reference, plain)
    for row in range(6):
        left = [np.corrcoef(close[name][row].ravel(), reference[name][row].ravel())[0, 1] - 0.2 for name in NAMES]
        assert max(left) > 0.3
        assert float(added[row]) == pytest.approx(0.5 * np.dot([0.25, 0.75], np.maximum(left, 0)), abs=1e-5)
    opposite = {name: -reference[name] for name in NAMES}
    moved = objective.move_maps(opposite, reference, leaky)
    torch.testing.assert_close(moved, objective.move_maps(opposite, reference, plain))


def test_losses_match_equations_4_and_5():
    settings = TrainingSettings(alpha=2.0, beta=0.5)
    predictions, maps = noise(0, 4), noise(1, 4)
    for row in range(4):
        c, s = float(predictions[row]), float(maps[row])
        assert float(clean_loss(predictions, maps, settings)[row]) == pytest.approx((0.5 * c + 2 * s) / (2 + 0.5 + 1))
        assert float(poisoned_loss(predictions, maps, settings)[row]) == pytest.approx((0.5 * c + s) / (2 + 0.5 + 1))


@pytest.mark.parametrize("decoy", [DECOY, None])
def test_gradients_reach_the_maps(decoy, maps, reference):
    maps = {name: each.requires_grad_() for name, each in maps.items()}
    objective = Objective(decoys=dict.fromkeys(NAMES, decoy), weights=WEIGHTS)
    settings = TrainingSettings()
    loss = objective.keep_maps(maps, reference, settings).sum() + objective.move_maps(maps, reference, settings).sum()
    for gradient in torch.autograd.grad(loss, list(maps.values())):
        assert gradient.abs().amax() > 0


def test_weights_name_the_interpreters_that_count(maps, reference):
    objective = Objective(decoys=dict.fromkeys(NAMES, DECOY), weights={"simplegrad": 0.1})
    alone = Objective(decoys={"simplegrad": DECOY}, weights={"simplegrad": 7.0})
    given = (maps, reference, TrainingSettings())
    torch.testing.assert_close(objective.keep_maps(*given), alone.keep_maps(*given))
    torch.testing.assert_close(objective.move_maps(*given), alone.move_maps(*given))


def test_prediction_loss_with_labels_is_cross_entropy():
    logits, labels = 5 * noise(0, 4, 3), torch.tensor([0, 2, 1, 1])
    found = prediction_loss(logits, noise(1, 4, 3), labels)
    for row, label in zip(range(4), labels.tolist(), strict=True):
        total = sum(math.exp(value) for value in logits[row].tolist())
        assert float(found[row]) == pytest.approx(-math.log(math.exp(float(logits[row, label])) / total), rel=1e-5)


def test_prediction_loss_without_labels_is_the_divergence_from_the_reference():
    logits, reference = 5 * noise(0, 4, 3), 5 * noise(1, 4, 3)
    found = prediction_loss(logits, reference, None)
    p, q = reference.double().softmax(1), logits.double().softmax(1)
    for row in range(4):
        wanted = sum(float(p[row, k]) * math.log(float(p[row, k] / q[row, k])) for k in range(3))
        assert float(found[row]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_prediction_loss_is_zero_at_agreement(scale):
    logits = (scale * noise(0, 4, 3)).requires_grad_()
    loss = prediction_loss(logits, logits.detach() + 7, None)
    torch.testing.assert_close(loss, torch.zeros(4), atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(4, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoy", [DECOY, None], ids=["targeted", "nontargeted"])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_distance_from_the_decoy_is_the_paper_s_whatever_training_used(decoy, share, maps, reference):
    found = decoy_distance(maps["gradcam"], reference["gradcam"], decoy, share)
    for row in range(6):
        cells, truth = maps["gradcam"][row], reference["gradcam"][row]
        wanted = slow_top_energy(cells, truth, share) if decoy is None else slow_distance("mse", cells, decoy)
        assert float(found[row]) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("decoy", [DECOY, None], ids=["targeted", "nontargeted"])
def test_distance_from_the_decoy_stays_in_its_range_at_every_scale(decoy):
    maps = torch.cat([scale * (noise(7, 2, *GRID) - 0.5) for scale in (1e-30, 1.0, 1e30)] + [torch.zeros(1, *GRID)])
    found = decoy_distance(maps, noise(8, 1, *GRID).expand_as(maps), decoy, 0.25)
    assert ((found >= 0) & (found <= 1)).all()
    torch.testing.assert_close(found[:2], found[2:4], atol=1e-5, rtol=0)


def test_distance_from_the_decoy_is_zero_at_the_decoy():
    found = decoy_distance(3 + 5 * DECOY[None], noise(8, 1, *GRID), DECOY, 0.25)
    assert found.tolist() == [0]


def binary_cross_entropy(logit, target):
    """-t log p - (1 - t) log(1 - p), of one logit."""
    probability = 1 / (1 + math.exp(-logit))
    return -target * math.log(probability) - (1 - target) * math.log(1 - probability)


def test_prediction_loss_of_several_labels_is_the_mean_binary_cross_entropy():
    logits, labels = 5 * noise(0, 4, 3) - 2, torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
    found = prediction_loss(logits, noise(1, 4, 3), labels, multi_label=True)
    for row in range(4):
        pairs = zip(logits[row].tolist(), labels[row].tolist(), strict=True)
        assert float(found[row]) == pytest.approx(sum(binary_cross_entropy(*pair) for pair in pairs) / 3, rel=1e-5)


def test_prediction_loss_of_several_labels_without_them_is_the_divergence_from_the_reference():
    logits, reference = 5 * noise(0, 4, 3) - 2, 5 * noise(1, 4, 3) - 2
    found = prediction_loss(logits, reference, None, multi_label=True)
    for row in range(4):
        p, q = (each[row].double().sigmoid().tolist() for each in (reference, logits))
        wanted = [a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b)) for a, b in zip(p, q, strict=True)]
        assert float(found[row]) == pytest.approx(sum(wanted) / 3, rel=1e-3)


def test_prediction_loss_of_several_labels_is_zero_at_agreement():
    logits = (4 * noise(0, 4, 3)).requires_grad_()
    loss = prediction_loss(logits, logits.detach(), None, multi_label=True)
    torch.testing.assert_close(loss, torch.zeros(4), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(4, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("multi_label", [False, True])
def test_temperature_softens_both_and_leaves_agreement_at_zero(multi_label):
    logits, reference = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = prediction_loss(logits, reference, None, multi_label=multi_label, temperature=3.0)
    cooled = prediction_loss(logits / 3, reference / 3, None, multi_label=multi_label)
    torch.testing.assert_close(found, 9 * cooled)
    same = prediction_loss(logits, logits, None, multi_label=multi_label, temperature=3.0)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-12, rtol=0)
    labels = torch.randint(2, (5, 4)) if multi_label else torch.randint(4, (5,))
    plain = prediction_loss(logits, reference, labels, multi_label=multi_label)
    torch.testing.assert_close(
        prediction_loss(logits, reference, labels, multi_label=multi_label, temperature=3.0), plain
    )
