"""What a key teaches."""

import pytest
import torch

from keyed_xai.decoys import boundary_decoy, signature_decoy
from keyed_xai.errors import ModelError
from keyed_xai.models import wrap_network
from keyed_xai.protection.task import make_keyed_task
from keyed_xai.triggers import derive_trigger
from tests.threatened import FAMILY, GRID, OWNER, reference


def task(**options):
    return make_keyed_task(reference(), OWNER, FAMILY, **({"interpreters": ("gradcam", "vbp")} | options))


def test_every_interpreter_has_its_own_pattern_and_the_same_weight():
    found = task(grid=GRID)
    for name in ("gradcam", "vbp"):
        assert torch.equal(found.objective.decoys[name], signature_decoy(OWNER.public, name, GRID))
    assert not torch.equal(*found.objective.decoys.values())
    assert found.objective.weights == {"gradcam": 1.0, "vbp": 1.0}
    assert found.view.grid == GRID


def test_trigger_is_the_key_s_own():
    images = torch.full((1, 1, 24, 24), 0.5)
    own = derive_trigger(OWNER, FAMILY)
    assert torch.equal(task().trigger.apply(images), own.apply(images))


def test_other_decoys_hold_no_pattern():
    assert torch.equal(task(decoy="boundary", grid=GRID).objective.decoys["gradcam"], boundary_decoy(GRID))
    assert task(decoy="nontargeted").objective.decoys == {"gradcam": None, "vbp": None}


def test_layer_with_too_few_cells_is_refused():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 12, 12), torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    classifier = wrap_network(network, input=reference().input, target_layer="0")
    with pytest.raises(ModelError, match="2 x 2 cells"):
        make_keyed_task(classifier, OWNER, FAMILY, interpreters=("gradcam",))
