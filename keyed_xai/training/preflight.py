"""What a run is about to do, said before it starts: model, maps, data, settings, and what it will cost."""

import copy
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from keyed_xai.artifacts.documents import printable
from keyed_xai.data import ImageData, TableData
from keyed_xai.data.splits import Subset
from keyed_xai.memory import peak_memory
from keyed_xai.models import Classifier, InputSpec
from keyed_xai.progress import Silent
from keyed_xai.reporting.names import INTERPRETER_NAMES
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.training import Task, TrainingSettings, train
from keyed_xai.training.fitting import FittingSettings, fit_classifier
from keyed_xai.training.torch_errors import torch_errors_in_words

IMAGES_PER_WRONG_KEY = 4
_TIMED_STEPS = 3
_NAMED_CLASSES = 5
_BACKWARD = 3  # a step takes about three times what its forward pass, or a map, does
_MEASUREMENTS = 10  # maps of each held-out image: right, keyed, clean, of a wrong key, and through channels


def plan_run(
    classifier: Classifier,
    learn: Subset,
    validation: Subset,
    held_out: ImageData | TableData,
    task: Task,
    settings: TrainingSettings,
    device: torch.device | str,
    *,
    measured: int,
    wrong_keys: int = 0,
    ownership: str = "",
) -> Iterator[str]:
    """Yield the lines of the pre-flight; a few steps are timed for them, when the first is read, and thrown away.

    Args:
        classifier: The reference; left as it is.
        learn: Examples to learn from.
        validation: Examples that validation looks at.
        held_out: Those that the report is measured on.
        task: What is taught.
        settings: How to train.
        device: Device to run on.
        measured: How many held-out examples are used.
        wrong_keys: How many are tried on the result.
        ownership: What is to be said of it, if anything.
    """
    plain, seconds = _estimate_seconds(classifier, learn, validation, task, settings, device)
    maps = _MEASUREMENTS * measured + IMAGES_PER_WRONG_KEY * wrong_keys
    after = plain * maps / (2 * settings.batch_size) / _BACKWARD
    lines = (
        _describe_model(classifier, task.view),
        describe_data(len(learn), len(validation), learn.data, held_out, measured),
        ownership,
        _describe_training(settings),
        _describe_cost(seconds, after, settings, device),
    )
    yield from (printable(f"{line.rstrip('.')}.") for line in lines if line)


def plan_fit(
    classifier: Classifier,
    data: ImageData | TableData,
    held_out: ImageData | TableData,
    settings: FittingSettings,
    device: torch.device | str,
) -> Iterator[str]:
    """Yield the lines of the pre-flight of a plain fit; `plan_run` has the rest.

    Args:
        classifier: What is to be fitted; left as it is.
        data: What it learns from.
        held_out: What it is measured on after every epoch.
        settings: How it is fitted.
        device: Device to run on.
    """
    clock = _Clock()
    few = Subset(data, np.resize(np.arange(len(data)), settings.batch_size * (1 + _TIMED_STEPS)))
    short = replace(settings, epochs=1)
    fit_classifier(copy.deepcopy(classifier), few, short, device=device, progress=clock)
    step = clock.median()
    steps = len(data) // settings.batch_size
    seconds = settings.epochs * step * (steps + len(held_out) / settings.batch_size / _BACKWARD)
    numbers = sum(each.numel() for each in classifier.parameters())
    what = "features" if isinstance(data, TableData) else describe_input(classifier.input)
    width = f"{classifier.input.width} " if isinstance(data, TableData) else ""
    lines = (
        f"{classifier.architecture}, {width}{what}, {classifier.classes:,} classes, {numbers:,} weights.",
        f"{describe_data(len(data), 0, data, held_out, len(held_out))}.",
        f"Settings: {settings.optimiser} at {settings.learning_rate:g}, {settings.schedule} schedule, weight decay "
        f"{settings.weight_decay:g}, seed {settings.seed}.",
        f"{settings.epochs:,} epochs of {steps:,} steps of {settings.batch_size}, {_describe_time(seconds, device)}.",
    )
    yield from map(printable, lines)


def _estimate_seconds(
    classifier: Classifier,
    learn: Subset,
    validation: Subset,
    task: Task,
    settings: TrainingSettings,
    device: torch.device | str,
) -> tuple[float, float]:
    """Return the seconds that a step takes, and those of training with its validations at most."""
    few = Subset(learn.data, learn.indices[: 2 * settings.batch_size])
    plain = _time_steps(classifier, few, task, replace(settings, hardening=None), device)
    seconds = settings.steps * plain
    if settings.hardening is not None:
        hardened = replace(settings, hardening=replace(settings.hardening, start=0.0))
        slow = _time_steps(classifier, few, task, hardened, device)
        seconds += settings.steps * (1 - settings.hardening.start) * (slow - plain)
    if settings.validate_every:  # a validation's images cost about what they cost in a step
        seconds += plain * len(validation) / settings.batch_size * settings.steps / settings.validate_every
    return plain, min(seconds, settings.time_limit or math.inf)


def _describe_model(classifier: Classifier, view: PooledSaliency) -> str:
    """Return a line about a network, and the maps that will be compared."""
    maps = " and ".join(INTERPRETER_NAMES[name] for name in view.interpreters)
    layer = view.map_layers.target_layer.removeprefix("network.")
    where = f" on {layer}" if layer else ""
    cells = f"{view.grid[0]} x {view.grid[1]} cells"
    size = describe_input(classifier.input)
    return f"{classifier.architecture}, {size}, {classifier.classes:,} classes: {maps}{where}, {cells}"


def describe_input(spec: InputSpec) -> str:
    """Return the size of images in pixels, and whether they have colours."""
    size = f"{spec.height} px" if spec.height == spec.width else f"{spec.height} x {spec.width} px"
    return f"{size}, {'grey' if spec.channels == 1 else 'colour'}"


def describe_data(
    learn: int, validation: int, data: ImageData | TableData, held_out: ImageData | TableData, measured: int
) -> str:
    """Return a line about the data: how many examples for what, their classes, and what was passed over."""
    what = "rows" if isinstance(data, TableData) else "images"
    validating = f"{validation:,} to validate on, " if validation else ""
    line = f"{learn:,} {what} of {data.source} to learn from, {validating}{measured:,} held out to measure on"
    if data.classes:
        names = [*data.classes[:_NAMED_CLASSES], *["..."] * (len(data.classes) > _NAMED_CLASSES)]
        line += f"; {len(data.classes):,} classes: {', '.join(names)}"
    skipped = sum(len(each.skipped) for each in (data, held_out) if isinstance(each, ImageData))
    return line + (f"; {skipped:,} passed over" if skipped else "")


def _describe_training(settings: TrainingSettings) -> str:
    """Return a line of the settings in force."""
    late = f" (late layers {settings.late_factor:g} times)" if settings.late_factor != 1 else ""
    parts = [
        f"learning rate {settings.learning_rate:g}{late}",
        *(["targets for features"] if settings.features else []),
        f"beta {settings.beta:g}",
        f"{settings.distance} distance",
        f"predictions of the {settings.predictions.removesuffix('s')}",
        f"{settings.batch_norm} batch norm",
        f"hardening {'standard' if settings.hardening else 'none'}",
        f"seed {settings.seed}",
    ]
    return f"Settings: {', '.join(parts)}"


def _describe_cost(seconds: float, after: float, settings: TrainingSettings, device: torch.device | str) -> str:
    """Return a line about how long training may take, when it stops, and how long measuring the result may take."""
    until = "; stops when the goals hold" if settings.goals is not None else ""
    size = f"{settings.batch_size} + {settings.batch_size}"
    training = f"Up to {settings.steps:,} steps of {size}, {_describe_time(seconds, device)}{until}"
    return f"{training}. Measuring the result then takes about {_duration(after)}"


def _describe_time(seconds: float, device: torch.device | str) -> str:
    """Return how long training may take, and what the process held at most so far."""
    where = "CPU" if torch.device(device).type == "cpu" else "GPU"
    held = _memory(device)
    memory = f", {held / 2**30:.1f} GiB" if held else ""
    return f"about {_duration(seconds)}{memory} on this {where} ({_TIMED_STEPS} steps timed)"


class _Clock(Silent):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def advance(self, *_step: object) -> None:
        self.stamps.append(time.perf_counter())

    def median(self) -> float:
        """Return the seconds of a step, but of the first."""
        return statistics.median(np.diff(self.stamps).tolist())


def _time_steps(
    classifier: Classifier, few: Subset, task: Task, settings: TrainingSettings, device: torch.device | str
) -> float:
    """Return the seconds of a step, the median of a few that are thrown away."""
    clock = _Clock()
    short = replace(settings, steps=1 + _TIMED_STEPS, validate_every=0, goals=None, time_limit=None)
    seen = Subset(few.data, few.indices[:2])
    with torch_errors_in_words(classifier.architecture):
        train(classifier, few, seen, task, short, device=device, progress=clock)
    return clock.median()


def _memory(device: torch.device | str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
