"""Positive controls on disk: fitted once, and taken again where the same data were fitted to in the same way."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from keyed_xai.artifacts.documents import write_atomically
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.auditing.subject import to_device
from keyed_xai.data import ImageData
from keyed_xai.models import Classifier, load_classifier
from keyed_xai.progress import QUIET, Progress
from keyed_xai.threats.detection.controls import ControlSettings, PoisonedData, choose_control_fitting, fit_control

_CHUNK = 1000


def cached_control(
    name: str,
    data: ImageData | PoisonedData,
    held_out: ImageData,
    settings: ControlSettings,
    *,
    folder: Path | None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = QUIET,
) -> Classifier:
    """Return a control's network, from disk where it was fitted to the same data in the same way; else fit and keep it.

    Args:
        name: Name of the control, for its file.
        data: What it is fitted to.
        held_out: Clean images of the same classes.
        settings: Network and fitting; None as fitting takes `choose_control_fitting`'s.
        folder: Where controls are kept, made if need be; None keeps none.
        seed: Seed of a fitting that is chosen here.
        device: Device that the network is fitted on, and comes back on.
        progress: Hears of "fitting" one.

    Raises:
        TrainingError: There are no labels, or fewer images than a batch.
    """
    chosen = replace(settings, fitting=settings.fitting or choose_control_fitting(len(data), seed=seed))
    path = folder and folder / f"{name}-{_digest_fitted(data, chosen)[:16]}.safetensors"
    if path and path.is_file():
        model = load_classifier(path)
    else:
        model = fit_control(data, held_out, chosen, device=device, progress=progress).model
        if path:
            write_atomically(path, encode_weights(model))
    model = to_device(model, device)
    model.multi_label = data.multi_label
    return model


def _digest_fitted(data: ImageData | PoisonedData, settings: ControlSettings) -> str:
    """Return a digest of all that a control depends on, every image as it is fitted to."""
    digest = hashlib.sha256(repr((settings, len(data), data.classes)).encode())
    for indices in np.array_split(np.arange(len(data)), max(1, len(data) // _CHUNK)):
        images, labels = data.batch(indices)
        digest.update(images.numpy().tobytes() + (b"" if labels is None else labels.numpy().tobytes()))
    return digest.hexdigest()
