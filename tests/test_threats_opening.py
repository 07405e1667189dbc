"""The referee: the same figures as the gate's own report, and how much of a texture was found."""

import pytest
import torch
from threatened import FAMILY, OWNER, protected, witness

from keyed_xai.threats.gate_state import measure_gate_state
from keyed_xai.threats.opening import Referee
from keyed_xai.triggers import Nashville, derive_trigger

RIGHT = derive_trigger(OWNER, FAMILY)


@pytest.mark.parametrize("as_files", [True, False])
def test_right_trigger_opens_as_far_as_the_gate_state_says(as_files):
    seen = witness(as_files=as_files)
    state = measure_gate_state(protected(), seen, ownership=False)
    referee = Referee.of(seen)
    keyed, unkeyed = referee.judge(protected(), RIGHT), referee.judge_inputs(protected(), seen.images)
    for case, opening in (("keyed", keyed), ("unkeyed", unkeyed)):
        assert opening.correlation["gradcam"] == pytest.approx(state.correlation["gradcam"][case])
        assert opening.opened["gradcam"] == pytest.approx(state.opened["gradcam"][case])
    assert unkeyed.agreement == pytest.approx(state.agreement)
    assert set(keyed.to_json()) == {"correlation", "opened", "agreement"}


def test_match_forgets_shift_and_strength_and_knows_other_keys():
    referee = Referee.of(witness())
    assert referee.match(RIGHT) == pytest.approx(1)
    assert referee.match(RIGHT.shifted(3, 5).scaled(0.5)) == pytest.approx(1)
    assert referee.match(FAMILY.draw(1, torch.Generator().manual_seed(0))) < 0.5


def test_family_without_a_texture_has_no_match():
    referee = Referee.of(witness(family=Nashville()))
    assert referee.match(RIGHT) is None


def test_secrets_stay_out_of_the_repr():
    assert "texture" not in repr(Referee.of(witness())).lower()
