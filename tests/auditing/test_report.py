"""The page and the printed table say what was found, in its colour, and nothing in a report can break them."""

import html
import re

import pytest

from keyed_xai.auditing.report import grade_outcome, list_findings, render_audit_report
from keyed_xai.auditing.running import audit
from tests.audited import ATTACKERS, OTHERS, keyed_suspect, quick

PNG = b"\x89PNG\r\n\x1a\n"


def state(accuracy, keyed=None, unkeyed=None, shown=None):
    found = {"accuracy": accuracy, "measure": "top1"}
    if keyed is not None:
        found["correlation"] = {"gradcam": {"keyed": keyed, "unkeyed": unkeyed}}
    if shown is not None:
        log2_p = -60.0 if shown else -1.0
        found["ownership"] = {"shown": shown, "log2_p": log2_p, "signature": {"p_value": 0, "log2_p": log2_p}}
    return found


def finding(name, outcome, after=None, group="removal"):
    found = {
        "name": name,
        "group": group,
        "threat": "T2",
        "title": name.capitalize(),
        "strength": f"{name} hard",
        "outcome": outcome,
        "sentence": f"{name} said.",
        "figures": {},
        "curve": [],
        "seconds": 1.0,
    }
    return found if after is None else found | {"before": state(0.9, 0.97, 0.1, True), "after": after}


def a_report(*findings, **changes):
    report = {
        "model": {"name": "m.keyed", "kind": "keyed", "architecture": "SmallResNet", "interpreters": ["gradcam"],
                  "known": ["key", "reference"], "before": state(0.9, 0.97, 0.1, True), "key_id": "ab" * 32},
        "findings": list(findings),
        "not_run": [{"name": "explanations", "title": "Explaining", "strength": "hard", "why": "needs a surrogate"}],
        "controls": {},
        "defences": [],
        "notes": ["A note to read."],
        "data": {"train": {"source": "a", "images": 3000}, "held_out": {"source": "b", "images": 500}},
        "settings": {"seed": 0},
        "seconds": 12.0,
        "versions": {"torch": "2"},
    }  # fmt: skip
    return report | changes


SURVIVED = finding("int8", "survives", state(0.9, 0.97, 0.12, True))
OPENED = finding("ftal", "gate opened", state(0.895, 0.9, 0.6, True))
REMOVED = finding("distil", "removed", state(0.89, 0.1, 0.1, False))
COSTLY = finding("prune", "removed", state(0.4, 0.1, 0.1, False))
NOTICED = finding("clusters", "flagged", group="defences")


def words(report, **options):
    page = render_audit_report(report, **options)
    return " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S)).split())


def cells(report, title, place=0):
    """The classes and words of the cells in a row of a title."""
    rows = [row for row in re.findall(r"<tr>.*?</tr>", render_audit_report(report), re.S) if f">{title}<" in row]
    found = re.findall(r"<td(?: class=\"([^\"]*)\")?>(.*?)</td>", rows[place], re.S)
    return [(kind.strip(), re.sub(r"<[^>]*>", " ", text).split()) for kind, text in found]


def test_real_report_renders_with_all_that_was_found():
    result = audit(keyed_suspect(), ATTACKERS, OTHERS, quick("int8", "denoise", "spectral-signatures", controls=False))
    assert set(result.pictures) == {"curve:denoise"}
    said = words(result.report, pictures=result.pictures)
    for found in result.report["findings"]:
        for field in ("title", "strength", "outcome", "sentence"):
            assert found[field] in said
    assert "data:image/png;base64" in render_audit_report(result.report, pictures=result.pictures)
    assert "<script" not in render_audit_report(result.report, pictures=result.pictures)


def test_row_says_what_was_tried_what_it_cost_and_what_was_left():
    result, accuracy, keyed, unkeyed, ownership = cells(a_report(OPENED), "Ftal")
    assert result == ("bad", ["gate", "opened", "ftal", "said."])
    assert accuracy == ("figure good", ["89.5", "%", "-0.5", "points"])
    assert (keyed, unkeyed) == (("figure good", ["0.900"]), ("figure bad", ["0.600"]))
    assert (ownership[0], ownership[1][:2]) == ("power good", ["shown,", "2^-60.0"])


def test_attack_that_costs_too_much_is_marked_and_not_counted():
    assert cells(a_report(COSTLY), "Prune")[1][0] == "figure bad"
    said = words(a_report(COSTLY, SURVIVED))
    assert "Nothing was found, opened or removed by 2" in said
    assert "Is ownership still shown? Yes After 1 of 1" in said
    said = words(a_report(REMOVED, SURVIVED))
    assert "Ownership or a backdoor is removed by: Distil." in said
    assert "Is ownership still shown? In part After 1 of 2" in said


def test_headline_names_what_got_through():
    said = words(a_report(OPENED, NOTICED, SURVIVED))
    assert "The gate is opened by: Ftal. The trigger is noticed by: Clusters." in said
    assert "Does the gate hold? In part After 1 of 2" in said


def test_columns_without_figures_vanish():
    assert len(cells(a_report(NOTICED), "Clusters")) == 1
    plain = finding("fine", "survives") | {"before": state(0.9), "after": state(0.9)}
    assert len(cells(a_report(plain), "Fine")) == 2


def test_every_interpreter_has_its_line():
    both = state(0.9, shown=True) | {
        "correlation": {name: {"keyed": keyed, "unkeyed": 0.0} for name, keyed in (("gradcam", 0.9), ("vbp", 0.6))}
    }
    keyed = cells(a_report(finding("int8", "survives", both)), "Int8")[2]
    assert keyed == ("figure middling", ["0.900", "gradcam", "0.600", "vbp"])


def test_defences_are_shown_beside_their_controls():
    outcomes = {"clean": "flagged", "badnets": "flagged", "blended": "left alone"}
    judged = {"name": "clusters", "title": "Clusters", "outcomes": outcomes, "verdict": "proves nothing here",
              "sentence": "It also flags a clean network."}  # fmt: skip
    control = {"poisoned": 33, "before": state(0.8) | {"attack_success": 0.95}, "findings": []}
    controls = dict.fromkeys(("clean", "badnets", "blended"), control)
    report = a_report(SURVIVED, finding("clusters", "unclear", group="defences"), defences=[judged], controls=controls)
    own, clean, badnets, blended, worth = cells(report, "Clusters", place=-1)
    assert [each[0] for each in (clean, badnets, blended)] == ["bad", "good", "bad"]
    assert (worth[0], worth[1][:3]) == ("bad", ["proves", "nothing", "here"])
    assert own == ("outcome middling", ["unclear"])
    assert "95.0 %" in words(report)
    assert "Do defences notice" not in words(report), "it proves nothing"
    assert "noticed" not in words(a_report(NOTICED, defences=[judged], controls=controls))
    trusted = a_report(NOTICED, defences=[judged | {"verdict": "works here"}], controls=controls)
    assert "Do defences notice the trigger? Yes 1 of the 1" in words(trusted)


def test_what_was_not_run_and_notes_are_listed():
    said = words(a_report(SURVIVED))
    assert "Explaining hard needs a surrogate" in said
    assert "A note to read." in said


def test_curves_are_shown_with_the_controls_folded():
    pictures = {"curve:int8": PNG, "curve:badnets:int8": PNG}
    page = render_audit_report(a_report(SURVIVED), pictures=pictures)
    assert page.count("<figure>") == 2
    assert "Int8, patch backdoor" in page


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\nb\x1b[31m"])
def test_hostile_text_is_escaped(evil):
    report = a_report(SURVIVED | {"title": evil, "strength": evil, "sentence": evil, "outcome": evil}, notes=[evil])
    report["model"]["name"] = report["model"]["architecture"] = report["data"]["train"]["source"] = evil
    report["not_run"] = [dict.fromkeys(("name", "title", "strength", "why"), evil)]
    report["settings"] = report["versions"] = {evil: evil}
    page = render_audit_report(report, pictures={"curve:int8": PNG})
    assert "<script" not in page
    assert page.count("<img") == 1
    assert "&amp;lt;" not in page, "escaped twice"
    assert "\x1b" not in page


def test_report_without_findings_renders():
    assert "Nothing was run." in words(a_report())
    assert list_findings(a_report()) == (["", "result"], [])


def test_what_was_never_there_is_not_called_removed():
    before = state(0.9, 0.95, 0.93, False)
    report = a_report(finding("prune", "nothing to remove", before) | {"before": before})
    report["model"]["before"] = before
    said = words(report)
    assert "There was nothing to remove" in said
    assert "Does the gate hold?" not in said
    assert "Is ownership still shown?" not in said
    assert cells(report, "Prune")[0][0] == ""
    assert cells(report, "Before any attack")[3] == ("figure bad", ["0.930"])
    assert "fine-tuning (T2): prune hard" in said


def test_plain_table_has_the_worst_figure_of_each():
    heads, rows = list_findings(a_report(OPENED, NOTICED))
    assert heads == ["", "result", "accuracy", "keyed", "unkeyed", "ownership p"]
    assert rows[0] == ["Before any attack", "", "90.0 %", "0.970", "0.100", "2^-60.0"]
    assert rows[1:] == [
        ["Ftal", "gate opened", "89.5 %", "0.900", "0.600", "2^-60.0"],
        ["Clusters", "flagged", *[""] * 4],
    ]


def test_outcomes_have_colours():
    assert [grade_outcome(word) for word in ("removed", "unclear", "survives", "reported", "odd")] == [
        "bad",
        "middling",
        "good",
        "",
        "",
    ]
