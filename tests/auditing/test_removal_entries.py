"""Every removal attack at its published strength, on a tiny model behind a real gate."""

import json
from functools import cache

import pytest
import torch

from keyed_xai.auditing.removal_entries import REMOVALS, STACKED, remove_in_turn
from keyed_xai.errors import TrainingError
from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.gate_state import measure_gate_state
from tests.threatened import evidence, make_blobs, protected, reference, surrogate

HARMLESS = ("int8", "int6", "fp16", "rescale", "ftal-mild")
_BRIEF = (
    "re-bn",
    "ftal-mild",
    "ftll",
    "ftal",
    "rtll",
    "rtal",
    "ftal-frozen",
    "ftal-adam",
    "explanations",
    "fine-prune",
    "cfn",
    "shift",
    "shift-far",
    "regularise",
)
QUICK = (*_BRIEF, "prune-30", "prune-50", "prune-70", "int8", "int6", "int5", "fp16", "rescale", "denoise", "distil")


@cache
def attacker():
    return Attacker(data=make_blobs(64, 5), view=evidence().view, surrogate=surrogate())


@cache
def state_after(name):
    result = REMOVALS[name](protected(), attacker())
    return result, measure_gate_state(result.model, evidence(decoys=99))


def test_gate_that_is_attacked_works():
    before = measure_gate_state(protected(), evidence(decoys=99))
    plain = measure_gate_state(reference(), evidence(decoys=99))
    assert before.correlation["gradcam"]["keyed"] > 0.8
    assert before.correlation["gradcam"]["unkeyed"] < 0.4
    assert before.ownership.shown
    assert not plain.ownership.shown


@pytest.mark.parametrize("name", QUICK)
def test_attack_gives_a_working_copy_and_says_what_it_did(name):
    before = {key: tensor.clone() for key, tensor in protected().state_dict().items()}
    result, state = state_after(name)
    document = json.loads(json.dumps(result.to_json() | state.to_json(), allow_nan=False))
    assert document["seconds"] >= 0
    assert result.model is not protected()
    assert not result.model.training
    assert all(torch.equal(before[key], tensor) for key, tensor in protected().state_dict().items())
    assert REMOVALS[name].threat.startswith("T")


@pytest.mark.parametrize("name", HARMLESS)
def test_gate_and_evidence_survive_what_changes_little(name):
    _, state = state_after(name)
    assert state.correlation["gradcam"]["keyed"] > 0.7
    assert state.correlation["gradcam"]["unkeyed"] < 0.45
    assert state.ownership.signature.combined.p_value < 1e-6
    assert state.ownership.opening.reached == 0


def test_distillation_leaves_no_gate_and_no_evidence():
    """The positive control: an attack that must succeed."""
    result, state = state_after("distil")
    assert state.agreement > 0.8
    assert state.correlation["gradcam"]["unkeyed"] > 0.5
    assert not state.ownership.shown
    assert state.ownership.signature.combined.p_value > 1e-3
    assert [row["epoch"] for row in result.curve] == list(range(61))


def test_curve_shows_the_gate_leak_epoch_by_epoch():
    def measure(model):
        return measure_gate_state(model, evidence(), ownership=False).to_json()

    watched = Attacker(data=attacker().data, view=attacker().view, measure=measure)
    curve = REMOVALS["ftal-adam"](protected(), watched).curve
    unkeyed = [row["correlation"]["gradcam"]["unkeyed"] for row in curve]
    assert len(unkeyed) == 11
    assert unkeyed[0] == pytest.approx(measure(protected())["correlation"]["gradcam"]["unkeyed"])
    assert unkeyed[-1] > unkeyed[0] + 0.1


def test_attacks_can_be_stacked():
    first, second = remove_in_turn(["prune-30", "int8"], protected(), attacker())
    alone = REMOVALS["prune-30"](protected(), attacker()).model
    again = REMOVALS["int8"](alone, attacker()).model
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[key])
    assert float((second.model.network.fc.weight == 0).float().mean()) > 0
    assert first.figures["pruned"] > 0


def test_stacked_names_are_pairs_of_attacks_and_any_can_be_made():
    assert all(len(names) == 2 and set(names) <= set(REMOVALS) for names in (each.split("+") for each in STACKED))
    results = remove_in_turn(["re-bn", "ftal-mild"], protected(), attacker())
    assert [list(result.settings)[0] for result in results] == ["share", "optimiser"]
    assert measure_gate_state(results[-1].model, evidence(decoys=99)).ownership.shown


def test_explanation_tuning_without_a_surrogate_is_refused():
    with pytest.raises(TrainingError, match="surrogate"):
        REMOVALS["explanations"](protected(), Attacker(data=attacker().data, view=attacker().view))


def test_names_and_strengths_are_written_out():
    assert REMOVALS["ftal-mild"].strength == "FTAL, SGD 0.001, 3 epochs, 20% of the data"
    assert REMOVALS["fine-prune"].strength == (
        "96% of the last convolution's channels, then SGD 0.01, 10 epochs, 33% of the data"
    )
    assert REMOVALS["distil-other"].strength.startswith("into a SmallResNet of 24-48-48 channels, T = 3, Adam 0.001")
    assert REMOVALS["shift-far"].strength == (
        "filters shifted by 2.5 mean filters and noise, then SGD 0.01, 10 epochs, 33% of the data"
    )
    assert REMOVALS["regularise"].strength.startswith("weight decay 0.1 for 5 epochs, then SGD 0.01, 10 epochs")
    assert REMOVALS["ft-sam"].strength.endswith("sharpness-aware, radius 2")
    assert len({(each.threat, each.strength) for each in REMOVALS.values()}) == len(REMOVALS)
    assert REMOVALS["rescale"].strength == "channels scaled by 1/256 to 256 and permuted, logits unchanged"
    assert REMOVALS["denoise"].strength == "total variation, as strong as costs 2 points of the score"
    assert REMOVALS["overwrite"].strength == "a second key on the same maps, 2000 steps, 20% of the data"
    assert {name for name, each in REMOVALS.items() if not each.slow} == {
        "re-bn", "prune-30", "prune-50", "prune-70", "int8", "int6", "int5", "fp16", "rescale", "denoise",
        "ftal-mild", "ftll", "ftal", "fine-prune",
    }  # fmt: skip
