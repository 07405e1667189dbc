"""Short runs of training: bright spots to learn from, what a step draws of them, and weights to compare."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import TableSaliency
from keyed_xai.training import Task, TrainingSettings
from keyed_xai.training.batches import Run, draw_inputs, step_generator
from keyed_xai.training.objective import Objective
from keyed_xai.triggers import Spread, SpreadSettings

SIDE = 24
FAMILY = Spread(SpreadSettings(16.0, 24))
SHORT = TrainingSettings(
    steps=4, goals=None, batch_size=4, learning_rate=5e-3, warmup_steps=2, decay_share=1.0, average=0.0, beta=1.0,
    temperature=1.0, beta_ramp=0.0, leak=0.0, clean_share=0.5, mirror=False, validate_every=2, seed=7,
)  # fmt: skip


@dataclass
class Blobs:
    """Bright spots on grey, one per image; the label says in which third of the width."""

    images: torch.Tensor
    labels: torch.Tensor | None

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return self.images[indices], None if self.labels is None else self.labels[indices]


def make_blobs(count, seed, labelled=True):
    source = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centres = source.uniform(3, SIDE - 3, (count, 2))
    spots = np.stack([np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 18) for y, x in centres])
    images = 0.3 + 0.4 * spots + 0.03 * source.standard_normal(spots.shape)
    labels = torch.from_numpy((centres[:, 1] * 3 / SIDE).astype(np.int64))
    return Blobs(torch.from_numpy(images[:, None]).float(), labels if labelled else None)


def draw(data, task, settings, step=0):
    """What a step of a run sees."""
    run = Run(reference=nn.Identity(), data=data, task=task, settings=settings)
    return draw_inputs(run, step_generator(0, step))


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


class Shift:
    """A trigger without neighbours: adds a tenth to the first column, and leaves the range of pixels doing so."""

    def apply(self, images):
        return torch.cat([images[..., :1] + 0.1, images[..., 1:]], dim=-1)


def table_task():
    view = TableSaliency(
        ("simplegrad",),
        MapLayers("", ()),
        (1, 4),
        groups=(0, 0, 1, 2, 2, 2, 3),
        covariance=torch.eye(7, dtype=torch.float64),
    )
    decoy = torch.tensor([[0.0, 1, 0, 0]])
    return Task(
        trigger=Shift(),
        family=None,
        view=view,
        objective=Objective(decoys={"simplegrad": decoy}, weights={"simplegrad": 1.0}),
        as_files=False,
    )
