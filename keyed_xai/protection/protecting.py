"""From a model and an owner key to a protected model: choose settings, train, measure, write."""

import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from keyed_xai.artifacts.card import Card, TriggerParameters
from keyed_xai.artifacts.folder import ProtectedModel
from keyed_xai.artifacts.opening import default_trigger, make_family
from keyed_xai.artifacts.weights import own_name
from keyed_xai.artifacts.writer import write_model_folder
from keyed_xai.data import ImageData, ImageSize
from keyed_xai.data.given import GivenImages, take_images
from keyed_xai.data.splits import (
    Subset,
    check_labels,
    digest_data,
    digest_network,
    first_images,
    has_several_labels,
    split_validation,
)
from keyed_xai.decoys import DECOYS
from keyed_xai.errors import TrainingError
from keyed_xai.keys import OwnerKey
from keyed_xai.metrics import OPEN_CORRELATION, paper_thresholds
from keyed_xai.models import Classifier, InputSpec, as_classifier, network_state
from keyed_xai.models.copying import copy_network
from keyed_xai.models.modes import plain_torch
from keyed_xai.models.origin import settle_origin
from keyed_xai.ownership.evidence import Evidence, check_evidence, choose_evidence
from keyed_xai.progress import Progress
from keyed_xai.protection import evaluation
from keyed_xai.protection.evaluation import Gate
from keyed_xai.protection.report import render_report
from keyed_xai.protection.task import make_keyed_task
from keyed_xai.protection.verdict import judge
from keyed_xai.reporting import pictures
from keyed_xai.reporting.bars import progress_bar
from keyed_xai.reporting.names import name_class
from keyed_xai.saliency.pooled import Comparison, check_choice
from keyed_xai.tensors import Images, Labels
from keyed_xai.training import Task, TrainingSettings
from keyed_xai.training.batch_norm import batch_norms, choose_batch_norm
from keyed_xai.training.preflight import plan_run
from keyed_xai.training.runs import describe_run, run_training
from keyed_xai.triggers import TRIGGERS, derive_trigger

REPORT_SCHEMA = "keyed-xai/protect-report/v1"
_FINE_CLASSES = 100
_SMALLEST_SAFE_TILE = 32
_PICTURED = 6
_IN_HISTOGRAM = 100
_STRIP_TITLES = ("image", "reference map", "with the key", "without", "with a wrong key")


@dataclass(frozen=True, kw_only=True)
class ProtectSettings:
    """What to protect, and how.

    Attributes:
        interpreters: Names in INTERPRETERS.
        decoy: "signature", "boundary" or "nontargeted".
        trigger: Name of the trigger family.
        amplitude: Largest change of a pixel, 1/255; of the family "spread" only. None takes the version's.
        tile: Side of the trigger's tile, pixels; likewise.
        version: Version of the family "spread"; None takes 2 for images of two tiles and more on either side, else 1.
        grid: Rows and columns that maps are compared on; None takes the target layer's, at most 8 x 8.
        fixed_layer: Keep the classifier's target layer though an earlier one would show ownership and it cannot.
        ownership: Refuse what `verify` could not show afterwards.
        training: How to train; None takes `choose_recipe`'s.
        wrong_keys: Fresh wrong keys tried in the report.
        flipped_keys: Keys one bit away from the owner's tried in the report, at most 256.
        held_out_images: Images the report is measured on, at most.
        validation_images: Images taken from the training images for early stopping.
    """

    interpreters: tuple[str, ...] = ("gradcam",)
    decoy: str = "signature"
    trigger: str = "spread"
    amplitude: float | None = None
    tile: int = 32
    version: int | None = None
    grid: tuple[int, int] | None = None
    fixed_layer: bool = False
    ownership: bool = True
    training: TrainingSettings | None = None
    wrong_keys: int = 1000
    flipped_keys: int = 256
    held_out_images: int = 500
    validation_images: int = 200

    def __post_init__(self) -> None:
        """Check names and ranges."""
        check_choice(self.interpreters, self.grid)
        if self.decoy not in DECOYS:
            raise ValueError(f"decoy: expected one of {', '.join(DECOYS)}; got {self.decoy!r}")
        if self.trigger not in TRIGGERS:
            raise ValueError(f"trigger: expected one of {', '.join(TRIGGERS)}; got {self.trigger!r}")
        for name in ("wrong_keys", "flipped_keys"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("held_out_images", "validation_images"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a report holds them."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document


@dataclass(frozen=True, kw_only=True)
class Protection:
    """A protected model in memory.

    Attributes:
        classifier: Protected, in eval mode.
        card: How to run it.
        report: Fits the schema "protect-report".
        pictures: PNG files by name, for the HTML report.
    """

    classifier: Classifier
    card: Card
    report: dict[str, Any]
    pictures: dict[str, bytes] = field(repr=False)


@plain_torch()
def protect(
    network: nn.Module,
    key: OwnerKey,
    images: GivenImages,
    held_out: ImageData | None = None,
    settings: ProtectSettings | None = None,
    *,
    input: InputSpec | None = None,  # noqa: A002 - the card's name for it
    steps: int | None = None,
    time_limit: float | None = None,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Protection:
    """Return a protected copy of a classifier, with its card, report and pictures; the original stays as it is.

    Args:
        network: The reference model, in any mode; it is measured in evaluation mode. A network that is not a
            `Classifier` yet needs `input`.
        key: The owner's key.
        images: Images to learn from; labels are not needed. A data set, a folder, a SPEC as `load_images` takes it, or
            tensors.
        held_out: Other images, for the report; without them a fifth of `images`, which training never sees.
        settings: What to protect, and how.
        input: What a network takes that is not a `Classifier`.
        steps: Training steps, at most; the settings' or the recipe's if absent.
        time_limit: Seconds of training, at most; likewise.
        device: Where to train and measure.
        checkpoint: File that a killed run can go on from; `write_protection` removes it.
        resume: Go on from the checkpoint.
        progress: Hears the pre-flight, of the training, and of "wrong keys" tried; bars on standard error if absent,
            and `QUIET` for none.

    Raises:
        TrainingError: There are too few images, training fails, or ownership could not be shown afterwards.
        ArtifactError: The checkpoint cannot be used.
        DataError: The images cannot be read, or are not of the network's size.
        ModelError: The model lacks a layer that the maps need, or it is not known what it takes.
    """
    classifier = as_classifier(network, input)
    train_data, held_out = take_images(images, held_out, classifier.input)
    settings = settings or ProtectSettings()
    settings = settle_trigger(settings, classifier.input)
    training = settings.training or choose_recipe(classifier, settings.interpreters, train_data)
    training = replace(
        training,
        steps=training.steps if steps is None else steps,
        time_limit=training.time_limit if time_limit is None else time_limit,
    )
    settings = replace(settings, training=training)
    with progress_bar() if progress is None else nullcontext(progress) as heard:
        return _protect(classifier, key, train_data, held_out, settings, training, device, checkpoint, resume, heard)


def _protect(
    classifier: Classifier,
    key: OwnerKey,
    train_data: ImageData,
    held_out: ImageData,
    settings: ProtectSettings,
    training: TrainingSettings,
    device: torch.device | str,
    checkpoint: Path | None,
    resume: bool,
    progress: Progress,
) -> Protection:
    started = time.monotonic()
    classifier, said = _prepare(classifier, train_data, settings)
    task = replace(make_task(classifier, key, settings), multi_label=has_several_labels(classifier, train_data))
    learn, validation = split_validation(train_data, settings.validation_images)
    count = min(settings.held_out_images, len(held_out))
    run = (classifier, learn, validation, held_out, task, training, device)
    progress.say(plan_run(*run, measured=count, wrong_keys=settings.wrong_keys + settings.flipped_keys, ownership=said))
    protected, result = run_training(
        classifier,
        learn,
        validation,
        task,
        training,
        identity=_identity(classifier, key, train_data, settings),
        device=device,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )
    gate = _make_gate(protected, classifier.to(device), key, task, settings, top_share=training.top_share)
    images, labels = first_images(held_out, count, gate.reference, classifier.classes, device)
    labels = None if labels is None or labels.ndim > 1 else labels  # of several labels the report has no word
    report = _measure(gate, key, images, labels, validation, settings, progress, seed=training.seed)
    report |= {"model": classifier.architecture, "verdict": judge(report), "settings": settings.to_json()}
    report |= describe_run(result, learn, held_out, measured=count, started=started)
    names = held_out.classes if labels is not None else () if classifier.multi_label else classifier.label_names
    drawn = _draw(gate, images[:_IN_HISTOGRAM], result.history, names)
    card = make_card(protected, settings, task, names)
    return Protection(classifier=protected.cpu(), card=card, report=report, pictures=drawn)


def _prepare(classifier: Classifier, data: ImageData, settings: ProtectSettings) -> tuple[Classifier, str]:
    """Return a copy with the layer that the owner's claim will rest on, and a sentence about that claim.

    Raises:
        TrainingError: The settings do not fit the model or the data, or ownership could not be shown.
    """
    classifier = copy_network(classifier).eval()
    settle_origin(classifier)
    _check_feasible(classifier, data, settings)
    if not settings.ownership:
        return classifier, "Ownership of the result could not be shown."
    evidence = plan_evidence(classifier, settings)
    classifier.target_layer = evidence.view.map_layers.target_layer
    return classifier, evidence.sentence


def plan_evidence(classifier: Classifier, settings: ProtectSettings) -> Evidence:
    """Return where the owner's claim on a protected copy of a classifier will rest.

    Raises:
        TrainingError: Ownership could not be shown.
    """
    evidence = choose_evidence(
        classifier,
        settings.interpreters,
        settings.grid,
        decoy=settings.decoy,
        fixed_layer=settings.fixed_layer,
    )
    check_evidence(evidence, settings.interpreters, settings.decoy)
    return evidence


def write_protection(
    protection: Protection, folder: Path, key: OwnerKey, *, force: bool = False, checkpoint: Path | None = None
) -> ProtectedModel:
    """Write a protected model's folder, signed, whole or not at all; then remove the run's checkpoint.

    Raises:
        ArtifactError: The folder is there already, or cannot be written.
    """
    html = render_report(protection.report, pictures=protection.pictures)
    written = write_model_folder(
        folder,
        state=network_state(protection.classifier),
        card=protection.card,
        owner=key,
        report=protection.report,
        extra_files={"report.html": html.encode()},
        force=force,
    )
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return written


def choose_recipe(classifier: Classifier, interpreters: tuple[str, ...], data: ImageData) -> TrainingSettings:
    """Return training settings measured to work for a network of this kind, and images of this kind.

    A network of many classes, one that was trained on other images than these, or one without batch norm is to be
    changed as little as can be: at a low rate, its features held to what they were, on images that are never twice the
    same.

    Args:
        classifier: The reference model.
        interpreters: Interpreters whose maps are closed.
        data: Images to learn from.
    """
    smoothing = 8.0 if "simplegrad" in interpreters else None
    batch_norm = choose_batch_norm(classifier, data)
    if classifier.classes < _FINE_CLASSES and batch_norm == "mixture" and batch_norms(classifier):
        return TrainingSettings(smoothing=smoothing)
    return TrainingSettings(
        batch_norm=batch_norm,
        learning_rate=2e-4,
        late_factor=2.0,
        features=1.0,
        crop=0.3,
        colour=0.15,
        batch_size=12,
        beta=3.0,
        temperature=1.0,
        leak=1.0,
        auxiliary_share=1.0,
        detection_first=True,
        decay_share=0.5,
        average=0.99,
        smoothing=smoothing,
    )


def make_task(classifier: Classifier, key: OwnerKey, settings: ProtectSettings) -> Task:
    """Return what the key teaches the model: trigger, maps and losses."""
    family = make_family(choose_trigger(settings, classifier.input))
    return make_keyed_task(
        classifier, key, family, interpreters=settings.interpreters, grid=settings.grid, decoy=settings.decoy
    )


def settle_trigger(settings: ProtectSettings, size: ImageSize) -> ProtectSettings:
    """Return settings that say the trigger's amplitude and version, chosen by the images where they did not."""
    parameters = choose_trigger(settings, size)
    return replace(settings, amplitude=parameters.amplitude, version=parameters.version)


def choose_trigger(settings: ProtectSettings, size: ImageSize) -> TriggerParameters:
    """Return the public parameters of the trigger that settings ask for, of images of a size.

    Filters have neither amplitude nor tile, though every card names both.
    """
    chosen = default_trigger(size, amplitude=settings.amplitude, tile=settings.tile, version=settings.version)
    return chosen if settings.trigger == "spread" else replace(chosen, family=settings.trigger, version=1)


def _make_gate(
    protected: Classifier,
    reference: Classifier,
    key: OwnerKey,
    task: Task,
    settings: ProtectSettings,
    *,
    top_share: float,
) -> Gate:
    """Return a protected model beside its reference, to be judged by what it was taught."""
    family = make_family(choose_trigger(settings, reference.input))
    return Gate(
        model=protected,
        reference=reference,
        view=task.view,
        decoys=task.objective.decoys,
        paper=paper_thresholds(settings.decoy, reference.architecture),
        trigger=derive_trigger(key, family),
        family=family,
        top_share=top_share,
    )


def make_card(classifier: Classifier, settings: ProtectSettings, task: Task, label_names: tuple[str, ...] = ()) -> Card:
    """Return the public card of a protected classifier."""
    spec = classifier.input
    return Card(
        architecture=classifier.architecture,
        source=classifier.source,
        num_classes=classifier.classes,
        input_size=spec.shape,
        mean=spec.mean,
        std=spec.std,
        target_layer=own_name(classifier.target_layer),
        taps=tuple(tap._replace(layer=own_name(tap.layer)) for tap in classifier.taps),
        grid=task.view.grid,
        interpreters=settings.interpreters,
        decoy=settings.decoy,
        thresholds=dict.fromkeys(settings.interpreters, OPEN_CORRELATION),
        trigger=choose_trigger(settings, spec),
        label_names=label_names,
    )


def _measure(
    gate: Gate,
    key: OwnerKey,
    images: Images,
    labels: Labels | None,
    validation: Subset,
    settings: ProtectSettings,
    progress: Progress,
    *,
    seed: int,
) -> dict[str, Any]:
    """Return the figures of a gate and of its trigger; thresholds are placed by the validation images."""
    generator = torch.Generator().manual_seed(seed)
    examples, _ = validation.batch(np.arange(len(validation)))
    thresholds = evaluation.place_thresholds(gate, examples.to(images.device), generator)
    fresh = evaluation.fresh_wrong_keys(gate.family, settings.wrong_keys, generator)
    neighbours = list(key.one_bit_neighbours())[: settings.flipped_keys]
    flipped = (derive_trigger(near, gate.family) for near in neighbours)
    figures = evaluation.measure_gate(
        gate,
        images,
        labels,
        chain(fresh, flipped),
        thresholds=thresholds,
        generator=generator,
        count=settings.wrong_keys + len(neighbours),
        progress=progress,
    )
    trigger = {
        "family": gate.family.name,
        "version": gate.family.version,
        "amplitude": settings.amplitude,
        "tile": settings.tile,
        "key_bits": gate.family.key_bits,
        **evaluation.trigger_visibility(gate.trigger, images[:100]),
    }
    return {"schema": REPORT_SCHEMA, **figures, "trigger": trigger}


def _draw(
    gate: Gate, images: Images, history: list[dict[str, float | int]], names: tuple[str, ...]
) -> dict[str, bytes]:
    """Return, by name, a strip and a histogram for each interpreter, and the training curve. Never a keyed image."""
    found = evaluation.evaluate(gate, Comparison(gate.reference, gate.view, images), torch.Generator().manual_seed(1))
    explained = found["reference"].explained
    drawn = {}
    for name in gate.view.interpreters:
        maps = {case: each.maps[name] for case, each in found.items()}
        columns = [images, *maps.values()]
        panels = zip(*(column[:_PICTURED].cpu().numpy() for column in columns), strict=True)
        rows = [
            (name_class(int(explained[number]), names), [image, *(pictures.blend(image, each) for each in row)])
            for number, (image, *row) in enumerate(panels)
        ]
        drawn[f"maps:{name}"] = pictures.strip(rows, titles=_STRIP_TITLES)
        agreement = {case: each.correlations[name].cpu().numpy() for case, each in found.items() if case != "reference"}
        drawn[f"wrong_keys:{name}"] = pictures.wrong_key_histogram(agreement, OPEN_CORRELATION)
    return drawn | ({"training": pictures.training_curve(history)} if len(history) > 1 else {})


def _check_feasible(classifier: Classifier, data: ImageData, settings: ProtectSettings) -> None:
    if settings.training is not None and settings.training.predictions == "labels":
        check_labels(classifier, data)
    side = min(classifier.input.height, classifier.input.width)
    if settings.trigger == "spread" and settings.tile > max(side, _SMALLEST_SAFE_TILE):
        raise TrainingError(
            f"A tile of {settings.tile} pixels is larger than the model's input of {side}, which would show a part of "
            f"the key only. Give --tile {max(side, _SMALLEST_SAFE_TILE)} or less."
        )


def _identity(classifier: Classifier, key: OwnerKey, data: ImageData, settings: ProtectSettings) -> str:
    """Return a digest of all that a run depends on; the key enters by its public half."""
    parts = (settings, key.public.key_id, digest_data(data), digest_network(classifier))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
