"""Openings: the same figures as the gate's own report, and how much of a texture was found."""

import pytest
import torch

from keyed_xai.threats.gate_state import measure_gate_state
from keyed_xai.threats.keys.opening import match_texture, try_inputs, try_trigger
from keyed_xai.triggers import Nashville, derive_trigger
from tests.threatened import FAMILY, OWNER, evidence, protected

RIGHT = derive_trigger(OWNER, FAMILY)


@pytest.mark.parametrize("as_files", [True, False])
def test_right_trigger_opens_as_far_as_the_gate_state_says(as_files):
    seen = evidence(as_files=as_files)
    state = measure_gate_state(protected(), seen, ownership=False)
    keyed, unkeyed = try_trigger(protected(), seen, RIGHT), try_inputs(protected(), seen, seen.images)
    for case, opening in (("keyed", keyed), ("unkeyed", unkeyed)):
        assert opening.correlation["gradcam"] == pytest.approx(state.correlation["gradcam"][case])
        assert opening.opened["gradcam"] == pytest.approx(state.opened["gradcam"][case])
    assert unkeyed.agreement == pytest.approx(state.agreement)
    assert set(keyed.to_json()) == {"correlation", "opened", "agreement"}


def test_match_forgets_shift_and_strength_and_knows_other_keys():
    seen = evidence()
    assert match_texture(seen, RIGHT) == pytest.approx(1)
    assert match_texture(seen, RIGHT.shifted(3, 5).scaled(0.5)) == pytest.approx(1)
    assert match_texture(seen, FAMILY.draw(1, torch.Generator().manual_seed(0))) < 0.5


def test_family_without_a_texture_has_no_match():
    assert match_texture(evidence(family=Nashville()), RIGHT) is None


def test_secrets_stay_out_of_the_repr():
    seen = evidence()
    assert len(seen.trigger.textures) == 1
    assert "texture" not in repr(seen).lower()
