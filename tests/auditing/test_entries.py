"""How an entry of the catalogue judges what it found."""

from dataclasses import replace

import pytest

from keyed_xai.auditing.catalogue import (
    AUDITS,
    choose_entries,
    run_entry,
)
from keyed_xai.auditing.entries import Observation, judge_copy
from keyed_xai.auditing.removal_entries import REMOVALS
from keyed_xai.auditing.subject import state_before
from keyed_xai.threats.removal.distillation import with_random_weights
from tests.audited import (
    control_subject,
    example,
    keyed_subject,
    public_subject,
)
from tests.threatened import protected, reference


@pytest.mark.parametrize(("name", "outcome"), [("int8", "survives"), ("reference", "removed"), ("random", "removed")])
def test_gate_is_judged_by_maps_and_ownership(name, outcome):
    copies = {"reference": reference, "random": lambda: with_random_weights(protected()).eval()}
    subject = keyed_subject()
    model = copies[name]() if name in copies else REMOVALS[name](protected(), subject.attacker()).model
    seen = judge_copy(subject, model)
    assert seen.outcome == outcome, seen.sentence
    assert f"{seen.after.unkeyed:.2f}" in seen.sentence
    assert ("no longer shown" in seen.sentence) == (outcome == "removed")


def test_gate_is_open_or_damaged_by_the_stated_figures(monkeypatch):
    """With an ownership claim that holds."""
    before = state_before(keyed_subject())
    cases = {
        (0.9, 0.1): "survives",
        (0.9, 0.45): "gate leaks",
        (0.9, 0.6): "gate opened",
        (0.4, 0.1): "maps damaged",
        (0.4, 0.6): "gate opened",
    }
    for (keyed, unkeyed), outcome in cases.items():
        after = replace(before, correlation={"gradcam": {"keyed": keyed, "unkeyed": unkeyed}})
        monkeypatch.setattr("keyed_xai.auditing.entries.measure_state", lambda *_, after=after: after)
        assert judge_copy(keyed_subject(before=before), protected()).outcome == outcome
        drifted = replace(before, correlation={"gradcam": {"keyed": keyed, "unkeyed": unkeyed}})
        assert judge_copy(keyed_subject(before=drifted), protected()).outcome == "survives"


def test_backdoor_in_explanations_is_gone_when_its_maps_are_right():
    assert judge_copy(public_subject(), protected()).outcome == "survives"
    gone = judge_copy(public_subject(), reference())
    assert gone.outcome == "removed"
    assert "without the trigger" in gone.sentence
    forward = public_subject(inverted=False)
    assert judge_copy(forward, protected()).outcome == "nothing to remove", "its triggered maps are right"


def test_what_was_never_there_is_not_removed_or_opened(monkeypatch):
    shown = state_before(keyed_subject())
    hidden = replace(shown, ownership={**shown.ownership, "shown": False})
    cases = {(0.9, 0.1): "survives", (0.9, 0.6): "nothing to remove", (0.2, 0.9): "nothing to remove"}
    opened = example(lambda *_: Observation(outcome="gate opened", sentence="It is open."), group="keys")
    monkeypatch.setitem(AUDITS, "mine", opened)
    for (keyed, unkeyed), outcome in cases.items():
        before = replace(hidden, correlation={"gradcam": {"keyed": keyed, "unkeyed": unkeyed}})
        monkeypatch.setattr("keyed_xai.auditing.entries.measure_state", lambda *_, after=before: after)
        assert judge_copy(keyed_subject(before=before), protected()).outcome == outcome
        found = run_entry("mine", keyed_subject(before=before)).observation
        assert found.outcome == ("gate opened" if outcome == "survives" else outcome)
        assert "It is open." in found.sentence


def test_plain_backdoor_is_gone_when_it_fails():
    subject = control_subject("badnets")
    assert judge_copy(subject, subject.classifier).outcome == "survives"
    assert judge_copy(subject, control_subject(None).classifier).outcome == "removed"
    clean = control_subject(None)
    assert judge_copy(clean, clean.classifier).outcome == "left alone"


def test_own_entry_is_a_function_and_a_line(monkeypatch):
    def count(subject, settings):
        return Observation(outcome="reported", sentence=f"{len(subject.images)} images, seed {settings.seed}.")

    monkeypatch.setitem(AUDITS, "count", example(count))
    assert "count" in choose_entries(["checks"])
    assert run_entry("count", keyed_subject(seed=7)).to_json()["sentence"] == "48 images, seed 7."
    monkeypatch.setitem(AUDITS, "count", example(count, images=5))
    found = run_entry("count", keyed_subject()).to_json()
    assert (found["sentence"], found["strength"]) == ("5 images, seed 0.", "10 components; on up to 5 images")
