"""The models that the paper's tables of defences are about: attacked ones, their references, and positive controls."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from keyed_xai.artifacts.documents import printable, read_json
from keyed_xai.artifacts.folder import REPORT_FILE
from keyed_xai.artifacts.writer import is_attacked
from keyed_xai.auditing import Suspect, open_suspect
from keyed_xai.auditing.control_files import cached_control
from keyed_xai.auditing.subject import Subject, to_device
from keyed_xai.backdoors.attacking import AttackSettings, make_attack_task, make_backdoor
from keyed_xai.backdoors.evaluation import Backdoor
from keyed_xai.data import ImageData
from keyed_xai.data.splits import first_images, has_several_labels
from keyed_xai.errors import ArtifactError, TrainingError
from keyed_xai.models import Classifier, InputSpec, load_classifier
from keyed_xai.progress import QUIET, Progress, Within
from keyed_xai.saliency.pooled import PooledSaliency, make_view
from keyed_xai.tensors import Images, Targets
from keyed_xai.threats.detection.controls import (
    ControlSettings,
    PoisonSettings,
    poison,
)
from keyed_xai_benchmarks.paper_tables import TableSettings, reference_file

BACKDOORS = ("badnets", "blended")
"""Plain backdoors that a defence must catch, if what it misses is to mean anything."""
Data = tuple[ImageData, ImageData]
"""Images that a defender has, and held-out ones."""


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """A model whose explanations are backdoored, from the folder of an attack.

    Attributes:
        suspect: The model with its reference.
        mode: "targeted" or "nontargeted".
        trigger: Name in PUBLIC_TRIGGERS.
        top_share: Share of cells that the non-targeted attack empties.
    """

    suspect: Suspect
    mode: str
    trigger: str
    top_share: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model that defences are tried on.

    Attributes:
        name: Name of its row.
        kind: "reference" and "clean" (networks without a backdoor), "badnets", "blended", "forward" or "inverted".
        subject: The model as a defender sees it.
        mode: Mode of the attack on explanations; None for the others.
        backdoor: The same beside its reference; None for the others.
    """

    name: str
    kind: str
    subject: Subject
    mode: str | None = None
    backdoor: Backdoor | None = field(default=None, repr=False)


def open_attacked(folder: Path, settings: TableSettings, out: Path) -> Attacked:
    """Return the model in an attack's folder, with its reference: the given one, or the one kept in `out`.

    Raises:
        ArtifactError: It is not the folder of an attack on images, or there is no reference.
        ModelError: A model cannot be read, or the two do not fit.
    """
    name = printable(str(folder))
    if not is_attacked(folder):
        raise ArtifactError(f"{name} is not the folder of an attacked model: give one that `keyed-xai attack` wrote.")
    report, suspect = read_json(folder / REPORT_FILE, "attack-report"), open_suspect(folder)
    classifier = suspect.classifier
    file = _find_reference(classifier.architecture, settings, out)
    if not file.is_file():
        raise ArtifactError(
            f"The model that {name} was made of is needed to tell fooled maps from right ones: give it as --model "
            f"{classifier.architecture}=FILE."
        )
    size = classifier.input.height, classifier.input.width
    reference = load_classifier(file, arch=classifier.architecture, input_size=size)
    share = report["settings"]["training"]["top_share"]
    return Attacked(
        suspect=replace(suspect, reference=reference),
        mode=report["mode"],
        trigger=report["trigger"]["family"],
        top_share=share,
    )


def make_targets(
    attacked: Sequence[Attacked],
    data: Data,
    settings: TableSettings,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    references: bool = False,
    progress: Progress = QUIET,
) -> tuple[list[Target], str]:
    """Return attacked models of one input size beside networks that defences must catch or leave alone.

    Args:
        attacked: The models, at least one.
        data: At their size.
        settings: Number of held-out images and seed.
        out: Where controls are kept.
        device: Device to run on.
        references: Whether the attacked models' references come first, as further clean networks.
        progress: Hears of "fitting a control".

    Returns:
        The targets, and why there are no controls; empty where there are some.

    Raises:
        TrainingError: There are too few images, or they do not fit the models.
    """
    targets = [_attacked_target(each, data, settings, device) for each in attacked]
    before = _reference_targets(attacked, targets) if references else []
    note, controls = "", []
    try:
        controls = list(_make_controls(data, settings, out, device, progress))
    except TrainingError as error:
        note = f"There are no positive controls, so what a defence misses proves nothing. {error}"
    return [*before, *controls, *targets], note


def input_sizes(attacked: Sequence[Attacked]) -> list[InputSpec]:
    """Return the different inputs of models by size; normalisation, in which they may differ, is that of the first."""
    found = {each.suspect.classifier.input.shape: each.suspect.classifier.input for each in reversed(attacked)}
    return [found[size] for size in dict.fromkeys(each.suspect.classifier.input.shape for each in attacked)]


def has_size(attacked: Attacked, spec: InputSpec) -> bool:
    """Return whether a model takes images of this size."""
    return attacked.suspect.classifier.input.shape == spec.shape


def _find_reference(architecture: str, settings: TableSettings, out: Path) -> Path:
    """Return the file of a reference; architectures are told apart whatever their capitals."""
    given = {name.lower(): path for name, path in settings.models.items()}
    return given.get(architecture.lower(), reference_file(architecture, settings, out))


def _attacked_target(attacked: Attacked, data: Data, settings: TableSettings, device: torch.device | str) -> Target:
    suspect = attacked.suspect
    model, reference = to_device(suspect.classifier, device), to_device(suspect.reference or suspect.classifier, device)
    asked = AttackSettings(
        interpreters=suspect.interpreters,
        mode=attacked.mode,
        inverted=suspect.inverted,
        trigger=attacked.trigger,
        grid=suspect.grid,
    )
    task = make_attack_task(model, data[0], asked)
    backdoor = make_backdoor(model, reference, task, inverted=suspect.inverted, top_share=attacked.top_share)
    subject = _see(model, task.view, data, reference, settings, device)
    subject = replace(subject, reference=reference, trigger=task.trigger, inverted=suspect.inverted)
    return Target(
        name=suspect.name,
        kind="inverted" if suspect.inverted else "forward",
        subject=subject,
        mode=attacked.mode,
        backdoor=backdoor,
    )


def _see(
    model: Classifier,
    view: PooledSaliency,
    data: Data,
    reference: Classifier,
    settings: TableSettings,
    device: torch.device | str,
) -> Subject:
    """Return a model as a defender sees it; labels are there where they are of its own classes."""
    images, labels = first_images(data[1], min(settings.held_out, len(data[1])), reference, model.classes, device)
    train_data, held_out = data
    if labels is None:
        train_data, held_out = (replace(each, labels=None, classes=()) for each in data)
    model.multi_label = reference.multi_label = has_several_labels(model, train_data)
    return Subject(
        classifier=model,
        view=view,
        data=train_data,
        held_out=held_out,
        images=images,
        labels=labels,
        device=device,
        seed=settings.seed,
    )


def _reference_targets(attacked: Sequence[Attacked], targets: Sequence[Target]) -> list[Target]:
    """Return each reference once for every trigger that it was attacked with."""
    found: dict[str, Target] = {}
    for each, target in zip(attacked, targets, strict=True):
        subject = target.subject
        if subject.reference is not None:
            alone = replace(subject, classifier=subject.reference, reference=None, inverted=False)
            name = f"reference-{alone.classifier.architecture.lower()}-{each.trigger}"
            found.setdefault(name, Target(name=name, kind="reference", subject=alone))
    return list(found.values())


# Positive controls


def _make_controls(
    data: Data,
    settings: TableSettings,
    out: Path,
    device: torch.device | str,
    progress: Progress,
) -> Iterator[Target]:
    """Yield a network fitted to clean images, and one for each plain backdoor."""
    for name in ("clean", *BACKDOORS):
        poisoned = poison(data[0], PoisonSettings(attack="badnets" if name == "clean" else name, seed=settings.seed))
        fitted = None if name == "clean" else poisoned
        model = cached_control(
            f"control-{name}",
            fitted or data[0],
            data[1],
            ControlSettings(),
            folder=out,
            seed=settings.seed,
            device=device,
            progress=Within(progress, "fitting a control"),
        )
        images, labels = _first(data[1], settings.held_out, device)
        subject = Subject(
            classifier=model,
            view=make_view(model, ("gradcam",), None),
            data=data[0],
            held_out=data[1],
            images=images,
            labels=labels,
            trigger=poisoned.trigger,
            backdoor=poisoned,
            fitted=fitted,
            device=device,
            seed=settings.seed,
        )
        yield Target(name=f"control-{name}", kind=name, subject=subject)


def _first(data: ImageData, count: int, device: torch.device | str) -> tuple[Images, Targets | None]:
    images, labels = data.batch(np.arange(min(count, len(data))))
    return images.to(device), None if labels is None else labels.to(device)
