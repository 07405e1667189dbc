"""A thief's second key on a protected model: what both owners can show afterwards."""

import json
from dataclasses import replace
from functools import cache
from math import log2

import pytest
import torch

from keyed_xai.auditing.removal_entries import REMOVALS
from keyed_xai.errors import TrainingError
from keyed_xai.ownership.tests import measure_signature
from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.removal.overwriting import (
    OverwritingSettings,
    measure_dispute,
    measure_pattern_behind,
    overwrite,
)
from keyed_xai.training import PAPER_SETTINGS
from keyed_xai.triggers import derive_trigger
from tests.heard import Heard
from tests.threatened import OWNER, evidence, make_blobs, protected

TRAINING = replace(
    PAPER_SETTINGS, steps=120, batch_size=12, learning_rate=1e-2, warmup_steps=10, validate_every=60, codec_share=0.0
)
SETTINGS = OverwritingSettings(share=0.5, training=TRAINING, amplitude=24.0, tile=24)
BRIEF = replace(SETTINGS, training=replace(TRAINING, steps=2, validate_every=2))


def thief(images, **watched):
    return Attacker(data=make_blobs(images, 5), view=evidence().view, **watched)


@cache
def overwritten():
    return overwrite(protected(), thief(160), SETTINGS)


@cache
def dispute():
    return measure_dispute(overwritten().model, protected(), evidence(decoys=99), SETTINGS)


def test_second_key_opens_to_the_stolen_maps_and_its_claim_is_shown():
    second = dispute().second
    assert second.correlation["gradcam"]["keyed"] > 0.7
    assert second.correlation["gradcam"]["unkeyed"] < 0.4
    assert second.ownership.shown
    assert second.agreement > 0.85


def test_first_pattern_goes_from_unkeyed_maps_and_turns_up_behind_the_second_key():
    before = measure_pattern_behind(protected(), evidence(), SETTINGS).combined
    assert dispute().first.ownership.signature.combined.p_value > 1e-4
    assert dispute().behind.combined.p_value < 1e-6
    assert before.p_value < 1e-6  # there the second key opens nothing, and all maps show the first pattern


def test_first_claim_is_shown_by_what_is_behind_and_it_is_counted():
    assert dispute().first_shown
    weak = replace(dispute().behind.combined, log2_p=-10.0)
    lost = replace(dispute(), behind=replace(dispute().behind, combined=weak))
    assert lost.first_shown is dispute().first.ownership.shown is False
    edge = log2(dispute().first.ownership.alpha / 2)
    for difference, shown in ((-0.01, True), (0.01, False)):
        near = replace(weak, log2_p=edge + difference)
        assert replace(lost, behind=replace(lost.behind, combined=near)).first_shown is shown


def test_refused_claim_is_not_shown_by_what_is_behind():
    first = dispute().first
    refused = replace(first, ownership=replace(first.ownership, refused=True))
    assert not replace(dispute(), first=refused).first_shown


def test_pattern_behind_is_no_evidence_for_a_stranger():
    stranger = evidence(key=replace(SETTINGS, seed=7).key)
    assert measure_pattern_behind(overwritten().model, stranger, SETTINGS).combined.p_value > 1e-3


def test_pattern_behind_is_the_signature_test_on_keyed_maps():
    trigger = derive_trigger(SETTINGS.key, SETTINGS.family)
    _, maps = evidence().view.pooled_in_chunks(overwritten().model, trigger.apply(evidence().images[:16]))
    assert dispute().behind == measure_signature(maps, OWNER.public)


def test_original_of_the_first_owner_shows_nothing_of_the_second():
    claim = measure_dispute(protected(), protected(), evidence(decoys=19), SETTINGS).second
    assert not claim.ownership.shown


def test_stolen_model_stays_and_figures_hold_no_secret():
    before = {name: tensor.clone() for name, tensor in protected().state_dict().items()}
    result = overwrite(protected(), thief(60), BRIEF)
    assert all(torch.equal(tensor, before[name]) for name, tensor in protected().state_dict().items())
    assert not result.model.training
    text = json.dumps(result.to_json() | dispute().to_json(), allow_nan=False)
    for key in (OWNER, SETTINGS.key):
        assert key.derive_seed("spread").hex() not in text
    assert result.figures == {
        "images": 24,
        "second_key": SETTINGS.key.public.key_id,
        "interpreters": ["gradcam"],
    }


def test_curve_ends_with_what_is_measured_and_progress_is_told():
    heard = Heard()
    watched = thief(60, measure=lambda model: {"classes": model.classes}, progress=heard)
    result = overwrite(protected(), watched, BRIEF)
    assert [row["step"] for row in result.curve] == [2, 2]
    assert result.curve[-1] == {"step": 2, "classes": 3}
    assert heard.counts("training") == [(1, 2), (2, 2)]


def test_other_maps_can_be_closed_and_leave_the_first_pattern_where_it_was():
    settings = replace(BRIEF, interpreters=("simplegrad",))
    result = overwrite(protected(), thief(60), settings)
    found = measure_dispute(result.model, protected(), evidence(decoys=9), settings)
    assert list(found.second.correlation) == ["simplegrad"]
    assert found.first.ownership.signature.combined.p_value < 1e-6


def test_seed_decides_key_and_weights():
    first, again, other = (overwrite(protected(), thief(60), replace(BRIEF, seed=seed)) for seed in (1, 1, 2))
    assert first.figures["second_key"] == again.figures["second_key"] != other.figures["second_key"]
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        OverwritingSettings(share=share)


def test_too_few_images_are_refused():
    with pytest.raises(TrainingError, match="at least 10 images"):
        overwrite(protected(), thief(12), BRIEF)


def test_without_maps_to_close_nothing_is_overwritten():
    with pytest.raises(TrainingError, match="view of the maps"):
        overwrite(protected(), Attacker(data=make_blobs(60, 5)), BRIEF)


def test_names_put_the_second_key_on_the_same_maps_or_beside():
    same, beside = (
        replace(REMOVALS[name], settings=replace(BRIEF, share=1.0)) for name in ("overwrite", "overwrite-beside")
    )
    attacker = thief(40)
    assert same(protected(), attacker).figures["interpreters"] == ["gradcam"]
    assert beside(protected(), attacker).figures["interpreters"] == ["simplegrad"]
    both = replace(attacker, view=replace(attacker.view, interpreters=("gradcam", "simplegrad")))
    with pytest.raises(TrainingError, match="no other is left"):
        beside(protected(), both)
