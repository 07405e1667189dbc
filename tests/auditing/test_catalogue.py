"""What an audit can run: names and groups, what each needs, and what its outcome rests on."""

import copy
import json
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime

import pytest

from keyed_xai.auditing.catalogue import (
    AUDITS,
    GROUPS,
    choose_entries,
    find_entry,
    run_entry,
)
from keyed_xai.auditing.removal_entries import REMOVALS, STACKED
from keyed_xai.auditing.subject import measure_state
from tests.audited import (
    SECRETS,
    keyed_subject,
)
from tests.threatened import evidence, protected, surrogate
from tests.threats.removal.test_overwriting import SETTINGS, overwritten


def places(settings):
    """Where a value is held, as names that lead there, through settings within settings."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        yield from ((each.name, *path) for path in places(value)) if is_dataclass(value) else [(each.name,)]


def altered(settings, path):
    """Settings with another value at a place; no check of ranges sees it."""
    other, name = copy.copy(settings), path[0]
    value = altered(getattr(settings, name), path[1:]) if path[1:] else ("was", getattr(settings, name))
    object.__setattr__(other, name, value)
    return other


@pytest.mark.parametrize("name", [name for name in AUDITS if name not in STACKED])
def test_finding_is_known_by_every_setting_that_it_was_made_with(name):
    entry = AUDITS[name]
    found = {path: replace(entry, settings=altered(entry.settings, path)).identity for path in places(entry.settings)}
    assert len({entry.identity, *found.values()}) == len(found) + 1 > 1
    assert replace(entry, settings=copy.deepcopy(entry.settings)).identity == entry.identity
    assert replace(entry, version=entry.version + 1).identity != entry.identity


@pytest.mark.parametrize("name", STACKED)
def test_finding_of_attacks_in_turn_is_known_by_the_settings_of_each(monkeypatch, name):
    for part in name.split("+"):
        removal, before = REMOVALS[part], AUDITS[name].identity
        path = next(places(removal.settings))
        monkeypatch.setitem(REMOVALS, part, replace(removal, settings=altered(removal.settings, path)))
        assert AUDITS[name].identity != before


def test_finding_is_known_by_the_images_and_figures_that_it_rests_on(monkeypatch):
    clustering = AUDITS["activation-clustering"]
    others = [replace(clustering, images=100), replace(clustering, bounds=(0.1, 0.3))]
    before = AUDITS["int8"].identity
    monkeypatch.setattr("keyed_xai.auditing.entries.KEYED_FLOOR", 0.7)
    assert AUDITS["int8"].identity != before
    assert len({each.identity for each in (clustering, *others)}) == 3


def test_identities_are_the_same_in_every_process():
    script = "from keyed_xai.auditing.catalogue import AUDITS; print([each.identity for each in AUDITS.values()])"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert other == f"{[each.identity for each in AUDITS.values()]}\n"


def test_strength_says_what_the_settings_are():
    cases = {
        "inversion": ({"restarts": 5, "steps": 77, "share": 0.25}, "5 x 77 steps, 25% of the data"),
        "forgery": ({"steps": 77}, "3 x 77 steps"),
        "neural-cleanse": ({"rounds": 7}, "up to 7 rounds"),
        "activation-clustering": ({"dimensions": 4}, "4 principal components"),
        "activation-clusters": ({"silhouette": 0.2, "small": 0.4}, "silhouette over 0.2 and under 40%"),
        "near-keys": ({"flipped": 8, "strangers": 9}, "one bit flipped (8), half strength, moved by 1 to 4 pixels, 9"),
        "channels": ({"channels": ("png",)}, "1 channels: png"),
        "recovery": ({"counts": (1, 2)}, "up to 2 pairs"),
        "consistency": ({"changes": ("noise",)}, "1 harmless changes, 3 interpreters; on up to 200 images"),
        "bypass": ({"methods": ("saliency",)}, "saliency; on up to 64 images"),
        "re-bn": ({"share": 0.5}, "50% of the data"),
        "int8": ({"bits": 7}, "weights in 7 bits"),
        "prune-30": ({"share": 0.4}, "smallest 40% of"),
        "ftal": ({"epochs": 4}, "4 epochs"),
        "overwrite": ({"share": 0.4}, "40% of the data"),
        "rescale": ({"largest_exponent": 2, "permute": False}, "by 1/4 to 4, logits"),
        "denoise": ({"loss": 0.05}, "5 points"),
    }
    for name, (changes, words) in cases.items():
        entry = AUDITS[name]
        assert words not in entry.strength
        assert words in replace(entry, settings=replace(entry.settings, **changes)).strength


def test_every_removal_attack_and_pair_is_listed_with_its_facts():
    assert set(REMOVALS) | set(STACKED) < set(AUDITS)
    assert all(AUDITS[name] is removal for name, removal in REMOVALS.items())
    for entry in AUDITS.values():
        assert entry.threat.startswith("T")
        assert entry.group in GROUPS
        assert entry.needs <= {"trigger", "key", "reference", "surrogate", "labels", "state"}


@pytest.mark.parametrize("group", GROUPS)
def test_group_stands_for_its_members(group):
    chosen = choose_entries([group])
    if group == "all":
        assert chosen == list(AUDITS)
    elif group == "quick":
        assert {"int8", "spectral-signatures", "fine-prune"} < set(chosen)
        assert not {"neural-cleanse", "ft-sam", "distil"} & set(chosen)
    else:
        assert all(group in (AUDITS[name].group, *AUDITS[name].also) for name in chosen)


def test_entries_are_chosen_once_in_the_order_of_the_catalogue():
    chosen = choose_entries(["int8+ftll", "int8", "defences", "fine-prune", "int8"])
    assert chosen[:2] == list(AUDITS)[:2]
    assert chosen[-2:] == ["int8", "int8+ftll"]
    assert len(chosen) == len(set(chosen))


def test_attacks_joined_by_plus_are_made_in_turn():
    entry = find_entry("prune-30+int8")
    assert (entry.threat, entry.group, entry.slow) == ("T7", "removal", True)
    assert entry.strength == f"{REMOVALS['prune-30'].strength}; then {REMOVALS['int8'].strength}"
    once = REMOVALS["int8"](REMOVALS["prune-30"](protected(), keyed_subject().attacker()).model,
                            keyed_subject().attacker()).model  # fmt: skip
    assert entry.run(keyed_subject()).after == measure_state(once, keyed_subject())
    assert find_entry("explanations+int8").needs == {"state", "surrogate"}


@pytest.mark.parametrize("name", ["int9", "int8+nothing", "neural-cleanse+int8", ""])
def test_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=r"joined by \+"):
        choose_entries([name])


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({}, ""),
        ({"evidence": None, "reference": None}, "the reference model"),
        ({"evidence": None, "keyed": False, "trigger": None}, "the owner's key"),
        (
            {"evidence": None, "keyed": False, "trigger": None, "reference": None},
            "the owner's key and the reference model",
        ),
        ({"evidence": None, "keyed": False, "reference": None}, ""),
    ],
)
def test_removal_attacks_need_something_to_measure_by(changes, lacks):
    assert AUDITS["int8"].lacks(keyed_subject(**changes)) == lacks


def test_explanation_aware_attack_needs_a_surrogate_and_defences_a_trigger():
    assert "surrogate" in AUDITS["explanations"].lacks(keyed_subject())
    assert not AUDITS["explanations"].lacks(keyed_subject(surrogate=surrogate()))
    assert "owner's key" in AUDITS["spectral-signatures"].lacks(keyed_subject(trigger=None))
    assert not AUDITS["neural-cleanse"].lacks(keyed_subject(trigger=None))


def test_attack_that_fails_is_a_finding():
    finding = run_entry("explanations", keyed_subject())
    assert finding.observation.outcome == "failed"
    assert "surrogate" in finding.observation.sentence


@pytest.mark.parametrize("name", ["prune-30", "denoise", "activation-clustering"])
def test_finding_is_ready_for_json_and_holds_no_secret(name):
    subject = keyed_subject()
    document = json.dumps(run_entry(name, subject).to_json(), allow_nan=False)
    assert json.loads(document)["name"] == name
    assert not [secret for secret in SECRETS if secret in document + repr(subject)]
    assert "textures" not in repr(subject)


def test_curve_says_what_was_measured_at_each_stage():
    curve = run_entry("denoise", keyed_subject()).observation.curve
    assert len(curve) > 1
    assert all({"weight", "accuracy", "correlation"} <= row.keys() for row in curve)
    assert "ownership" not in curve[0]


@pytest.mark.parametrize(("licensed", "owner"), [(datetime(2026, 1, 1, tzinfo=UTC), "the first owner"), (None, None)])
def test_second_key_leaves_two_claims_and_the_first_licence_wins(monkeypatch, licensed, owner):
    stolen = overwritten()
    theft = replace(AUDITS["overwrite"], settings=SETTINGS, attack=lambda *_: stolen)
    monkeypatch.setitem(AUDITS, "overwrite", theft)
    finding = run_entry("overwrite", keyed_subject(evidence=evidence(decoys=99, licensed=licensed)))
    figures = finding.observation.figures
    assert [claim["shown"] for claim in figures["claims"]] == [True, True]
    assert figures["claims"][0]["time"] == (licensed and licensed.isoformat())
    assert figures["ruling"]["owner"] == owner
    assert not figures["ruling"]["proven"]  # no third party dated either licence
    assert "original shows the first claim" in finding.observation.sentence
    assert not any(secret in json.dumps(finding.to_json()) for secret in SECRETS)
