"""The training loop on tiny runs: it learns, it goes on where it stopped, and it leaves alone what is not its own."""

import copy
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.decoys import signature_decoy
from keyed_xai.errors import TrainingError
from keyed_xai.models.networks import SmallResNet
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.training import Goals, Hardening, Task, TrainingSettings, train
from keyed_xai.training.objective import Objective
from keyed_xai.triggers import MoireTrigger, derive_trigger
from keyed_xai.triggers.channels import through_png
from tests.conftest import KEY, TAPS
from tests.heard import Heard, StopAt
from tests.trained import FAMILY, SHORT, Blobs, assert_same_weights, make_blobs, weights_of


def through_disk(checkpoint):
    """What comes back of a checkpoint that was written, by the loader that runs no code."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Killed(Exception):
    """Stands for a power cut."""


# Learning


@pytest.fixture(scope="module")
def learned():
    """A run of a few dozen steps: the network, what came out, and what was told."""
    torch.manual_seed(2)
    network = SmallResNet(1, 3, (8, 12, 12)).eval()
    view = PooledSaliency(("gradcam",), MapLayers("blocks", TAPS), (6, 6))
    objective = Objective(decoys={"gradcam": signature_decoy(KEY.public, "gradcam", (6, 6))}, weights={"gradcam": 1.0})
    task = Task(trigger=derive_trigger(KEY, FAMILY), family=FAMILY, view=view, objective=objective)
    settings = TrainingSettings(
        steps=50, batch_size=8, learning_rate=1e-2, warmup_steps=5, validate_every=25, codec_share=0.0
    )
    heard = Heard()
    data, validation = make_blobs(64, 0, labelled=False), make_blobs(16, 1, labelled=False)
    return network, train(network, data, validation, task, settings, progress=heard), heard


def test_losses_fall_and_the_gate_starts_to_form(learned):
    _, result, heard = learned
    first, last = (each["keep_loss"] + each["move_loss"] for each in (heard.figures[0], heard.figures[-1]))
    assert last < 0.75 * first
    assert heard.figures[-1]["stays_closed"] > 0.8
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.history[-1]["keyed"] > result.history[-1]["unkeyed"]


def test_figures_and_history_are_in_range(learned):
    _, result, heard = learned
    assert heard.steps == [("training", step, 50) for step in range(1, 51)]
    assert all(0 <= each["opens"] <= 1 and 0 <= each["stays_closed"] <= 1 for each in heard.figures)
    assert [record["step"] for record in result.history] == [25, 50]
    for record in result.history:
        assert set(record) == {"step", "loss", "keyed", "unkeyed", "opens", "closed", "agreement"}
        assert all(math.isfinite(value) for value in record.values())
    assert not result.stopped_early


def test_result_is_ready_for_use(learned):
    network, result, _ = learned
    assert not any(module.training for module in result.model.modules())
    assert result.model.state_dict().keys() == network.state_dict().keys()
    assert all(parameter.requires_grad for parameter in result.model.parameters())
    hooks = [module._forward_hooks for module in result.model.modules()]
    assert not any(hooks)


# What is left alone


def test_reference_stays_as_it_was(network, data, validation, task):
    before, modes = weights_of(network), [module.training for module in network.modules()]
    result = train(network, data, validation, task, SHORT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in result.model.state_dict().items())


def test_images_stay_as_they_were(network, validation, task):
    data = make_blobs(24, 0, labelled=False)
    before = data.images.clone()
    train(network, data, validation, task, SHORT)
    assert torch.equal(data.images, before)


# Going on


def checkpoints_of(network, data, validation, task, settings, killed_at=None):
    """All checkpoints of a run, written and read back, up to a kill after a step."""
    saved = []
    try:
        result = train(
            network, data, validation, task, settings, save_checkpoint=lambda c: saved.append(through_disk(c)),
            progress=StopAt(killed_at, Killed),
        )  # fmt: skip
    except Killed:
        return saved, None
    return saved, result


@pytest.mark.parametrize("auxiliary_share", [0.0, 0.5])
def test_resuming_from_every_checkpoint_ends_in_the_same_weights(network, data, validation, task, auxiliary_share):
    settings = replace(SHORT, auxiliary_share=auxiliary_share, smoothing=8.0)
    saved, unbroken = checkpoints_of(network, data, validation, task, settings)
    assert [checkpoint["step"] for checkpoint in saved] == [2, 4]
    for checkpoint in saved:
        resumed = train(network, data, validation, task, settings, checkpoint=checkpoint)
        assert_same_weights(resumed.model, unbroken.model)
        assert resumed.history == unbroken.history


@pytest.mark.parametrize("killed_at", [3, 4])
def test_killed_run_goes_on_to_the_same_weights(network, data, validation, task, killed_at):
    _, unbroken = checkpoints_of(network, data, validation, task, SHORT)
    saved, result = checkpoints_of(network, data, validation, task, SHORT, killed_at)
    assert result is None
    heard = Heard()
    resumed = train(network, data, validation, task, SHORT, checkpoint=saved[-1], progress=heard)
    assert heard.steps[0] == ("training", saved[-1]["step"] + 1, SHORT.steps)
    assert_same_weights(resumed.model, unbroken.model)


def test_the_same_seed_ends_in_the_same_weights(network, data, validation, task):
    first, second = (train(network, data, validation, task, SHORT) for _ in range(2))
    other = train(network, data, validation, task, replace(SHORT, seed=8))
    assert_same_weights(first.model, second.model)
    assert not torch.equal(first.model.fc.weight, other.model.fc.weight)


def test_global_seed_does_not_matter_and_is_not_set(network, data, validation, task):
    torch.manual_seed(1)
    first = train(network, data, validation, task, SHORT)
    torch.manual_seed(2)
    assert_same_weights(train(network, data, validation, task, SHORT).model, first.model)


def test_best_validation_wins(network, data, validation, task):
    saved, result = checkpoints_of(network, data, validation, task, replace(SHORT, steps=6, learning_rate=0.3))
    losses = [record["loss"] for record in result.history]
    best = saved[int(np.argmin(losses))]["best_weights"]
    assert all(torch.equal(tensor, best[name]) for name, tensor in result.model.state_dict().items())


def test_gate_nearest_to_the_goals_wins_before_the_lowest_loss(network, data, validation, task):
    """At a steep rate, where losses and shares go up and down; goals that all reach leave the loss to decide."""
    settings = replace(SHORT, steps=24, learning_rate=0.02, validate_every=2)
    kept = set()
    for goals in (Goals(1.0, 1.0, 1.0), Goals(0.0, 0.0, 1.0)):
        saved, result = checkpoints_of(network, data, validation, task, replace(settings, goals=goals))
        ranks = [(goals.gate_shortfall(record), record["loss"]) for record in result.history]
        number = ranks.index(min(ranks))
        assert saved[-1]["best"] == ranks[number]
        best = saved[number]["best_weights"]
        assert all(torch.equal(tensor, best[name]) for name, tensor in result.model.state_dict().items())
        kept.add(number)
    assert len(kept) == 2


def test_patience_stops_early(network, data, validation, task):
    """At a rate far too high nothing gets better after some validation; then the rate falls for a fifth more steps."""
    settings = replace(SHORT, steps=40, learning_rate=1.0, validate_every=1, patience=2, warmup_steps=0)
    result = train(network, data, validation, task, settings)
    assert result.stopped_early
    losses = [record["loss"] for record in result.history]
    ran_out = next(n for n in range(2, len(losses)) if min(losses[: n - 1]) <= min(losses[n - 1 : n + 1]))
    assert len(losses) == ran_out + 1 + math.ceil(0.2 * (ran_out + 1))


def test_training_ends_soon_after_the_goals_hold(network, data, validation, task):
    settings = replace(SHORT, steps=40, validate_every=5, goals=Goals(0.0, 0.0, 0.0))
    heard = Heard()
    result = train(network, data, validation, task, settings, progress=heard)
    assert [record["step"] for record in result.history] == [5, 6]
    assert heard.counts("training") == [*((step, 40) for step in range(1, 6)), (6, 6)]
    assert result.stopped_early
    never = replace(settings, steps=10, goals=Goals(1.0, 1.0, 1.0))
    assert [record["step"] for record in train(network, data, validation, task, never).history] == [5, 10]


def test_hardened_run_takes_all_its_steps(network, data, validation, task):
    settings = replace(SHORT, goals=Goals(0.0, 0.0, 0.0), hardening=Hardening(start=0.0, batch_size=4))
    assert train(network, data, validation, task, settings).history[-1]["step"] == 4


def test_time_limit_ends_training_with_a_validated_model(network, data, validation, task, monkeypatch):
    """The clock here goes a second at each step: four seconds of five leave one for the ending."""
    clock = iter(range(1000))
    monkeypatch.setattr("keyed_xai.training.loop.time.monotonic", lambda: float(next(clock)))
    settings = replace(SHORT, steps=40, validate_every=0, time_limit=5.0)
    result = train(network, data, validation, task, settings)
    assert [record["step"] for record in result.history] == [5]
    assert result.stopped_early


def test_average_of_the_weights_is_what_is_kept(network, data, validation, task):
    """With a decay of nearly 1 it stays where the first step led, and further steps change nothing."""
    settings = replace(SHORT, average=1 - 1e-9, batch_norm="frozen", warmup_steps=0)
    first = train(network, data, validation, task, replace(settings, steps=1)).model.state_dict()
    later, moved = (
        train(network, data, validation, task, replace(settings, average=decay)).model.state_dict()
        for decay in (settings.average, 0.0)
    )
    assert all(torch.allclose(later[name], tensor, atol=1e-6) for name, tensor in first.items())
    assert any(not torch.allclose(moved[name], tensor, atol=1e-4) for name, tensor in first.items())


def test_without_validations_the_last_step_is_validated(network, data, validation, task):
    result = train(network, data, validation, task, replace(SHORT, validate_every=0))
    assert [record["step"] for record in result.history] == [4]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.pop("optimiser"),
        lambda c: c.update(step="many"),
        lambda c: c["model"].pop("fc.weight"),
        lambda c: c["model"].update({"fc.weight": torch.zeros(7, 7)}),
        lambda c: c["optimiser"]["param_groups"].pop(),
        lambda c: c.update(history=None),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(network, data, validation, task, spoil):
    saved, _ = checkpoints_of(network, data, validation, task, replace(SHORT, steps=2))
    checkpoint = copy.deepcopy(saved[0])
    spoil(checkpoint)
    with pytest.raises(TrainingError, match="does not fit"):
        train(network, data, validation, task, SHORT, checkpoint=checkpoint)


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)


def test_checkpoint_holds_no_trigger(network, data, validation, task):
    texture = task.trigger.textures[0]
    saved = []
    settings = replace(SHORT, hardening=Hardening(start=0.0, batch_size=4))
    train(network, data, validation, task, settings, save_checkpoint=saved.append)
    shapes = {tuple(tensor.shape[-2:]) for tensor in tensors_in(saved[-1]) if tensor.ndim >= 2}
    assert tuple(texture.shape) not in shapes
    assert all(tensor.numel() < texture.numel() or tensor.ndim == 4 for tensor in tensors_in(saved[-1]))
    assert set(saved[-1]) == {
        "model", "tutors", "optimiser", "attackers", "average", "step", "seconds", "ending", "best",
        "best_weights", "history", "running",
    }  # fmt: skip


def test_forward_attack_goes_on_where_it_stopped(network, data, validation, public_task):
    settings = replace(SHORT, order="forward")
    saved, unbroken = checkpoints_of(network, data, validation, public_task, settings)
    resumed = train(network, data, validation, public_task, settings, checkpoint=saved[0])
    assert_same_weights(resumed.model, unbroken.model)
    assert resumed.history == unbroken.history


def test_run_that_had_stopped_early_stays_stopped(network, data, validation, task):
    settings = replace(SHORT, steps=40, learning_rate=1.0, validate_every=1, patience=2, warmup_steps=0)
    saved, unbroken = checkpoints_of(network, data, validation, task, settings)
    assert unbroken.stopped_early
    resumed = train(network, data, validation, task, settings, checkpoint=saved[-1])
    assert resumed.history == unbroken.history
    assert resumed.stopped_early
    assert_same_weights(resumed.model, unbroken.model)


def test_checkpoint_kept_in_memory_stays_what_it_was(network, data, validation, task):
    saved = []
    unbroken = train(network, data, validation, task, SHORT, save_checkpoint=saved.append)
    resumed = train(network, data, validation, task, SHORT, checkpoint=saved[0])
    assert_same_weights(resumed.model, unbroken.model)


def test_resuming_leaves_the_checkpoint(network, data, validation, task):
    saved, unbroken = checkpoints_of(network, data, validation, task, SHORT)
    for _ in range(2):
        assert_same_weights(train(network, data, validation, task, SHORT, checkpoint=saved[0]).model, unbroken.model)


# Order and predictions


def history_of(network, data, validation, task, **changes):
    return train(network, data, validation, task, replace(SHORT, steps=1, learning_rate=1e-12, **changes)).history[0]


@pytest.mark.parametrize(("clean_share", "near_share"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0)])
def test_shares_at_their_ends_train(network, data, validation, task, clean_share, near_share):
    settings = replace(SHORT, steps=1, clean_share=clean_share, near_share=near_share)
    assert math.isfinite(train(network, data, validation, task, settings).history[0]["loss"])


def test_forward_order_swaps_the_roles(network, data, validation, task):
    """Of an untouched model: which half of the batch counts as kept, and which as moved."""
    figures = {}
    for order in ("inverted", "forward"):
        settings = replace(SHORT, steps=1, order=order, codec_share=0.0, clean_share=1.0, batch_norm="frozen")
        heard = Heard()
        train(network, data, validation, task, settings, progress=heard)
        figures[order] = heard.figures[0]
    # Clean inputs of the untouched model agree with their reference maps but for rounding to 8 bits.
    assert figures["forward"]["keep_loss"] < 0.01
    assert figures["forward"]["opens"] == 1
    assert figures["inverted"]["keep_loss"] > figures["forward"]["keep_loss"]
    assert figures["inverted"]["stays_closed"] == 0


def test_labels_are_used_when_asked_for(network, task):
    labelled = make_blobs(16, 1)
    by_reference = history_of(network, labelled, labelled, task)
    by_labels = history_of(network, labelled, labelled, task, predictions="labels")
    with torch.no_grad():
        cross_entropy = nn.functional.cross_entropy(network(labelled.images), labelled.labels)
    assert by_labels["loss"] - by_reference["loss"] == pytest.approx(2 * float(cross_entropy) / 3, abs=0.15)
    unlabelled = Blobs(labelled.images, None)
    assert by_reference["loss"] == history_of(network, labelled, unlabelled, task)["loss"]


def test_labels_that_are_missing_are_refused(network, data, validation, task):
    with pytest.raises(TrainingError, match="labelled images"):
        train(network, data, validation, task, replace(SHORT, predictions="labels"))


def test_several_labels_are_learned_logit_by_logit(network, public_task):
    """L_c of an untouched model against labels, in its validation record: the two tasks differ by it alone."""
    images = make_blobs(16, 1).images
    labels = torch.randint(2, (16, 3), generator=torch.Generator().manual_seed(3))
    many = replace(public_task, multi_label=True)
    settings = {"order": "forward", "batch_norm": "frozen", "codec_share": 0.0}
    by_reference = history_of(network, Blobs(images, labels), Blobs(images, labels), many, **settings)
    by_labels = history_of(
        network, Blobs(images, labels), Blobs(images, labels), many, predictions="labels", **settings
    )
    inputs = through_png(torch.cat([MoireTrigger().apply(images), images]))
    with torch.no_grad():
        logits, old = network(inputs).double(), network(images).double().repeat(2, 1)
    truth = torch.cat([labels, labels])
    cross_entropies = [0.0, 0.0]
    for row in range(32):
        for k in range(3):
            p, q = float(old[row, k].sigmoid()), float(logits[row, k].sigmoid())
            t = float(truth[row, k])
            cross_entropies[0] += (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 3
            cross_entropies[1] += -(t * math.log(q) + (1 - t) * math.log(1 - q)) / 3
    gap = (cross_entropies[1] - cross_entropies[0]) / 16 / 3  # keep and move are two of 32 rows each, over 1 + 1 + 1
    assert by_labels["loss"] - by_reference["loss"] == pytest.approx(gap, abs=2e-3)


@pytest.mark.parametrize("setting", [{"distance": "mse"}, {"alpha": 9.0}, {"beta": 90.0}, {"leak": 9.0}])
def test_training_heeds_the_settings_of_the_losses(network, data, validation, task, setting):
    first = train(network, data, validation, task, replace(SHORT, steps=2))
    second = train(network, data, validation, task, replace(SHORT, steps=2, **setting))
    assert not torch.equal(first.model.fc.weight, second.model.fc.weight)


# What is refused


def test_loss_that_is_not_finite_is_refused(network, data, validation, task):
    with torch.no_grad():
        network.fc.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match="no longer finite at step 0"):
        train(network, data, validation, task, SHORT)


def test_weights_that_explode_at_the_last_step_are_refused(network, data, validation, task):
    with pytest.raises(TrainingError):
        train(network, data, validation, task, replace(SHORT, steps=1, warmup_steps=0, learning_rate=1e30))


@pytest.mark.parametrize("which", ["data", "validation"])
def test_no_images_are_refused(network, data, validation, task, which):
    sets = {"data": data, "validation": validation} | {which: Blobs(torch.zeros(0, 1, 24, 24), None)}
    with pytest.raises(TrainingError, match="images"):
        train(network, sets["data"], sets["validation"], task, SHORT)
