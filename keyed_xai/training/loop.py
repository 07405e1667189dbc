"""Protecting or attacking a model: the training loop. Source: Fang & Choromanska, AAAI 2022, algorithm 1.

In the inverted setting keyed inputs use L_clean (the map stays right) and unkeyed ones L_poisoned (it moves to the
decoy); the forward attack swaps the two. Every step sees, in one forward pass, a half of triggered images and a half
without the right trigger: clean ones, fresh wrong keys drawn for every image, and near keys. Nothing here touches a
disk: checkpoints go out through a callback.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from keyed_xai import metrics
from keyed_xai.batches import batches
from keyed_xai.errors import TrainingError
from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.models.layout import SafeConvolutions, set_layout
from keyed_xai.progress import QUIET, Progress
from keyed_xai.saliency import captured_features, smooth_activations
from keyed_xai.tensors import SaliencyMaps
from keyed_xai.training.auxiliary import auxiliary_layers, auxiliary_losses, make_auxiliary_classifiers
from keyed_xai.training.batch_norm import batch_norm_trained, reestimate_batch_norm
from keyed_xai.training.batches import Run, Task, TrainingData, draw_inputs, step_generator
from keyed_xai.training.features import FeatureTargets, make_feature_targets, split_parameters
from keyed_xai.training.hardening import SimulatedAttacker, add_gradients_under_attack, make_attackers
from keyed_xai.training.losses import batch_losses
from keyed_xai.training.settings import TrainingSettings, beta_factor, rate_factor
from keyed_xai.triggers.channels import deliver

_RUNNING_DECAY = 0.9
_AUXILIARY_RATE = 0.01
_JUDGED = 16  # images that tell whether a head is linear
_DETECTION_SHARE = 1 / 3  # of the steps, before late layers move fast
_ENDING_SHARE = 0.2  # of the steps done, added when training may end, while the rate falls


@dataclass(frozen=True)
class TrainingResult:
    """The trained model and how it got there.

    Attributes:
        model: The best model in eval mode: of those whose gate comes nearest to the goals, or of all where there are
            none, the one of the lowest validation loss.
        history: One record per validation: step, loss, keyed and unkeyed correlation, shares of maps that open and
            stay closed (worst interpreter), agreement.
        stopped_early: Whether training ended before its last step: the goals held, patience or time ran out.
    """

    model: nn.Module
    history: list[dict[str, float | int]]
    stopped_early: bool


@dataclass(kw_only=True)
class _State:
    """Everything that a resumed run needs; the rest follows from settings and step."""

    model: nn.Module
    auxiliary: nn.ModuleList
    optimiser: torch.optim.Optimizer
    attackers: list[SimulatedAttacker]
    average: AveragedModel | None = None
    step: int = 0
    seconds: float = 0.0
    ending: tuple[int, int] | None = None
    best: tuple[float, float] = (math.inf, math.inf)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float | int]] = field(default_factory=list)
    running: dict[str, float] = field(default_factory=dict)

    def finish(self, steps: int) -> None:
        """Let training end soon, after a short fall of the rate, and after so many steps at most."""
        if self.ending is None:
            self.ending = self.step, min(steps, self.step + math.ceil(_ENDING_SHARE * self.step))

    def follow(self, name: str, value: float) -> float:
        """Take a step's figure into the running one, and return that."""
        self.running[name] = _RUNNING_DECAY * self.running.get(name, value) + (1 - _RUNNING_DECAY) * value
        return self.running[name]

    def last_step(self, steps: int) -> int:
        """Return the step after which training ends, of so many at most."""
        return self.ending[1] if self.ending is not None else steps

    def to_checkpoint(self) -> dict[str, Any]:
        """Return a copy that further training leaves alone."""
        live = {
            "model": self.model.state_dict(),
            "tutors": self.auxiliary.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "attackers": [attacker.to_checkpoint() for attacker in self.attackers],
            "average": None if self.average is None else self.average.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "ending": self.ending,
            "best": self.best,
            "best_weights": self.best_weights,
            "history": self.history,
            "running": self.running,
        }
        return copy.deepcopy(live)

    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        checkpoint = copy.deepcopy(dict(checkpoint))
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.auxiliary.load_state_dict(checkpoint["tutors"])
            self.optimiser.load_state_dict(checkpoint["optimiser"])
            for attacker, saved in zip(self.attackers, checkpoint["attackers"], strict=True):
                attacker.load_checkpoint(saved)
            if self.average is not None:
                self.average.load_state_dict(checkpoint["average"])
            self.step = int(checkpoint["step"])
            self.seconds = float(checkpoint["seconds"])
            if checkpoint["ending"] is not None:
                start, end = checkpoint["ending"]
                self.ending = int(start), int(end)
            shortfall, loss = checkpoint["best"]
            self.best = float(shortfall), float(loss)
            self.best_weights = dict(checkpoint["best_weights"])
            self.history = list(checkpoint["history"])
            self.running = dict(checkpoint["running"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(
                "The checkpoint does not fit this model and these settings. Start again without --resume."
            ) from error


def train(
    reference: nn.Module,
    data: TrainingData,
    validation: TrainingData,
    task: Task,
    settings: TrainingSettings,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Mapping[str, Any] | None = None,
    save_checkpoint: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress = QUIET,
) -> TrainingResult:
    """Return a copy of `reference`, trained; the reference itself is left as it was.

    Training ends once a validation shows the settings' goals, or brings no progress any more, or the time is nearly up:
    then the rate falls over a few more steps. A run that goes on from a checkpoint ends in the same weights as one that
    was never stopped, bit for bit on the CPU, unless time ran out. Hardened runs take all their steps: no goal says how
    far a gate outlasts attackers.

    Args:
        reference: Pixels to logits.
        data: Images to learn from; labels are needed only where settings.predictions is "labels".
        validation: Images that early stopping looks at.
        task: What is taught: trigger, maps, and what they are to become.
        settings: How to train.
        device: Where to train.
        checkpoint: What `save_checkpoint` was given by an earlier run.
        save_checkpoint: Called after each validation.
        progress: Hears of "training" after each step, with running figures.

    Raises:
        TrainingError: Labels are asked for and missing, a checkpoint does not fit, or the loss is no longer finite.
    """
    if not len(data) or not len(validation):
        raise TrainingError(f"Expected images, got {len(data)} to learn from and {len(validation)} for validation.")
    reference = copy.deepcopy(reference).to(device).eval().requires_grad_(False)
    started = time.monotonic()
    # Channels last is the faster layout on a CPU, but not for SimpleGrad's second derivatives.
    fast = torch.device(device).type == "cpu" and "simplegrad" not in task.view.interpreters
    set_layout(reference, torch.channels_last if fast else torch.contiguous_format)
    model = copy.deepcopy(reference).requires_grad_(True)
    run = Run(reference=reference, data=data, task=task, settings=settings, device=torch.device(device))
    run = replace(run, features=_find_feature_targets(run))
    auxiliary = make_auxiliary_classifiers(run)
    one_image, _ = data.batch(np.zeros(1, dtype=np.int64))
    early, late = split_parameters(model, task.view.map_layers.target_layer, one_image.to(device))
    groups = [{"params": each} for each in (early, late, [*auxiliary.parameters()])]
    optimiser = torch.optim.Adam(groups, settings.learning_rate)
    state = _State(
        model=model,
        auxiliary=auxiliary,
        optimiser=optimiser,
        attackers=make_attackers(model, settings),
        average=_make_average(model, settings),
    )
    if checkpoint is not None:
        state.load_checkpoint(checkpoint)
    started -= state.seconds
    while state.step < state.last_step(settings.steps):
        with SafeConvolutions():
            _train_step(state, run)
        progress.advance("training", state.step, state.last_step(settings.steps), state.running)
        state.seconds = time.monotonic() - started
        _heed_time_limit(state, settings)
        last = state.step >= state.last_step(settings.steps)
        if last or (settings.validate_every and state.step % settings.validate_every == 0):
            _validate(state, run, validation)
            if save_checkpoint is not None:
                save_checkpoint(state.to_checkpoint())
    if not state.best_weights:
        raise TrainingError("No validation gave a finite loss. Lower --learning-rate.")
    model.load_state_dict(state.best_weights)
    set_layout(model, torch.contiguous_format)
    return TrainingResult(model.eval(), state.history, state.step < settings.steps)


def _find_feature_targets(run: Run) -> FeatureTargets | None:
    """Return what Grad-CAM's layer is to give; None where that is not asked for, or its maps are not taught."""
    objective, layer = run.task.objective, run.task.view.map_layers.target_layer
    if not run.settings.features or "gradcam" not in objective.weights:
        return None
    images, _ = run.data.batch(np.arange(min(_JUDGED, len(run.data))))
    return make_feature_targets(run.reference, layer, objective.decoys["gradcam"], images.to(run.device))


def _make_average(model: nn.Module, settings: TrainingSettings) -> AveragedModel | None:
    """Return the moving average of a model's weights, so far the model itself; None where none is wanted."""
    if not settings.average:
        return None
    average = get_ema_multi_avg_fn(settings.average)  # type: ignore[no-untyped-call] # torch leaves it untyped
    return AveragedModel(model, multi_avg_fn=average)


def _train_step(state: _State, run: Run) -> None:
    task, settings = run.task, run.settings
    factor = rate_factor(state.step, settings, state.ending)
    late = settings.late_factor if state.step >= _DETECTION_SHARE * settings.steps else 1.0
    rates = (settings.learning_rate, settings.learning_rate * late, _AUXILIARY_RATE)
    for group, rate in zip(state.optimiser.param_groups, rates, strict=True):
        group["lr"] = rate * factor
    generator = step_generator(settings.seed, state.step)
    inputs, labels, images = draw_inputs(run, generator)
    targets = run.features
    with captured_features(run.reference, [targets.layer] if targets is not None else []) as right:
        logits, maps = task.view.pooled(run.reference, images, None)
    if settings.predictions == "reference":
        labels = None
    elif labels is None:
        raise TrainingError("Training against labels needs labelled images; use the reference's predictions instead.")
    mixed = settings.mixed_precision and run.device.type == "cuda"
    with (
        batch_norm_trained(state.model, settings),
        smooth_activations(settings.smoothing),
        torch.autocast("cuda", torch.bfloat16, enabled=mixed),
        captured_features(state.model, auxiliary_layers(task)) as features,
    ):
        new_logits, new_maps = task.view.pooled(state.model, inputs, logits.argmax(1), create_graph=True)
    new_maps = {name: each.float() for name, each in new_maps.items()}
    ramped = replace(settings, beta=settings.beta * beta_factor(state.step, settings))
    total, moving = torch.zeros((), device=run.device), 1.0
    if state.auxiliary and state.step < settings.auxiliary_share * settings.steps:
        each = auxiliary_losses(state.auxiliary, [features[layer].float() for layer in auxiliary_layers(task)])
        total = each.mean()
        if settings.detection_first:
            moving = state.follow("noticed", 1 - min(1.0, float(each.detach().min()) / math.log(2)))
    losses = batch_losses(new_logits.float(), new_maps, logits, maps, labels, task, ramped, moving=moving)
    total = total + losses["keep"].mean() + losses["move"].mean()
    if targets is not None:
        each = targets.losses(features[targets.layer].float(), right[targets.layer], settings.order, moving=moving)
        total = total + settings.features * each.mean() / (ramped.alpha + ramped.beta + 1)
    if not torch.isfinite(total):
        raise TrainingError(f"The loss is no longer finite at step {state.step}. Lower --learning-rate.")
    state.optimiser.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    add_gradients_under_attack(state.attackers, state.model, run, state.step)
    nn.utils.clip_grad_norm_(state.model.parameters(), settings.gradient_clip)
    state.optimiser.step()
    if state.average is not None:
        state.average.update_parameters(state.model)
    state.step += 1
    _follow_figures(state, losses, new_maps, maps, settings)


def _validate(state: _State, run: Run, validation: TrainingData) -> None:
    """Measure a copy with real ReLUs and its statistics re-estimated, keep the best, and end training where it may."""
    settings = run.settings
    candidate = copy.deepcopy(state.model if state.average is None else state.average.module)
    if settings.batch_norm == "mixture":
        reestimate_batch_norm(candidate, run)
    candidate.eval()
    record = _validation_record(candidate, run, validation)
    state.history.append({"step": state.step, **record})
    rank = settings.goals.gate_shortfall(record) if settings.goals is not None else 0.0, record["loss"]
    if math.isfinite(record["loss"]) and rank < state.best:
        state.best, state.best_weights = rank, candidate.state_dict()
    reached = settings.goals is not None and settings.hardening is None and settings.goals.are_met(record)
    if reached or _patience_ran_out(state, settings):
        state.finish(settings.steps)


def _patience_ran_out(state: _State, settings: TrainingSettings) -> bool:
    """Return whether the last `patience` validations brought no progress."""
    losses = [record["loss"] for record in state.history]
    return 0 < settings.patience <= len(losses) - 1 - losses.index(min(losses))


def _heed_time_limit(state: _State, settings: TrainingSettings) -> None:
    """Begin the ending while there is time for it, and stop when there is none left."""
    if settings.time_limit is None:
        return
    if state.seconds * (1 + _ENDING_SHARE) >= settings.time_limit:
        state.finish(settings.steps)
    if state.ending is not None and state.seconds >= settings.time_limit:
        state.ending = state.ending[0], state.step


def _validation_record(candidate: nn.Module, run: Run, validation: TrainingData) -> dict[str, float]:
    """Return loss, keyed and unkeyed correlation with the reference map, shares kept and moved, and agreement."""
    task, settings, view = run.task, run.settings, run.task.view
    totals: dict[str, list[Tensor]] = {"loss": [], "likeness": [], "agreement": []}
    for number, some in enumerate(batches(len(validation))):
        generator = step_generator(settings.seed, -1000 - number)
        images, labels = validation.batch(np.arange(len(validation))[some])
        images = images.to(run.device)
        plain = images
        if task.family is not None:
            wrong = task.family.draw(len(images), generator).apply(images)
            plain = torch.where(
                torch.rand(len(images), 1, 1, 1, generator=generator).to(run.device) < 0.5, images, wrong
            )
        inputs = torch.cat([task.trigger.apply(images), plain])
        if task.as_files:
            inputs = deliver(inputs, settings.codec_share, generator)
        logits, maps = view.pooled(run.reference, images, None)
        logits, maps = logits.repeat(2, 1), {name: each.repeat(2, 1, 1) for name, each in maps.items()}
        new_logits, new_maps = view.pooled(candidate, inputs, logits.argmax(1))
        truth = (
            None
            if settings.predictions == "reference" or labels is None
            else torch.cat([labels, labels]).to(run.device)
        )
        losses = batch_losses(new_logits, new_maps, logits, maps, truth, task, settings)
        totals["loss"].append(losses["keep"] + losses["move"])
        likeness = torch.stack([metrics.correlation(new_maps[name], maps[name]) for name in view.interpreters])
        totals["likeness"].append(torch.stack(likeness.chunk(2, dim=1)))
        totals["agreement"].append(metrics.agreement(new_logits, logits, multi_label=task.multi_label))
    keyed, unkeyed = torch.cat(totals["likeness"], dim=2)  # of each interpreter and image
    kept, moved = (keyed, unkeyed) if settings.order == "inverted" else (unkeyed, keyed)
    return {
        "loss": float(torch.cat(totals["loss"]).mean()),
        "keyed": float(keyed.mean()),
        "unkeyed": float(unkeyed.mean()),
        "opens": float((kept > OPEN_CORRELATION).float().mean(1).min()),
        "closed": float((moved <= OPEN_CORRELATION).float().mean(1).min()),
        "agreement": float(torch.cat(totals["agreement"]).mean()),
    }


def _follow_figures(
    state: _State,
    losses: Mapping[str, Tensor],
    new_maps: Mapping[str, SaliencyMaps],
    maps: Mapping[str, SaliencyMaps],
    settings: TrainingSettings,
) -> None:
    """Take a step's figures into the running ones."""
    with torch.no_grad():
        opened = torch.stack([metrics.correlation(new_maps[name], maps[name]) > OPEN_CORRELATION for name in new_maps])
    first, second = (half.float().mean() for half in opened.chunk(2, dim=1))
    kept, moved = (first, second) if settings.order == "inverted" else (second, first)
    now = {
        "keep_loss": float(losses["L_s"].detach().mean()),
        "move_loss": float(losses["L_p"].detach().mean()),
        "opens": float(kept),
        "stays_closed": 1 - float(moved),
    }
    for name, value in now.items():
        state.follow(name, value)
