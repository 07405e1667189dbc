"""Fixtures of the tests of training: images to learn from and to validate on, and two tasks."""

import pytest

from keyed_xai.decoys import boundary_decoy, signature_decoy
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.training import Task
from keyed_xai.training.objective import Objective
from keyed_xai.triggers import MoireTrigger, derive_trigger
from tests.trained import FAMILY, make_blobs


@pytest.fixture(scope="module")
def data():
    return make_blobs(48, 0, labelled=False)


@pytest.fixture(scope="module")
def validation():
    return make_blobs(16, 1, labelled=False)


@pytest.fixture
def task(key, map_layers):
    objective = Objective(decoys={"gradcam": signature_decoy(key.public, "gradcam", (6, 6))}, weights={"gradcam": 1.0})
    trigger = derive_trigger(key, FAMILY)
    return Task(
        trigger=trigger, family=FAMILY, view=PooledSaliency(("gradcam",), map_layers, (6, 6)), objective=objective
    )


@pytest.fixture
def public_task(map_layers):
    objective = Objective(decoys={"gradcam": boundary_decoy((6, 6))}, weights={"gradcam": 1.0})
    return Task(
        trigger=MoireTrigger(), family=None, view=PooledSaliency(("gradcam",), map_layers, (6, 6)), objective=objective
    )
