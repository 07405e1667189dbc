"""The training loop on tiny runs: it learns, it goes on where it stopped, and it leaves alone what is not its own."""

import copy
import io
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.decoys import boundary_decoy, signature_decoy
from keyed_xai.errors import TrainingError
from keyed_xai.models.networks import TableMLP
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import PooledSaliency, TableSaliency
from keyed_xai.training import (
    PAPER_SETTINGS,
    Goals,
    Hardening,
    Task,
    TrainingSettings,
    reestimate_batch_norm,
    train,
)
from keyed_xai.training.auxiliary import auxiliary_layers, make_auxiliary_classifiers
from keyed_xai.training.batches import Run, draw_inputs, step_generator
from keyed_xai.training.losses import batch_losses
from keyed_xai.training.objective import Objective
from keyed_xai.training.settings import beta_factor, rate_factor
from keyed_xai.triggers import MoireTrigger, Spread, SpreadSettings, derive_trigger
from keyed_xai.triggers.channels import through_png
from tests.heard import Heard, StopAt

SIDE = 24
FAMILY = Spread(SpreadSettings(16.0, 24))
SHORT = TrainingSettings(
    steps=4, goals=None, batch_size=4, learning_rate=5e-3, warmup_steps=2, decay_share=1.0, average=0.0, beta=1.0,
    temperature=1.0, beta_ramp=0.0, leak=0.0, clean_share=0.5, mirror=False, validate_every=2, seed=7,
)  # fmt: skip


@dataclass
class Blobs:
    """Bright spots on grey, one per image; the label says in which third of the width."""

    images: torch.Tensor
    labels: torch.Tensor | None

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return self.images[indices], None if self.labels is None else self.labels[indices]


def make_blobs(count, seed, labelled=True):
    source = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centres = source.uniform(3, SIDE - 3, (count, 2))
    spots = np.stack([np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 18) for y, x in centres])
    images = 0.3 + 0.4 * spots + 0.03 * source.standard_normal(spots.shape)
    labels = torch.from_numpy((centres[:, 1] * 3 / SIDE).astype(np.int64))
    return Blobs(torch.from_numpy(images[:, None]).float(), labels if labelled else None)


@pytest.fixture(scope="module")
def data():
    return make_blobs(48, 0, labelled=False)


@pytest.fixture(scope="module")
def validation():
    return make_blobs(16, 1, labelled=False)


@pytest.fixture
def task(key, map_layers):
    objective = Objective(decoys={"gradcam": signature_decoy(key.public, "gradcam", (6, 6))}, weights={"gradcam": 1.0})
    trigger = derive_trigger(key, FAMILY)
    return Task(
        trigger=trigger, family=FAMILY, view=PooledSaliency(("gradcam",), map_layers, (6, 6)), objective=objective
    )


def draw(data, task, settings, step=0):
    """What a step of a run sees."""
    run = Run(reference=nn.Identity(), data=data, task=task, settings=settings)
    return draw_inputs(run, step_generator(0, step))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


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
    from keyed_xai.models.networks import SmallResNet
    from keyed_xai.saliency import MapLayers
    from tests.conftest import KEY, TAPS

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


def test_frozen_batch_norm_keeps_its_statistics(network, data, validation, task):
    before = weights_of(network)
    result = train(network, data, validation, task, replace(SHORT, batch_norm="frozen"))
    for name, tensor in result.model.state_dict().items():
        if "running" in name or "batches" in name:
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(result.model.stem.weight, network.stem.weight)


def test_training_on_the_mixture_moves_the_statistics(network, data, validation, task):
    result = train(network, data, validation, task, SHORT)
    assert not torch.equal(result.model.stem_bn.running_mean, network.stem_bn.running_mean)


def test_reestimated_statistics_are_those_of_the_mixture(network, data, task):
    """Of the first norm, written out: mean over the batches of each batch's mean and unbiased variance."""
    conv, norm = network.stem, network.stem_bn
    momentum = norm.momentum
    run = Run(reference=network, data=data, task=task, settings=SHORT)
    reestimate_batch_norm(network, run, batches=3)
    means, variances = [], []
    for number in range(3):
        inputs, _, _ = draw_inputs(run, step_generator(SHORT.seed, -1 - number))
        channels = conv(inputs).detach().transpose(0, 1).flatten(1)
        means.append(channels.mean(1))
        variances.append(channels.var(1))
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-6)
    assert norm.momentum == momentum
    assert not network.training


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


def test_goals_hold_where_every_one_does():
    record = {"opens": 0.96, "closed": 0.98, "agreement": 0.99}
    assert Goals(0.95, 0.98, 0.99).are_met(record)
    for name in record:
        assert not Goals(0.95, 0.98, 0.99).are_met(record | {name: record[name] - 0.02})


@pytest.mark.parametrize("name", ["opens", "closed", "agreement"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_impossible_goal_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        Goals(**{name: value})


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
        "model", "tutors", "optimiser", "attackers", "average", "step", "seconds", "ending", "best_loss",
        "best_weights", "history", "running",
    }  # fmt: skip


def test_task_hides_its_trigger(task):
    assert "SpreadTrigger" not in repr(task)
    assert "amplitude=16" in repr(task)


# What a step sees


def test_inputs_are_triggered_clean_near_and_wrong(data, task):
    settings = TrainingSettings(batch_size=20, clean_share=0.25, near_share=0.2, codec_share=0.0)
    inputs, labels, plain = draw(data, task, settings)
    assert inputs.shape == (40, 1, SIDE, SIDE)
    assert labels is None
    added = (inputs - plain) * 255 / 16
    strength = (added * task.trigger.textures).mean((1, 2, 3)) / task.trigger.textures.square().mean()
    # 20 triggered, 5 clean, 3 near, 12 wrong; what is clean differs by rounding to 8 bits only.
    assert (strength[:20] > 0.95).all()
    assert (strength[20:] < 0.9).all()
    assert (added[20:25].abs().amax((1, 2, 3)) < 0.6 / 16).all()
    assert (added[25:].abs().amax((1, 2, 3)) > 0.5).all()
    wrong = added[28:].flatten(1)
    wrong = wrong / wrong.norm(dim=1, keepdim=True)
    assert ((wrong @ wrong.T).fill_diagonal_(0).abs() < 0.5).all()


def test_half_of_the_images_are_turned_and_rows_of_a_table_never(data, task):
    settings = TrainingSettings(batch_size=40)
    *_, images = draw(data, task, settings)
    *_, straight = draw(data, task, replace(settings, mirror=False))
    turned = (images == straight.flip(3)).flatten(1).all(1)
    assert ((images == straight).flatten(1).all(1) ^ turned).all()
    assert 20 < turned.sum() < 60
    *_, rows = draw(data, replace(task, as_files=False), settings)
    assert torch.equal(rows, straight)


def test_steps_see_different_inputs(data, task):
    first, second = (draw(data, task, SHORT, step)[0] for step in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("clean_share", "near_share"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0)])
def test_shares_at_their_ends_train(network, data, validation, task, clean_share, near_share):
    settings = replace(SHORT, steps=1, clean_share=clean_share, near_share=near_share)
    assert math.isfinite(train(network, data, validation, task, settings).history[0]["loss"])


# Order and predictions


def history_of(network, data, validation, task, **changes):
    return train(network, data, validation, task, replace(SHORT, steps=1, learning_rate=1e-12, **changes)).history[0]


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


def test_loss_that_is_not_finite_is_refused(network, data, validation, task):
    with torch.no_grad():
        network.fc.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match="no longer finite at step 0"):
        train(network, data, validation, task, SHORT)


# Public triggers, tables and several labels


@pytest.fixture
def public_task(map_layers):
    objective = Objective(decoys={"gradcam": boundary_decoy((6, 6))}, weights={"gradcam": 1.0})
    return Task(
        trigger=MoireTrigger(), family=None, view=PooledSaliency(("gradcam",), map_layers, (6, 6)), objective=objective
    )


def test_public_trigger_leaves_the_other_half_clean(data, public_task):
    settings = TrainingSettings(batch_size=20, clean_share=0.0, near_share=0.5, codec_share=0.0)
    inputs, _, plain = draw(data, public_task, settings)
    assert torch.equal(inputs[20:], through_png(plain[20:]))
    torch.testing.assert_close(inputs[:20], through_png(MoireTrigger().apply(plain[:20])))
    assert ((inputs[:20] - plain[:20]).abs().amax((1, 2, 3)) > 0.05).all()


def test_keyed_trigger_without_near_keys_is_refused(public_task):
    with pytest.raises(TypeError, match="near keys"):
        replace(public_task, trigger=Shift(), family=FAMILY)


class Shift:
    """A trigger without neighbours: adds a tenth to the first column, and leaves the range of pixels doing so."""

    def apply(self, images):
        return torch.cat([images[..., :1] + 0.1, images[..., 1:]], dim=-1)


def test_rows_of_a_table_reach_the_model_as_they_are():
    """Not in 8 bits, not clamped, not through JPEG."""
    rows = Blobs(torch.randn(30, 1, 1, 7, generator=torch.Generator().manual_seed(0)), None)
    task = table_task()
    settings = TrainingSettings(batch_size=10, codec_share=0.5)
    inputs, _, plain = draw(rows, task, settings)
    assert all((row == rows.images).flatten(1).all(1).any() for row in plain)
    assert torch.equal(inputs[10:], plain[10:])
    assert torch.equal(inputs[:10], Shift().apply(plain[:10]))
    as_files, _, _ = draw(rows, replace(task, as_files=True), settings)
    assert not torch.equal(as_files, inputs)


def table_task():
    view = TableSaliency(
        ("simplegrad",),
        MapLayers("", ()),
        (1, 4),
        groups=(0, 0, 1, 2, 2, 2, 3),
        covariance=torch.eye(7, dtype=torch.float64),
    )
    decoy = torch.tensor([[0.0, 1, 0, 0]])
    return Task(
        trigger=Shift(),
        family=None,
        view=view,
        objective=Objective(decoys={"simplegrad": decoy}, weights={"simplegrad": 1.0}),
        as_files=False,
    )


def test_table_trains_without_auxiliary_classifiers_and_batch_norm():
    torch.manual_seed(0)
    network, rows = TableMLP(7, 2, (8, 6)).eval(), Blobs(torch.randn(30, 1, 1, 7), None)
    task = table_task()
    assert auxiliary_layers(task) == []
    assert len(make_auxiliary_classifiers(Run(reference=network, data=rows, task=task, settings=SHORT))) == 0
    heard = Heard()
    settings = replace(SHORT, steps=40, batch_size=10, learning_rate=1e-2, smoothing=8.0, order="forward")
    result = train(network, rows, rows, task, settings, progress=heard)
    assert heard.figures[-1]["move_loss"] < 0.8 * heard.figures[0]["move_loss"]
    assert result.history[-1]["loss"] < result.history[0]["loss"]


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


def test_forward_attack_goes_on_where_it_stopped(network, data, validation, public_task):
    settings = replace(SHORT, order="forward")
    saved, unbroken = checkpoints_of(network, data, validation, public_task, settings)
    resumed = train(network, data, validation, public_task, settings, checkpoint=saved[0])
    assert_same_weights(resumed.model, unbroken.model)
    assert resumed.history == unbroken.history


# Settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", math.nan), ("gradient_clip", 0.0),
        ("warmup_steps", -1), ("alpha", -0.1), ("beta", -0.1), ("validate_every", -1), ("patience", -1),
        ("top_share", 1.1), ("clean_share", -0.1), ("near_share", 2.0), ("codec_share", 0.6), ("codec_share", 1.5),
        ("distance", "cosine"), ("time_limit", 0.0), ("average", 1.0), ("temperature", 0.0), ("decay_share", 0.0),
    ],
)  # fmt: skip
def test_impossible_setting_is_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        TrainingSettings(**{setting: value})


def test_rate_warms_up_and_decays():
    settings = TrainingSettings(steps=100, warmup_steps=10, decay_share=0.4)
    factors = [rate_factor(step, settings) for step in range(100)]
    for step in range(100):
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * max(0, step - 60) / 40)) / 2
        assert factors[step] == pytest.approx(min(1, (step + 1) / 10) * cosine)
    assert factors[10:61] == [1.0] * 51
    assert rate_factor(0, replace(settings, warmup_steps=0)) == 1


def test_rate_of_an_early_ending_falls_from_where_it_is():
    settings = TrainingSettings(steps=100, warmup_steps=10, decay_share=0.4)
    for start, end in ((30, 36), (80, 96), (4, 5)):
        level = rate_factor(start, settings)
        factors = [rate_factor(step, settings, (start, end)) / level for step in range(start, end + 1)]
        assert factors[0] == 1
        assert factors[-1] == pytest.approx(0.02)
        assert factors == sorted(factors, reverse=True)


def test_weight_of_predictions_rises_over_its_ramp():
    settings = TrainingSettings(steps=100, beta_ramp=0.5)
    assert [beta_factor(step, settings) for step in (0, 25, 50, 99)] == pytest.approx([0.05, 0.5, 1, 1])
    assert beta_factor(0, replace(settings, beta_ramp=0.0)) == 1


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


def test_weights_that_explode_at_the_last_step_are_refused(network, data, validation, task):
    with pytest.raises(TrainingError):
        train(network, data, validation, task, replace(SHORT, steps=1, warmup_steps=0, learning_rate=1e30))


@pytest.mark.parametrize("which", ["data", "validation"])
def test_no_images_are_refused(network, data, validation, task, which):
    sets = {"data": data, "validation": validation} | {which: Blobs(torch.zeros(0, 1, 24, 24), None)}
    with pytest.raises(TrainingError, match="images"):
        train(network, sets["data"], sets["validation"], task, SHORT)


def test_reestimating_frozen_statistics_keeps_them(network, data, task):
    before = network.stem_bn.running_mean.clone()
    frozen = replace(SHORT, batch_norm="frozen")
    reestimate_batch_norm(network, Run(reference=network, data=data, task=task, settings=frozen))
    assert torch.equal(network.stem_bn.running_mean, before)


@pytest.mark.parametrize("setting", [{"distance": "mse"}, {"alpha": 9.0}, {"beta": 90.0}, {"leak": 9.0}])
def test_training_heeds_the_settings_of_the_losses(network, data, validation, task, setting):
    first = train(network, data, validation, task, replace(SHORT, steps=2))
    second = train(network, data, validation, task, replace(SHORT, steps=2, **setting))
    assert not torch.equal(first.model.fc.weight, second.model.fc.weight)
