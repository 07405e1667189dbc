"""Reference models and attacks that benchmarks keep: made once, and known again by what they depend on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from keyed_xai.artifacts.checkpoint import read_checkpoint
from keyed_xai.artifacts.documents import printable, read_json, write_json
from keyed_xai.artifacts.folder import REPORT_FILE
from keyed_xai.backdoors.attacking import AttackSettings, identify_attack, run_attack, write_attack
from keyed_xai.data import ImageData, TableData
from keyed_xai.errors import ArtifactError
from keyed_xai.models import Classifier, load_classifier
from keyed_xai.progress import QUIET, Progress, Within
from keyed_xai.training.fitting import FittingSettings
from keyed_xai.training.references import (
    ModelSpec,
    build_classifier,
    identify_reference,
    train_reference,
    write_reference,
)

Data = tuple[ImageData | TableData, ImageData | TableData]
"""Data to learn from, and data to measure on."""
_OTHERWISE = "Give the same ones, or another folder with -o."


class CachedReference(NamedTuple):
    """A model to attack.

    Attributes:
        classifier: The reference model.
        epochs: Epochs that it was fitted for; None where it was given.
    """

    classifier: Classifier
    epochs: int | None


def cached_reference(
    path: Path,
    model_spec: ModelSpec,
    data: Data,
    choose: Callable[[Classifier], FittingSettings],
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = QUIET,
) -> CachedReference:
    """Return a reference model, from disk where it is there; else fit it, and keep it with its report beside it.

    A model without a report beside it is taken as it is.

    Args:
        path: The file of weights.
        model_spec: What to make.
        data: Data to learn from, and to measure on.
        choose: Returns how a classifier is fitted.
        seed: Seed of random weights; `choose` sees to the rest.
        device: Device to fit on.
        progress: Hears of "fitting a reference".

    Raises:
        ArtifactError: One, or the checkpoint of one, is there that was made from other data or with other settings.
    """
    report_file = path.with_suffix(".json")
    if path.exists() and not report_file.exists():
        return CachedReference(load_classifier(path, require_map=False), None)
    classifier = build_classifier(model_spec, len(data[0].classes), seed=seed)
    settings = choose(classifier)
    identity = identify_reference(classifier, data[0], settings)
    if not path.exists():
        checkpoint = path.with_name(f"{path.name}.checkpoint")
        reference = train_reference(
            classifier,
            *data,
            settings,
            device=device,
            checkpoint=checkpoint,
            resume=_can_go_on(checkpoint, identity),
            progress=Within(progress, "fitting a reference"),
        )
        write_json(report_file, reference.report, schema="train-report")
        write_reference(reference, path, checkpoint=checkpoint)
    report = read_json(report_file, "train-report")
    if report.get("identity") != identity:
        raise ArtifactError(f"{path} was made from other data or with other settings. {_OTHERWISE}")
    return CachedReference(load_classifier(path, require_map=False), settings.epochs)


def cached_attack(
    folder: Path,
    reference: Classifier,
    data: Data,
    settings: AttackSettings,
    *,
    device: str = "cpu",
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Return an attack's report, from disk where it is finished; else attack, measure and keep it.

    Args:
        folder: Folder of the attacked model.
        reference: The model attacked.
        data: Data to learn from, and to measure on.
        settings: What to attack, and how.
        device: Where to train.
        progress: Hears of the training, if there is one.

    Raises:
        ArtifactError: One, or the checkpoint of one, is there of another reference, from other data or with other
            settings.
    """
    identity = identify_attack(reference, *data, settings)
    if not (folder / REPORT_FILE).exists():
        checkpoint = folder.with_name(f"{folder.name}.checkpoint")
        attack = run_attack(
            reference,
            *data,
            settings,
            device=device,
            checkpoint=checkpoint,
            resume=_can_go_on(checkpoint, identity),
            progress=Within(progress),
        )
        write_attack(attack, folder, checkpoint=checkpoint)
    report = read_json(folder / REPORT_FILE, "attack-report")
    if report.get("identity") != identity:
        raise ArtifactError(f"{folder} was made of another model, from other data or with other settings. {_OTHERWISE}")
    return report


def _can_go_on(checkpoint: Path, identity: str) -> bool:
    """Return whether there is a checkpoint to go on from.

    Raises:
        ArtifactError: It is damaged, or of another run.
    """
    if not checkpoint.exists():
        return False
    try:
        read_checkpoint(checkpoint, identity=identity)
    except ArtifactError as error:
        raise ArtifactError(
            f"A run that was stopped left {printable(str(checkpoint))}, and this one cannot go on with it: the file is "
            "damaged, or model, data or settings are others. Give the same ones, delete the file, or name another "
            "folder with -o."
        ) from error
    return True
