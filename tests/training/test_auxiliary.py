"""Auxiliary classifiers: a table, whose network has no layers for them, is learned without."""

from dataclasses import replace

import torch

from keyed_xai.models.networks import TableMLP
from keyed_xai.training import train
from keyed_xai.training.auxiliary import auxiliary_layers, make_auxiliary_classifiers
from keyed_xai.training.batches import Run
from tests.heard import Heard
from tests.trained import SHORT, Blobs, table_task


def test_table_trains_without_auxiliary_classifiers_and_batch_norm():
    torch.manual_seed(0)
    network, rows = TableMLP(7, 2, (8, 6)).eval(), Blobs(torch.randn(30, 1, 1, 7), None)
    task = table_task()
    assert auxiliary_layers(task) == []
    assert len(make_auxiliary_classifiers(Run(reference=network, data=rows, task=task, settings=SHORT))) == 0
    heard = Heard()
    settings = replace(SHORT, steps=40, batch_size=10, learning_rate=1e-2, smoothing=8.0, order="forward")
    result = train(network, rows, rows, task, settings, progress=heard)
    assert heard.figures[-1]["move_loss"] < 0.8 * heard.figures[0]["move_loss"]
    assert result.history[-1]["loss"] < result.history[0]["loss"]
