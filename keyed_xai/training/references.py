"""Making a reference model from labelled data: choose a network and settings, fit, measure, write.

Source of the recipe: Fang & Choromanska, AAAI 2022 (SGD with momentum, weight decay, a rate that falls in steps; Adam
where that does not train). Epochs and rates are ours.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keyed_xai.artifacts.checkpoint import check_not_stopped, checkpointed
from keyed_xai.artifacts.documents import printable, write_atomically
from keyed_xai.artifacts.versions import package_versions
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.data import ImageData, TableData
from keyed_xai.data.splits import digest_data, digest_network
from keyed_xai.errors import ArtifactError, ModelError, TrainingError
from keyed_xai.models import (
    Classifier,
    InputSpec,
    build_network,
    load_classifier,
    wrap_network,
)
from keyed_xai.models.catalogue import IMAGENET_MEAN, IMAGENET_STD, default_size, shapes_of
from keyed_xai.models.networks import SmallResNet, TableMLP
from keyed_xai.models.recognise import named_candidates
from keyed_xai.progress import QUIET, Progress, Within
from keyed_xai.training.fitting import FittingSettings, fit_classifier, measure_chance, measure_predictions
from keyed_xai.training.preflight import plan_fit

REPORT_SCHEMA = "keyed-xai/train-report/v1"
Data = ImageData | TableData
LARGEST_SMALL_SIDE = 128
"""Pixels; `SmallResNet` is chosen for images up to this size only."""
_WIDTHS = {"SmallResNet": (16, 32, 64, 128), "TableMLP": (64, 32)}
_NORMS = (nn.BatchNorm2d, nn.GroupNorm)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A network to make; its number of classes comes with the data.

    Attributes:
        source: One of `models.catalogue.SOURCES`.
        architecture: A name that the source knows.
        input: The images, or rows of a table, that it takes.
        widths: Widths of SmallResNet's blocks or TableMLP's hidden layers; empty for others.
        start: A classifier whose weights it starts from; None for random ones.
    """

    source: str
    architecture: str
    input: InputSpec
    widths: tuple[int, ...] = ()
    start: Classifier | None = None


@dataclass(frozen=True)
class Reference:
    """A fitted classifier, in memory.

    Attributes:
        classifier: The classifier, on the CPU, in eval mode.
        report: Fits the schema "train-report".
    """

    classifier: Classifier
    report: dict[str, Any]


def plan_for_images(
    arch: str | None = None, *, channels: int | None = None, side: int | None = None, widths: tuple[int, ...] = ()
) -> ModelSpec:
    """Return the specification of a network for images, with random weights.

    Grey images are normalised with mean .5 and std .25, others with ImageNet's numbers.

    Args:
        arch: Architecture, such as ``resnet50``; SmallResNet if not given.
        channels: 1 (grey) or 3 (RGB); 3 if not given.
        side: Side of the images, pixels; if not given the architecture's published size, 96 for SmallResNet.
        widths: Widths of SmallResNet's blocks.

    Raises:
        ModelError: There is no such architecture, it has no widths to choose, or images are large and none is named.
    """
    if arch is None and side is not None and side > LARGEST_SMALL_SIDE:
        raise ModelError(
            f"SmallResNet is for images up to {LARGEST_SMALL_SIDE} pixels, and {side} were asked for. Name an "
            "architecture with --arch, such as resnet50, vgg19 or densenet121."
        )
    source, architecture = named_candidates(arch or "SmallResNet")[0]
    if architecture == "TableMLP":
        raise ModelError("TableMLP takes rows of a table, and the data are images. Name another --arch.")
    if side is None and architecture == "SmallResNet":
        side = 96
    height, width = (side, side) if side is not None else default_size(source, architecture)
    spec = plain_spec(channels or 3, height, width)
    return ModelSpec(source=source, architecture=architecture, input=spec, widths=_check_widths(architecture, widths))


def plan_for_table(features: int, arch: str | None = None, *, widths: tuple[int, ...] = ()) -> ModelSpec:
    """Return the specification of a TableMLP with random weights, for rows of `features` encoded columns.

    Raises:
        ModelError: Another architecture is asked for, or the widths are not two.
    """
    if arch not in (None, "TableMLP", "keyed_xai:TableMLP"):
        raise ModelError(f"rows of a table need --arch TableMLP, but {arch} was asked for. Leave --arch out.")
    spec = InputSpec(1, 1, features, mean=(0.0,), std=(1.0,))
    return ModelSpec(source="keyed_xai", architecture="TableMLP", input=spec, widths=_check_widths("TableMLP", widths))


def plan_from_model(
    model: Path,
    arch: str | None = None,
    *,
    table: bool = False,
    channels: int | None = None,
    side: int | None = None,
) -> ModelSpec:
    """Return the specification of a network that starts from a file's weights and takes images, or rows, as that does.

    Args:
        model: A file that `load_classifier` takes.
        arch: Architecture; recognised if not given.
        table: Whether the data are rows of a table.
        channels: Checked against the model's.
        side: Side of the images, pixels; the model's own if not given.

    Raises:
        ModelError: The file cannot be read or recognised, has another number of channels, or takes images where the
            data are a table, or the other way round.
    """
    start = load_classifier(model, arch=arch, require_map=False)
    if isinstance(start.network, TableMLP) != table:
        takes, data = ("images", "a table") if table else ("rows of a table", "images")
        raise ModelError(f"{start.architecture} takes {takes}, and the data are {data}. Name another --model.")
    if side is not None:
        start = load_classifier(model, arch=arch, input_size=side, require_map=False)
    if channels is not None and channels != start.input.channels:
        raise ModelError(
            f"the model takes images of {start.input.channels} channels, but {channels} were asked for. Leave "
            "--channels out."
        )
    return ModelSpec(source=start.source, architecture=start.architecture, input=start.input, start=start)


def plain_spec(channels: int, height: int, width: int) -> InputSpec:
    """Return images with the normalisation of a model that starts from random weights."""
    if channels == 3:
        return InputSpec(3, height, width, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return InputSpec(channels, height, width, mean=(0.5,) * channels, std=(0.25,) * channels)


def build_classifier(model_spec: ModelSpec, classes: int, *, seed: int = 0) -> Classifier:
    """Return a classifier as specified, on the CPU.

    Weights to start from keep their place where their shapes fit: all but the head's where classes differ.

    Args:
        model_spec: What to make.
        classes: Number of logits.
        seed: Seed of random weights.

    Raises:
        TrainingError: There are fewer than two classes.
        ModelError: The network does not take images of this size.
    """
    if classes < 2:
        raise TrainingError(f"Expected data with labels of two classes or more, got {classes} classes. For a folder of "
                            "images make a folder inside for each class.")  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = _build(model_spec, classes)
    if model_spec.start is not None:
        _copy_weights(model_spec.start.network, network)
    return wrap_network(
        network,
        input=model_spec.input,
        architecture=model_spec.architecture,
        source=model_spec.source,
        require_map=False,
    )


def choose_settings(classifier: Classifier, examples: int, optimiser: str | None = None) -> FittingSettings:
    """Return settings that train a network of this kind.

    SGD at .01 with batch or group norm; Adam at 1e-4 without (VGG, SqueezeNet, transformers), which SGD often fails to
    train from random weights; Adam at .001 for rows of a table.

    Args:
        classifier: What to train.
        examples: How many there are to train on; a batch holds no more.
        optimiser: Use this one instead.
    """
    table = isinstance(classifier.network, TableMLP)
    steady = table or any(isinstance(module, _NORMS) for module in classifier.network.modules())
    chosen = optimiser or ("sgd" if steady and not table else "adam")
    rate = 1e-2 if chosen == "sgd" else 1e-3 if steady else 1e-4
    batch_size = max(1, min(128 if table else 32, examples))
    return FittingSettings(
        epochs=15,
        batch_size=batch_size,
        learning_rate=rate,
        weight_decay=1e-4,
        optimiser=chosen,
        schedule="step",
        noise=0.0,
        mixed_precision=True,
    )


def train_reference(
    classifier: Classifier,
    train_data: Data,
    held_out: Data,
    settings: FittingSettings | None = None,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress = QUIET,
) -> Reference:
    """Fit a classifier in place, name its classes, and measure it on held-out data.

    Args:
        classifier: What `build_classifier` returns.
        train_data: Data with labels.
        held_out: Other data with labels of the same classes; measured after every epoch, nothing is chosen by it.
        settings: How to train; None takes `choose_settings`'.
        device: Device to run on.
        checkpoint: File that a killed run can go on from; `write_reference` removes it.
        resume: Go on from the checkpoint.
        progress: Hears the pre-flight, and of "training" the architecture.

    Raises:
        TrainingError: The data have no labels, another size or too few examples, or the loss is no longer finite.
        ArtifactError: The checkpoint cannot be used, or another run is using it.
    """
    settings = settings or choose_settings(classifier, len(train_data))
    _check_data(classifier, train_data, held_out)
    started = time.monotonic()
    identity = identify_reference(classifier, train_data, settings)
    progress.say(plan_fit(classifier, train_data, held_out, settings, device))
    with checkpointed(checkpoint, identity=identity, resume=resume) as (state, save):
        history = fit_classifier(
            classifier,
            train_data,
            settings,
            validation=held_out,
            device=device,
            checkpoint=state,
            save_checkpoint=save,
            progress=Within(progress, f"training {classifier.architecture}"),
        )
    spec, measured = classifier.input, measure_predictions(classifier, held_out, device=device)
    chance = measure_chance(held_out)
    report = {
        "schema": REPORT_SCHEMA,
        "model": classifier.architecture,
        "identity": identity,
        "data": {
            name: {"source": data.source, "images": len(data)}
            for name, data in (("train", train_data), ("held_out", held_out))
        },
        "predictions": measured,
        "chance": chance,
        "verdict": judge_fit(measured, chance, len(held_out)),
        "history": history,
        "seconds": time.monotonic() - started,
        "settings": asdict(settings) | {"input_size": list(spec.shape)},
        "versions": package_versions(),
    }
    classifier.label_names, classifier.multi_label = train_data.classes, train_data.multi_label
    return Reference(classifier.cpu(), report)


def judge_fit(predictions: Mapping[str, Any], chance: Mapping[str, float], examples: int) -> dict[str, str]:
    """Return a report's `verdict`: trained, trained in part (nothing could be measured), or not trained.

    A classifier is trained where a figure on held-out examples is above what guessing stays under.

    Args:
        predictions: What `measure_predictions` returns.
        chance: What `measure_chance` returns for the same data.
        examples: Number of examples.
    """
    names = {"top1": "top-1 accuracy", "auroc": "AUROC"}
    figures = {name: predictions[name] for name in names if name in predictions and name in chance}
    if not figures:
        return {"answer": "trained in part", "sentence": f"nothing can be measured on {examples:,} held-out examples."}
    above = any(value > chance[name] for name, value in figures.items())
    words = "; ".join(
        f"{names[name]} {value:.3f}, guessing stays under {chance[name]:.3f}" for name, value in figures.items()
    )
    return {
        "answer": "trained" if above else "not trained",
        "sentence": f"on {examples:,} held-out examples {words}.",
    }


def identify_reference(classifier: Classifier, train_data: Data, settings: FittingSettings) -> str:
    """Return a digest of all that a fitted model depends on, by which a run that goes on knows itself.

    Held-out data are no part of it: nothing is chosen by them.

    Args:
        classifier: Before it is fitted.
        train_data: What it learns from.
        settings: How it is fitted.
    """
    parts = (settings, classifier.source, digest_network(classifier), digest_data(train_data))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def check_output(path: Path, *, resume: bool = False, force: bool = False) -> Path:
    """Return the checkpoint file of a run that is to write `path`, once it is clear that nothing there gets lost.

    Raises:
        ArtifactError: A file or a stopped run is there already.
    """
    _check_replaceable(path, force=force)
    checkpoint = path.with_name(f"{path.name}.checkpoint")
    check_not_stopped(checkpoint, resume=resume, force=force)
    return checkpoint


def write_reference(reference: Reference, path: Path, *, force: bool = False, checkpoint: Path | None = None) -> None:
    """Write a safetensors file that `load_classifier` takes, whole or not at all; then remove the checkpoint.

    Raises:
        ArtifactError: The file is there already, or cannot be written.
    """
    _check_replaceable(path, force=force)
    write_atomically(path, encode_weights(reference.classifier))
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def _check_widths(architecture: str, widths: tuple[int, ...]) -> tuple[int, ...]:
    if not widths:
        return _WIDTHS.get(architecture, ())
    if architecture not in _WIDTHS:
        raise ModelError(f"only {' and '.join(_WIDTHS)} have widths to choose, not {architecture}. Leave them out.")
    if min(widths) < 1 or (architecture == "TableMLP" and len(widths) != 2):
        expected = "two widths" if architecture == "TableMLP" else "widths"
        raise ModelError(f"{architecture} needs {expected} of 1 or more, but came {', '.join(map(str, widths))}.")
    return widths


def _build(model_spec: ModelSpec, classes: int) -> nn.Module:
    spec, start = model_spec.input, model_spec.start
    if start is None and model_spec.architecture == "SmallResNet":
        return SmallResNet(spec.channels, classes, model_spec.widths)
    if start is None and model_spec.architecture == "TableMLP":
        return TableMLP(spec.width, classes, (model_spec.widths[0], model_spec.widths[1]))
    return build_network(
        model_spec.source,
        model_spec.architecture,
        classes=classes,
        channels=spec.channels,
        size=(spec.height, spec.width),
        shapes=shapes_of(start.network.state_dict()) if start is not None else None,
    )


def _copy_weights(start: nn.Module, network: nn.Module) -> None:
    state = network.state_dict()
    fitting = {name: t for name, t in start.state_dict().items() if name in state and state[name].shape == t.shape}
    network.load_state_dict(state | fitting)


def _check_data(classifier: Classifier, *splits: Data) -> None:
    spec = classifier.input
    for data in splits:
        size, expected = tuple(data.batch([0])[0].shape[1:]), spec.shape
        if size != expected:
            raise TrainingError(
                f"Expected examples of shape {expected}; {data.source} has {size}. Give the model's size."
            )
        if data.labels is None or len(data.classes) != classifier.classes:
            found = "no labels" if data.labels is None else f"{len(data.classes)} classes"
            raise TrainingError(
                f"Expected labelled examples of the model's {classifier.classes} classes; {data.source} has {found}."
            )


def _check_replaceable(path: Path, *, force: bool) -> None:
    name = printable(str(path))
    if path.is_dir():
        raise ArtifactError(f"{name} is a folder: give the name of a file to write.")
    if os.path.lexists(path) and not force:
        raise ArtifactError(
            f"{name} is there already and was left as it is: choose another name, or give --force (force=True in "
            "Python)."
        )
