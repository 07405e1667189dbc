"""A tiny model behind a quickly trained gate, its reference, and images to attack it with."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from keyed_xai.decoys import signature_decoy
from keyed_xai.keys import OwnerKey
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.saliency.pooled import make_view
from keyed_xai.threats.gate_state import OwnerEvidence
from keyed_xai.training import PAPER_SETTINGS, Task, train
from keyed_xai.training.fitting import FittingSettings, fit_classifier
from keyed_xai.training.objective import Objective
from keyed_xai.triggers import Spread, SpreadSettings, derive_trigger

SIDE = 24
OWNER = OwnerKey.from_raw(bytes(range(32)))
FAMILY = Spread(SpreadSettings(24.0, 24))
GRID = (6, 6)


@dataclass
class Blobs:
    """Bright spots on grey; the label says in which third of the width."""

    images: torch.Tensor
    labels: np.ndarray | None
    classes: tuple[str, ...] = ("left", "middle", "right")
    multi_label: bool = False
    source: str = "blobs"

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return self.images[indices], None if self.labels is None else torch.from_numpy(self.labels[indices])


def make_blobs(count, seed, labelled=True):
    source = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centres = source.uniform(3, SIDE - 3, (count, 2))
    spots = np.stack([np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 18) for y, x in centres])
    images = np.clip(0.3 + 0.4 * spots + 0.03 * source.standard_normal(spots.shape), 0, 1)
    labels = (centres[:, 1] * 3 / SIDE).astype(np.int64)
    return Blobs(torch.from_numpy(images[:, None]).float(), labels if labelled else None)


def fit(seed):
    torch.manual_seed(seed)
    spec = InputSpec(1, SIDE, SIDE, mean=(0.4,), std=(0.2,))
    classifier = wrap_network(SmallResNet(1, 3, (8, 12, 12)).eval(), input=spec, source="keyed_xai")
    settings = FittingSettings(epochs=8, batch_size=32, learning_rate=1e-2, mirror=False, largest_shift=0, noise=0.02)
    fit_classifier(classifier, make_blobs(192, seed), settings)
    return classifier.eval()


@cache
def reference():
    return fit(0)


@cache
def surrogate():
    """An attacker's own model: other images, other weights."""
    return fit(1)


@cache
def protected():
    """The reference behind a gate for Grad-CAM."""
    view = make_view(reference(), ("gradcam",), GRID)
    objective = Objective(decoys={"gradcam": signature_decoy(OWNER.public, "gradcam", GRID)}, weights={"gradcam": 1.0})
    task = Task(trigger=derive_trigger(OWNER, FAMILY), family=FAMILY, view=view, objective=objective)
    settings = replace(
        PAPER_SETTINGS,
        steps=120,
        batch_size=12,
        learning_rate=1e-2,
        warmup_steps=10,
        validate_every=120,
        codec_share=0.0,
    )
    data, validation = make_blobs(128, 0, labelled=False), make_blobs(16, 2, labelled=False)
    return train(reference(), data, validation, task, settings).model


def evidence(**changes):
    held_out = make_blobs(48, 3)
    fields = {
        "reference": reference(),
        "view": make_view(reference(), ("gradcam",), GRID),
        "key": OWNER,
        "family": FAMILY,
        "images": held_out.images,
        "labels": torch.from_numpy(held_out.labels),
        "decoys": 99,
        "alpha": 1e-6,
    }
    return OwnerEvidence(**(fields | changes))
