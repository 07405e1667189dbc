"""Simulated attackers: what they do to copies, what it costs the network, and that the gate outlasts a real attack."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.decoys import signature_decoy
from keyed_xai.saliency.pooled import make_view
from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.gate_state import measure_gate_state
from keyed_xai.threats.removal.fine_pruning import mean_activations
from keyed_xai.threats.removal.fine_tuning import FineTuningSettings, fine_tune
from keyed_xai.training import PAPER_SETTINGS, Hardening, Task, train
from keyed_xai.training.batches import Run
from keyed_xai.training.hardening import (
    Attack,
    SimulatedAttacker,
    add_gradients_under_attack,
    batch_norm_of_rows,
    draw_attack,
    make_attackers,
)
from keyed_xai.training.objective import Objective
from keyed_xai.triggers import derive_trigger
from tests.threatened import FAMILY, GRID, OWNER, evidence, make_blobs, protected, reference

TUNING = Attack(rate=0.01, adam=False, frozen=False, noise=0.0, pruned=0.0)
FEW = Hardening(start=0.0, attackers=1, lifetime=3, inner_steps=2, batch_size=8)
SETTINGS = replace(PAPER_SETTINGS, steps=120, batch_size=12, learning_rate=1e-2, warmup_steps=10, validate_every=60,
                            codec_share=0.0)  # fmt: skip


@pytest.fixture(scope="module")
def task():
    view = make_view(reference(), ("gradcam",), GRID)
    objective = Objective(decoys={"gradcam": signature_decoy(OWNER.public, "gradcam", GRID)}, weights={"gradcam": 1.0})
    return Task(trigger=derive_trigger(OWNER, FAMILY), family=FAMILY, view=view, objective=objective)


@pytest.fixture(scope="module")
def data():
    return make_blobs(128, 0, labelled=False)


@pytest.fixture
def run(data, task):
    return Run(reference=reference(), data=data, task=task, settings=SETTINGS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights_of(model):
    return [each.detach().clone() for each in model.parameters()]


def moved(first, second):
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


# Attackers


def test_attacker_fine_tunes_as_a_plain_loop_does(data, run):
    attacker = SimulatedAttacker(0, protected())
    attacker.restart(protected(), TUNING, generator())
    attacker.advance(protected(), run, FEW, generator())
    twin, source = copy.deepcopy(protected()), generator()
    optimiser = torch.optim.SGD(twin.parameters(), 0.01, momentum=0.9)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    for _ in range(FEW.inner_steps):
        rows = torch.randint(len(data), (8,), generator=source)
        torch.rand(8, generator=source), torch.randperm(8, generator=source)
        labels = reference()(data.images[rows]).argmax(1)
        optimiser.zero_grad()
        nn.functional.cross_entropy(twin(data.images[rows]), labels).backward()
        optimiser.step()
    assert moved(weights_of(attacker.model), weights_of(twin)) < 1e-6
    assert moved(weights_of(attacker.model), weights_of(protected())) > 1e-3


def test_attack_goes_on_while_the_network_moves(run):
    network = copy.deepcopy(protected())
    attacker = SimulatedAttacker(0, network)
    attacker.restart(network, replace(TUNING, rate=1e-12), generator())
    attacker.advance(network, run, FEW, generator())
    with torch.no_grad():
        for each in network.parameters():
            each.add_(0.1)
    attacker.advance(network, run, FEW, generator())
    assert moved(weights_of(attacker.model), weights_of(network)) < 1e-6


def test_attack_leaves_the_network_alone(run):
    network = copy.deepcopy(protected())
    before = copy.deepcopy(network.state_dict())
    attacker = SimulatedAttacker(0, network)
    attacker.restart(network, replace(TUNING, adam=True), generator())
    attacker.advance(network, run, FEW, generator())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(each.grad is None for each in network.parameters())


def test_wrong_labels_change_the_attack(run):
    ends = []
    for noise in (0.0, 0.9):
        attacker = SimulatedAttacker(0, protected())
        attacker.restart(protected(), replace(TUNING, noise=noise), generator())
        attacker.advance(protected(), run, FEW, generator())
        ends.append(weights_of(attacker.model))
    assert moved(*ends) > 1e-3


def test_pruning_takes_the_smallest_weights_and_leaves_biases_and_batch_norm(run):
    attacker = SimulatedAttacker(0, protected())
    attacker.restart(protected(), replace(TUNING, pruned=0.4), generator())
    attacker.advance(protected(), run, FEW, generator())
    before, after = (
        torch.cat([each.flatten() for each in weights_of(model) if each.dim() > 1])
        for model in (protected(), attacker.model)
    )
    smallest = sorted(range(len(before)), key=lambda index: abs(float(before[index])))[: int(0.4 * len(before))]
    before[smallest] = 0
    assert torch.equal(after, before)
    pairs = zip(weights_of(protected()), weights_of(attacker.model), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs if old.dim() == 1)


def test_silenced_channels_are_the_least_active_and_stay_silent(data, run):
    settings = replace(SETTINGS, hardening=FEW)
    attacker = make_attackers(protected(), settings)[0]
    attacker.restart(protected(), replace(TUNING, silenced=0.5), generator())
    for seed in range(2):
        attacker.advance(protected(), run, FEW, generator(seed))
    layer, norm = "network.blocks.2.conv2", "network.blocks.2.bn2"
    weights, scale = (attacker.model.get_submodule(name).weight.detach() for name in (layer, norm))
    silent = (weights.flatten(1) == 0).all(1)
    assert silent.sum() == len(silent) // 2
    assert torch.equal(silent, scale == 0)
    activity = mean_activations(protected(), norm, data, np.arange(len(data)), "cpu")
    assert activity[silent].mean() < activity[~silent].mean()
    attacker.restart(protected(), TUNING, generator())
    attacker.advance(protected(), run, FEW, generator())
    assert (attacker.model.get_submodule(layer).weight.detach().flatten(1) != 0).any(1).all()


def test_new_head_is_random_and_the_rest_is_the_network_s():
    attackers = make_attackers(protected(), replace(SETTINGS, hardening=replace(FEW, attackers=2)))
    for seed, attacker in enumerate(attackers):
        attacker.restart(protected(), replace(TUNING, new_head=True), generator(seed))
    heads = [attacker.model.network.fc.weight.detach() for attacker in attackers]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], protected().network.fc.weight.detach())
    assert torch.equal(attackers[0].model.network.stem.weight, protected().network.stem.weight)


def test_gradient_of_a_pruned_weight_is_zero(run):
    hardening = replace(FEW, prune_share=0.999, largest_pruned=0.9)
    network = copy.deepcopy(protected())
    for each in network.parameters():
        each.grad = torch.zeros_like(each)
    next(network.parameters()).grad += 1.0  # the network's own gradient, which bounds the attackers'
    before = [each.grad.clone() for each in network.parameters()]
    attackers = make_attackers(network, replace(SETTINGS, hardening=hardening))
    add_gradients_under_attack(attackers, network, replace(run, settings=replace(SETTINGS, hardening=hardening)), 0)
    added = [each.grad - old for each, old in zip(network.parameters(), before, strict=True)]
    assert attackers[0].attack.pruned > 0
    for weight, gradient in zip(attackers[0].model.parameters(), added, strict=True):
        if weight.dim() > 1:
            assert (gradient[weight == 0].abs() < 1e-7).all()
    assert sum(float(each.abs().sum()) for each in added) > 0


def test_attackers_gradient_is_no_longer_than_the_network_s(run):
    settings = replace(SETTINGS, hardening=replace(FEW, attackers=2, weight=0.5))
    network = copy.deepcopy(protected())
    for each in network.parameters():
        each.grad = torch.full_like(each, 1e-6)
    before = [each.grad.clone() for each in network.parameters()]
    add_gradients_under_attack(make_attackers(network, settings), network, replace(run, settings=settings), 0)
    own = torch.cat([each.flatten() for each in before]).norm()
    theirs = torch.cat([(e.grad - b).flatten() for e, b in zip(network.parameters(), before, strict=True)]).norm()
    assert 0 < theirs <= 0.5 * own * 1.001


def test_attackers_start_again_in_turn(run):
    settings = replace(SETTINGS, hardening=replace(FEW, attackers=2, lifetime=4))
    network = copy.deepcopy(protected())
    attackers, attacks = make_attackers(network, settings), []
    for step in range(8):
        for each in network.parameters():
            each.grad = torch.ones_like(each)
        add_gradients_under_attack(attackers, network, replace(run, settings=settings), step)
        attacks.append([attacker.attack for attacker in attackers])
    changes = [[a != b for a, b in zip(*pair, strict=True)] for pair in zip(attacks, attacks[1:], strict=False)]
    assert changes == [[s % 4 == 0, s % 4 == 2] for s in range(1, 8)]


def test_nothing_happens_before_the_start(run):
    settings = replace(SETTINGS, hardening=replace(FEW, start=0.5))
    attackers = make_attackers(protected(), settings)
    add_gradients_under_attack(attackers, protected(), replace(run, settings=settings), 59)
    assert attackers[0].attack is None


def test_attacks_are_drawn_from_the_settings_ranges():
    settings = Hardening(adam_share=0.5, frozen_share=0.5)
    attacks = [draw_attack(settings, generator(seed)) for seed in range(200)]
    assert all(settings.smallest_rate <= a.rate <= settings.largest_rate for a in attacks)
    assert all(0 <= a.noise <= settings.label_noise and 0 <= a.pruned <= settings.largest_pruned for a in attacks)
    assert not any(a.pruned and (a.silenced or a.new_head) for a in attacks)
    for share, hits in ((0.5, [a.adam for a in attacks]), (0.5, [a.frozen for a in attacks]),
                        (settings.prune_share, [a.pruned > 0 for a in attacks]),
                        (settings.silence_share, [a.silenced > 0 for a in attacks])):  # fmt: skip
        assert abs(np.mean(hits) - share) < 0.12
    assert draw_attack(settings, generator(3)) == draw_attack(settings, generator(3))


# Batch norm


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_all_rows_is_batch_norm_in_training(affine):
    norm = nn.BatchNorm2d(3, affine=affine)
    if affine:
        nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias)
    images = torch.randn(5, 3, 4, 4, generator=generator())
    expected, before = copy.deepcopy(norm).train()(images), copy.deepcopy(norm.state_dict())
    norm.eval()
    with batch_norm_of_rows(norm, slice(None)):
        assert torch.allclose(norm(images), expected, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert not torch.allclose(norm(images), expected, atol=1e-2)


def test_batch_norm_of_rows_knows_no_other_rows():
    norm, images = nn.BatchNorm2d(2), torch.randn(6, 2, 3, 3, generator=generator())
    with batch_norm_of_rows(norm, slice(2, 4)):
        whole = norm(images)
        images[4:] += 5
        assert torch.equal(norm(images)[:4], whole[:4])
    assert abs(float(whole[2:4].detach().mean())) < 1e-6


# In training


def test_hardened_run_goes_on_where_it_stopped(data, task):
    settings = replace(
        SETTINGS, steps=6, validate_every=2, hardening=replace(FEW, attackers=2, adam_share=0.5, silence_share=0.6)
    )
    validation, saved = make_blobs(16, 2, labelled=False), []
    whole = train(reference(), data, validation, task, settings, save_checkpoint=saved.append)
    for checkpoint in saved[:-1]:
        resumed = train(reference(), data, validation, task, settings, checkpoint=checkpoint)
        for (name, first), second in zip(
            whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
        ):
            assert torch.equal(first, second), name


def test_hardened_gate_stays_closed_where_a_plain_one_opens(data, task):
    hardening = Hardening(
        start=0.3, attackers=1, lifetime=16, batch_size=24, prune_share=0.1, silence_share=0.2, new_head_share=0.1
    )
    settings = replace(SETTINGS, steps=200, hardening=hardening)
    hardened = train(reference(), data, make_blobs(16, 2, labelled=False), task, settings).model
    attack = FineTuningSettings(learning_rate=0.01, epochs=3, share=1.0, batch_size=32)
    left = []
    for model in (protected(), hardened):
        attacked = fine_tune(model, Attacker(data=make_blobs(192, 5)), attack).model
        left.append(measure_gate_state(attacked, evidence(), ownership=False).correlation["gradcam"])
    plain, hard = left
    assert hard["unkeyed"] < plain["unkeyed"] - 0.15
    assert hard["keyed"] > 0.8


def test_forward_attacks_are_not_hardened():
    with pytest.raises(ValueError, match="hardening"):
        replace(PAPER_SETTINGS, order="forward", hardening=Hardening())


@pytest.mark.parametrize(("name", "value"), [("attackers", 0), ("start", 1.0), ("largest_rate", 1e-5)])
def test_impossible_hardening_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Hardening(**{name: value})
