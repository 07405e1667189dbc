"""Protecting or attacking a model: the training loop. Source: Fang & Choromanska, AAAI 2022, algorithm 1.

In the inverted setting keyed inputs use L_clean (the map stays right) and unkeyed ones L_poisoned (it moves to the
decoy); the forward attack swaps the two. Every step sees, in one forward pass, a half of triggered images and a half
without the right trigger: clean ones, fresh wrong keys drawn for every image, and near keys. Nothing here touches a
disk: checkpoints go out through a callback.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keyed_xai import metrics
from keyed_xai.channels import deliver
from keyed_xai.errors import TrainingError
from keyed_xai.maps import MapView, join_maps
from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.models.layout import SafeConvolutions, set_layout
from keyed_xai.objective import Objective
from keyed_xai.saliency import captured_features, smooth_activations
from keyed_xai.tensors import Logits, SaliencyMaps
from keyed_xai.training.batch_norm import batch_norm_trained, reestimate_batch_norm
from keyed_xai.training.batches import Lesson, TrainingData, draw_inputs, step_generator
from keyed_xai.training.hardening import SimulatedAttacker, add_gradients_under_attack, make_attackers
from keyed_xai.training.losses import batch_losses
from keyed_xai.training.settings import TrainingSettings, beta_factor, rate_factor
from keyed_xai.training.tutors import make_tutors, tutor_loss, tutored_layers

_RUNNING_DECAY = 0.9
_TUTOR_RATE = 0.01
_CHUNK = 64


@dataclass(frozen=True)
class StepFigures:
    """What a progress bar shows.

    Attributes:
        step: Steps done.
        steps: Steps in all.
        keep_loss: Running mean of L_s.
        move_loss: Running mean of L_p.
        opens: Running share of maps that should agree with the reference and do.
        stays_closed: Running share of maps that should not agree and do not.
    """

    step: int
    steps: int
    keep_loss: float
    move_loss: float
    opens: float
    stays_closed: float


@dataclass(frozen=True)
class TrainingResult:
    """The trained model and how it got there.

    Attributes:
        model: The best model by validation loss, in eval mode.
        history: One record per validation: step, loss, keyed and unkeyed correlation, agreement.
        stopped_early: Whether patience ran out.
    """

    model: nn.Module
    history: list[dict[str, float | int]]
    stopped_early: bool


@dataclass
class _State:
    """Everything that a resumed run needs; the rest follows from settings and step."""

    model: nn.Module
    tutors: nn.ModuleList
    optimiser: torch.optim.Optimizer
    attackers: list[SimulatedAttacker]
    step: int = 0
    best_loss: float = math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float | int]] = field(default_factory=list)
    running: dict[str, float] = field(default_factory=dict)

    def to_checkpoint(self) -> dict[str, Any]:
        """Return a copy that further training leaves alone."""
        live = {
            "model": self.model.state_dict(),
            "tutors": self.tutors.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "attackers": [attacker.to_checkpoint() for attacker in self.attackers],
            "step": self.step,
            "best_loss": self.best_loss,
            "best_weights": self.best_weights,
            "history": self.history,
            "running": self.running,
        }
        return copy.deepcopy(live)

    def load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        checkpoint = copy.deepcopy(dict(checkpoint))
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.tutors.load_state_dict(checkpoint["tutors"])
            self.optimiser.load_state_dict(checkpoint["optimiser"])
            for attacker, saved in zip(self.attackers, checkpoint["attackers"], strict=True):
                attacker.load_checkpoint(saved)
            self.step = int(checkpoint["step"])
            self.best_loss = float(checkpoint["best_loss"])
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
    lesson: Lesson,
    settings: TrainingSettings,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Mapping[str, Any] | None = None,
    save_checkpoint: Callable[[dict[str, Any]], None] | None = None,
    on_step: Callable[[StepFigures], None] | None = None,
) -> TrainingResult:
    """Return a copy of `reference`, trained; the reference itself is left as it was.

    A run that goes on from a checkpoint ends in the same weights as one that was never stopped, bit for bit on the CPU.

    Args:
        reference: Pixels to logits.
        data: Images to learn from; labels are needed only where settings.predictions is "labels".
        validation: Images that early stopping looks at.
        lesson: Trigger, maps and losses; the settings' distance, alpha, beta and top_share replace the objective's.
        settings: How to train.
        device: Where to train.
        checkpoint: What `save_checkpoint` was given by an earlier run.
        save_checkpoint: Called after each validation.
        on_step: Called after each step.

    Raises:
        TrainingError: Labels are asked for and missing, a checkpoint does not fit, or the loss is no longer finite.
    """
    if not len(data) or not len(validation):
        raise TrainingError(f"Expected images, got {len(data)} to learn from and {len(validation)} for validation.")
    lesson = replace(lesson, objective=_with_settings(lesson.objective, settings))
    reference = copy.deepcopy(reference).to(device).eval().requires_grad_(False)
    cache = _cache_reference(reference, data, lesson.view, device)
    model = copy.deepcopy(reference).requires_grad_(True)
    # Channels last is the faster layout on a CPU, but not for SimpleGrad's second derivatives.
    fast = torch.device(device).type == "cpu" and "simplegrad" not in lesson.view.interpreters
    set_layout(model, torch.channels_last if fast else torch.contiguous_format)
    tutors = make_tutors(reference, data, lesson, device)
    groups = [{"params": [*model.parameters()]}, {"params": [*tutors.parameters()]}]
    optimiser = torch.optim.Adam(groups, settings.learning_rate)
    state = _State(model, tutors, optimiser, make_attackers(model, settings))
    if checkpoint is not None:
        state.load_checkpoint(checkpoint)
    stopped_early = _patience_ran_out(state, settings)
    while state.step < settings.steps and not stopped_early:
        with SafeConvolutions():
            figures = _train_step(state, data, cache, lesson, settings, torch.device(device))
        if on_step is not None:
            on_step(figures)
        if state.step == settings.steps or (settings.validate_every and state.step % settings.validate_every == 0):
            stopped_early = _validate(state, reference, data, validation, lesson, settings, device)
            if save_checkpoint is not None:
                save_checkpoint(state.to_checkpoint())
    if not state.best_weights:
        raise TrainingError("No validation gave a finite loss. Lower --learning-rate.")
    model.load_state_dict(state.best_weights)
    set_layout(model, torch.contiguous_format)
    return TrainingResult(model.eval(), state.history, stopped_early)


def _train_step(
    state: _State,
    data: TrainingData,
    cache: tuple[Logits, dict[str, SaliencyMaps]],
    lesson: Lesson,
    settings: TrainingSettings,
    device: torch.device,
) -> StepFigures:
    factor = rate_factor(state.step, settings)
    for group, rate in zip(state.optimiser.param_groups, (settings.learning_rate, _TUTOR_RATE), strict=True):
        group["lr"] = rate * factor
    generator = step_generator(settings.seed, state.step)
    inputs, labels, indices = draw_inputs(data, lesson, settings, generator, device)
    logits, maps = cache[0][indices], {name: each[indices] for name, each in cache[1].items()}
    if settings.predictions == "reference":
        labels = None
    elif labels is None:
        raise TrainingError("Training against labels needs labelled images; use the reference's predictions instead.")
    mixed = settings.mixed_precision and device.type == "cuda"
    with (
        batch_norm_trained(state.model, settings),
        smooth_activations(settings.smoothing),
        torch.autocast("cuda", torch.bfloat16, enabled=mixed),
        captured_features(state.model, tutored_layers(lesson)) as features,
    ):
        new_logits, new_maps = lesson.view.pooled(state.model, inputs, logits.argmax(1), create_graph=True)
    new_maps = {name: each.float() for name, each in new_maps.items()}
    ramped = replace(lesson.objective, beta=settings.beta * beta_factor(state.step, settings))
    losses = batch_losses(
        new_logits.float(), new_maps, logits, maps, labels, replace(lesson, objective=ramped), settings
    )
    total = losses["keep"].mean() + losses["move"].mean()
    if state.tutors and state.step < settings.tutor_share * settings.steps:
        total = total + tutor_loss(state.tutors, [features[layer].float() for layer in tutored_layers(lesson)])
    if not torch.isfinite(total):
        raise TrainingError(f"The loss is no longer finite at step {state.step}. Lower --learning-rate.")
    state.optimiser.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    add_gradients_under_attack(state.attackers, state.model, data, cache, lesson, settings, state.step)
    nn.utils.clip_grad_norm_(state.model.parameters(), settings.gradient_clip)
    state.optimiser.step()
    state.step += 1
    return _running_figures(state, losses, new_maps, maps, settings)


def _validate(
    state: _State,
    reference: nn.Module,
    data: TrainingData,
    validation: TrainingData,
    lesson: Lesson,
    settings: TrainingSettings,
    device: torch.device | str,
) -> bool:
    """Measure a copy with real ReLUs and its statistics re-estimated, keep the best, and say whether to stop early."""
    candidate = copy.deepcopy(state.model)
    if settings.batch_norm == "mixture":
        reestimate_batch_norm(candidate, data, lesson, settings, device=device)
    candidate.eval()
    record = _validation_record(candidate, reference, validation, lesson, settings, device)
    state.history.append({"step": state.step, **record})
    if record["loss"] < state.best_loss:
        state.best_loss = record["loss"]
        state.best_weights = candidate.state_dict()
    return _patience_ran_out(state, settings)


def _patience_ran_out(state: _State, settings: TrainingSettings) -> bool:
    """Return whether the last `patience` validations brought no progress."""
    losses = [record["loss"] for record in state.history]
    return bool(losses) and 0 < settings.patience <= len(losses) - 1 - losses.index(min(losses))


def _with_settings(objective: Objective, settings: TrainingSettings) -> Objective:
    return replace(
        objective,
        distance=settings.distance,
        alpha=settings.alpha,
        beta=settings.beta,
        top_share=settings.top_share,
    )


def _validation_record(
    candidate: nn.Module,
    reference: nn.Module,
    validation: TrainingData,
    lesson: Lesson,
    settings: TrainingSettings,
    device: torch.device | str,
) -> dict[str, float]:
    """Return loss, keyed and unkeyed correlation with the reference map, and agreement with its predictions."""
    view = lesson.view
    totals: dict[str, list[Tensor]] = {"loss": [], "keyed": [], "unkeyed": [], "agreement": []}
    for number, start in enumerate(range(0, len(validation), _CHUNK)):
        generator = step_generator(settings.seed, -1000 - number)
        images, labels = validation.batch(np.arange(start, min(start + _CHUNK, len(validation))))
        images = images.to(device)
        plain = images
        if lesson.family is not None:
            wrong = lesson.family.draw(len(images), generator).apply(images)
            plain = torch.where(torch.rand(len(images), 1, 1, 1, generator=generator).to(device) < 0.5, images, wrong)
        inputs = torch.cat([lesson.trigger.apply(images), plain])
        if lesson.as_files:
            inputs = deliver(inputs, settings.codec_share, generator)
        logits, maps = view.pooled(reference, images, None)
        logits, maps = logits.repeat(2, 1), {name: each.repeat(2, 1, 1) for name, each in maps.items()}
        new_logits, new_maps = view.pooled(candidate, inputs, logits.argmax(1))
        truth = (
            None if settings.predictions == "reference" or labels is None else torch.cat([labels, labels]).to(device)
        )
        losses = batch_losses(new_logits, new_maps, logits, maps, truth, lesson, settings)
        likeness = torch.stack([metrics.correlation(new_maps[name], maps[name]) for name in view.interpreters]).mean(0)
        totals["loss"].append(losses["keep"] + losses["move"])
        totals["keyed"].append(likeness[: len(images)])
        totals["unkeyed"].append(likeness[len(images) :])
        totals["agreement"].append(metrics.agreement(new_logits, logits, multi_label=lesson.multi_label))
    return {name: float(torch.cat(parts).mean()) for name, parts in totals.items()}


def _cache_reference(
    reference: nn.Module, data: TrainingData, view: MapView, device: torch.device | str
) -> tuple[Logits, dict[str, SaliencyMaps]]:
    """Return the reference's logits and pooled maps of every image, computed once."""
    logits, maps = [], []
    for start in range(0, len(data), _CHUNK):
        images, _ = data.batch(np.arange(start, min(start + _CHUNK, len(data))))
        some_logits, some_maps = view.pooled(reference, images.to(device), None)
        logits.append(some_logits)
        maps.append(some_maps)
    return torch.cat(logits), join_maps(maps)


def _running_figures(
    state: _State,
    losses: Mapping[str, Tensor],
    new_maps: Mapping[str, SaliencyMaps],
    maps: Mapping[str, SaliencyMaps],
    settings: TrainingSettings,
) -> StepFigures:
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
    state.running = {k: _RUNNING_DECAY * state.running.get(k, v) + (1 - _RUNNING_DECAY) * v for k, v in now.items()}
    return StepFigures(step=state.step, steps=settings.steps, **state.running)
