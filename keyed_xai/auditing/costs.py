"""How long an audit will take, from what its parts cost on this model, these images and this machine."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from keyed_xai.auditing.entries import Entry
from keyed_xai.auditing.subject import Subject
from keyed_xai.models import Classifier
from keyed_xai.models.layout import SafeConvolutions
from keyed_xai.tensors import Images
from keyed_xai.threats.attempt import copy_model
from keyed_xai.threats.detection.controls import build_control, choose_control_fitting
from keyed_xai.threats.removal.tuning import TuningSettings

_TIMED = 32


def estimate_seconds(
    subject: Subject, entries: Sequence[Entry[Any]], *, measuring: float, controls: int, widths: tuple[int, ...]
) -> float:
    """Return about how many seconds entries take that are not slow: training, and measuring what each leaves.

    Args:
        subject: The model and its images.
        entries: What is run.
        measuring: Seconds that it takes to measure a state.
        controls: Networks that are fitted for the defences to be tested on.
        widths: Widths of the controls' blocks.
    """
    count = len(subject.data)
    passes = count * sum(map(_passes, entries))
    seconds = measuring * len(entries) + passes * seconds_to_train(subject.classifier, subject.images)
    if controls:
        control = build_control(subject.data, widths, seed=subject.seed).to(subject.device)
        defences = [entry for entry in entries if entry.controlled]
        passes = count * (choose_control_fitting(count).epochs + sum(map(_passes, defences)))
        each = measuring * len(defences) + passes * seconds_to_train(control, subject.images)
        seconds += controls * each
    return seconds


def _passes(entry: Entry[Any]) -> float:
    """Return how often an entry goes through the training images, in training."""
    tuning = getattr(entry.settings, "fine_tuning", entry.settings)
    return tuning.epochs * tuning.share if isinstance(tuning, TuningSettings) else 0.0


def seconds_to_train(classifier: Classifier, images: Images) -> float:
    """Return the seconds that a training step takes for each image, timed on a few; the model stays as it is."""
    model, few = copy_model(classifier, images.device), images[:_TIMED]
    for batch in (few[:2], few):  # the first makes ready what torch makes once
        started = time.perf_counter()
        with SafeConvolutions():
            logits = model(batch)
        torch.autograd.backward(functional.cross_entropy(logits, logits.argmax(1)))
        logits.detach().sum().item()  # waits for a GPU
    return (time.perf_counter() - started) / len(few)
