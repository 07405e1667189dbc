"""A training run that may be stopped and go on, and what every report says of it."""

import time
from pathlib import Path
from typing import Any

import torch

from keyed_xai.artifacts.checkpoint import checkpointed
from keyed_xai.artifacts.versions import package_versions
from keyed_xai.data import ImageData, TableData
from keyed_xai.data.splits import Subset
from keyed_xai.models import Classifier
from keyed_xai.progress import Progress
from keyed_xai.training import Task, TrainingResult, TrainingSettings, train
from keyed_xai.training.torch_errors import torch_errors_in_words


def run_training(
    classifier: Classifier,
    learn: Subset,
    validation: Subset,
    task: Task,
    settings: TrainingSettings,
    *,
    identity: str,
    device: torch.device | str,
    checkpoint: Path | None,
    resume: bool,
    progress: Progress,
) -> tuple[Classifier, TrainingResult]:
    """Return the trained copy of a classifier and how it got there; arguments are those of `training.train`.

    Args:
        classifier: The reference model.
        learn: Images to learn from.
        validation: Images that early stopping looks at.
        task: What is taught.
        settings: How to train.
        identity: What the run is about; a checkpoint of another run is refused.
        device: Where to train.
        checkpoint: File that a stopped run can go on from.
        resume: Go on from it.
        progress: Hears of the training.

    Raises:
        TrainingError: Training fails.
        ArtifactError: The checkpoint cannot be used, or another run is using it.
    """
    with (
        checkpointed(checkpoint, identity=identity, resume=resume) as (state, save),
        torch_errors_in_words(classifier.architecture),
    ):
        result = train(
            classifier,
            learn,
            validation,
            task,
            settings,
            device=device,
            checkpoint=state,
            save_checkpoint=save,
            progress=progress,
        )
    if not isinstance(result.model, Classifier):
        raise TypeError(f"Expected a Classifier back from training, got {type(result.model).__name__}.")
    return result.model, result


def describe_run(
    result: TrainingResult, learn: Subset, held_out: ImageData | TableData, *, measured: int, started: float
) -> dict[str, Any]:
    """Return a report's `seconds`, `history`, `stopped_early`, `data` and `versions`.

    Args:
        result: Result of the training.
        learn: What was learned from.
        held_out: What was measured on.
        measured: How many of those.
        started: When, by `time.monotonic`.
    """
    return {
        "seconds": time.monotonic() - started,
        "history": result.history,
        "stopped_early": result.stopped_early,
        "data": {
            "train": {"source": learn.data.source, "images": len(learn)},
            "held_out": {"source": held_out.source, "images": measured},
        },
        "versions": package_versions(),
    }
