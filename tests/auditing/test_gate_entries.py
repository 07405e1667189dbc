"""Checks, key attacks and other explanations as an audit runs them: outcomes rest on the figures that they name."""

import json
from dataclasses import replace

import pytest

from keyed_xai.auditing.catalogue import AUDITS, run_entry
from keyed_xai.threats.bypass.attributions import AttributionSettings
from keyed_xai.threats.keys.inversion import InversionSettings
from tests.audited import SECRETS, keyed_subject, make_image_data, public_subject
from tests.threatened import surrogate

BRIEF = InversionSettings(steps=4, restarts=2, stages=2)


def judged(reached):
    return "resists" if reached <= 0.3 else "gate opened" if reached > 0.5 else "gate leaks"


def test_near_keys_are_judged_by_the_wrong_key_that_opens_most():
    seen = run_entry("near-keys", keyed_subject()).observation
    near = {row["name"]: row for row in seen.figures["rows"] if row["kind"] == "near key"}
    wrong = [near.pop(name) for name in ("one flipped bit", "another owner's key")]
    assert [row["keys"] for row in wrong] == [32, 32]
    highest = max(row["highest"]["gradcam"] for row in wrong)
    assert seen.outcome == judged(highest)
    assert f"at most {highest:.2f} with the right ones" in seen.sentence
    assert max(near.values(), key=lambda row: row["highest"]["gradcam"])["name"] in seen.sentence


def test_channels_are_judged_by_the_one_that_damages_most():
    seen = run_entry("channels", keyed_subject()).observation
    rows = {row["name"]: row["correlation"]["gradcam"] for row in seen.figures["rows"] if row["kind"] == "channel"}
    worst = min(rows, key=rows.__getitem__)
    assert f"{rows[worst]:.2f} with the right ones ({worst})" in seen.sentence
    assert seen.outcome == ("survives" if rows[worst] >= 0.8 else "maps damaged")
    shut = [name for name, value in rows.items() if value < 0.5]
    assert all(name in seen.sentence for name in shut)


def test_pairs_of_images_give_the_trigger_away():
    seen = run_entry("recovery", keyed_subject(data=make_image_data(600, 5))).observation
    assert seen.outcome == "gate opened"
    assert {row["source"] for row in seen.figures["rows"]} == {"pairs", "keyed", "keyed, others"}
    assert "pairs of clean and keyed image" in seen.sentence


@pytest.mark.parametrize("name", ["inversion", "inversion-surrogate"])
def test_inversion_is_judged_by_what_the_found_texture_opens(name):
    assert AUDITS[name].settings == InversionSettings()
    seen = replace(AUDITS[name], settings=BRIEF).run(keyed_subject(surrogate=surrogate()))
    assert seen.outcome == judged(seen.curve[-1]["recovered"])
    assert [row["step"] for row in seen.curve] == [0, 2, 4]
    assert ("surrogate" in seen.figures["aim"]) == (name != "inversion")


def test_forged_texture_is_no_key():
    assert AUDITS["forgery"].settings == InversionSettings()
    seen = replace(AUDITS["forgery"], settings=BRIEF).run(keyed_subject())
    assert seen.outcome == "resists"
    assert not seen.figures["verify"]["shown"]
    assert f"{seen.figures['own_test']['statistic']:.2f}" in seen.sentence


def test_other_explanations_are_judged_by_the_one_that_recovers_most():
    assert AUDITS["bypass"].settings == AttributionSettings()
    brief = replace(AUDITS["bypass"], settings=AttributionSettings(methods=("saliency", "input-x-gradient")))
    seen = brief.run(keyed_subject())
    best = max(row["recovered"]["gradcam"]["unkeyed"]["correlation"] for row in seen.figures["rows"])
    assert seen.outcome == judged(best)
    assert f"{best:.2f}" in seen.sentence
    assert len(brief.run(public_subject(trigger=None)).figures["rows"]) == len(seen.figures["rows"])


def test_checks_need_no_key_and_screening_needs_a_trigger():
    alone = public_subject(trigger=None, reference=None)
    assert not AUDITS["consistency"].lacks(alone)
    assert "trigger" in AUDITS["screening"].lacks(alone)
    seen = run_entry("consistency", alone).observation
    assert seen.outcome == "reported"
    assert min(v for k, v in seen.figures["means"].items() if k.startswith("consistency/")) == pytest.approx(
        float(seen.sentence.split(", ")[1].split(")")[0]), abs=0.006
    )


def test_screening_is_judged_by_its_best_check():
    seen = run_entry("screening", public_subject()).observation
    power = max(max(each["auroc"], 1 - each["auroc"]) for each in seen.figures["checks"])
    assert f"{power:.2f}" in seen.sentence
    assert seen.outcome == ("flagged" if power >= 0.8 else "left alone" if power <= 0.65 else "unclear")


def test_screening_of_too_few_images_says_so():
    few = run_entry("screening", public_subject().first(4)).observation
    assert (few.outcome, few.sentence) == ("failed", "Expected 6 held-out images or more, got 4. Raise --held-out.")


@pytest.mark.parametrize("name", ["near-keys", "channels", "recovery", "consistency", "screening"])
def test_finding_is_ready_for_json_and_holds_no_secret(name):
    document = json.dumps(run_entry(name, keyed_subject()).to_json(), allow_nan=False)
    assert not [secret for secret in SECRETS if secret in document]


def test_keys_are_asked_for_by_the_entries_that_need_them():
    for name in ("near-keys", "channels", "recovery", "inversion", "forgery"):
        assert AUDITS[name].lacks(public_subject(reference=None)) == "the owner's key and the reference model"
        assert run_entry(name, public_subject()).observation.outcome == "failed"
