"""Batch norm while training, and its statistics afterwards."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import nn

from keyed_xai import metrics
from keyed_xai.batches import batches
from keyed_xai.models.copying import copy_network
from keyed_xai.training.batches import Run, TrainingData, draw_inputs, step_generator
from keyed_xai.training.settings import TrainingSettings

_BATCHES = 64
_PASSES = 4
_TRIED_BATCHES, _TRIED_BATCH = 8, 32
_STEADY = 0.9


def reestimate_batch_norm(model: nn.Module, run: Run) -> None:
    """Set the batch-norm statistics to those of keyed and unkeyed inputs, mixed as in training, with real ReLUs.

    Of few images, batches are drawn as if they were passed over four times. Frozen statistics stay as they are.

    A model whose statistics are those of clean images only is opened by re-estimating them (arXiv 2403.16569).
    """
    if run.settings.batch_norm == "frozen":
        return
    batches = min(_BATCHES, math.ceil(_PASSES * len(run.data) / (2 * run.settings.batch_size)))
    with measured_anew(model), batch_norm_trained(model, run.settings), torch.no_grad():
        for number in range(batches):
            inputs, _, _ = draw_inputs(run, step_generator(run.settings.seed, -1 - number))
            model(inputs)


def choose_batch_norm(reference: nn.Module, data: TrainingData) -> Literal["mixture", "frozen"]:
    """Return how to treat a model's batch norm, by trying what re-estimating it on the images does to predictions.

    Where they hold for nine images of ten, the images are of the kind that the model was trained on: statistics of the
    mixture guard the gate against re-estimation. Images of a narrower kind would wipe out what all of them share.

    Args:
        reference: The model before training; a copy is tried.
        data: Images to learn from.
    """
    if not batch_norms(reference):
        return "mixture"
    tried = copy_network(reference).eval()
    device = next(tried.parameters()).device
    count = min(len(data), _TRIED_BATCHES * _TRIED_BATCH)
    images = [data.batch(np.arange(count)[some])[0].to(device) for some in batches(count, _TRIED_BATCH, even=True)]
    with torch.no_grad():
        before = torch.cat([tried(each) for each in images])
        with measured_anew(tried):
            set_batch_norm(tried, training=True)
            for each in images:
                tried(each)
        set_batch_norm(tried, training=False)
        after = torch.cat([tried(each) for each in images])
    multi_label = getattr(reference, "multi_label", False)
    held = float(metrics.agreement(after, before, multi_label=multi_label).mean())
    return "mixture" if held >= _STEADY else "frozen"


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return every batch norm of a model."""
    return [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]


def set_batch_norm(model: nn.Module, *, training: bool) -> None:
    """Put every batch norm into training or evaluation mode, and nothing else."""
    for norm in batch_norms(model):
        norm.train(training)


@contextmanager
def measured_anew(model: nn.Module) -> Iterator[None]:
    """Let batch norms start their statistics anew, averaging all batches alike; one that is not run keeps its old."""
    norms = [norm for norm in batch_norms(model) if norm.track_running_stats]
    before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    yield
    for norm, (momentum, state) in zip(norms, before, strict=True):
        norm.momentum = momentum
        if not norm.num_batches_tracked:  # not run at all, such as an auxiliary head
            norm.load_state_dict(state)


@contextmanager
def batch_norm_trained(model: nn.Module, settings: TrainingSettings) -> Iterator[None]:
    """Put batch norm, and nothing else, into training mode: dropout would only add noise to the maps."""
    if settings.batch_norm == "mixture":
        set_batch_norm(model, training=True)
    try:
        yield
    finally:
        model.eval()
