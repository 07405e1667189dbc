"""What an audit found: a plain table, and one HTML file that explains itself: no scripts, no network, printable."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from keyed_xai.auditing.entries import ACCEPTED_LOSS, KEYED_FLOOR, THREATS, UNKEYED_CEILING
from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.reporting.pages import render
from keyed_xai.reporting.wording import Answer, as_decimal, as_power, as_share

_COLOURS = {
    "flagged": "bad",
    "gate opened": "bad",
    "removed": "bad",
    "forged": "bad",
    "unclear": "middling",
    "gate leaks": "middling",
    "maps damaged": "middling",
    "failed": "middling",
    "left alone": "good",
    "survives": "good",
    "resists": "good",
}
_TOLD = {
    "Ownership or a backdoor is removed by:": "removed",
    "A key is forged by:": "forged",
    "The gate is opened by:": "gate opened",
    "It leaks under:": "gate leaks",
    "The trigger is noticed by:": "flagged",
}
_NAMED = 3
_PLAIN = {
    "outcome": "result",
    "accuracy": "accuracy",
    "keyed": "keyed",
    "unkeyed": "unkeyed",
    "ownership": "ownership p",
}


def render_audit_report(report: Mapping[str, Any], *, pictures: Mapping[str, bytes] | None = None) -> str:
    """Return one self-contained HTML page.

    Args:
        report: The report that `audit` makes.
        pictures: PNG files by name: "curve:" and a finding's name, or "curve:", a control's, ":" and a finding's.
    """
    return render(
        "audit.html",
        report=report,
        pictures=pictures or {},
        columns=_columns(report),
        threats=THREATS,
        summary=_summary(report),
        ownership_kept=_judge(report, _ownership_kept),
        gate_kept=_judge(report, _gate_kept),
        fooling_kept=_judge(report, _fooling_kept),
        noticed=_judge_defences(report),
        outcomes=_outcomes(report),
        grade=grade_outcome,
        grade_maps=_grade_maps,
        is_cheap=_is_cheap,
    )


def list_findings(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of a plain table: what was tried, the result, and in few figures what is left."""
    columns = {name: title for name, title in _PLAIN.items() if name in _columns(report)}
    states = [("Before any attack", "", report["model"]["before"])] if len(columns) > 1 else []
    states += [(found["title"], found["outcome"], found.get("after", {})) for found in report["findings"]]
    rows = []
    for title, outcome, state in states:
        maps = state.get("correlation", {}).values()
        cells = {
            "outcome": outcome,
            "accuracy": as_share(state.get("accuracy")),
            "keyed": as_decimal(min((each["keyed"] for each in maps), default=None)),
            "unkeyed": as_decimal(max((each["unkeyed"] for each in maps), default=None)),
            "ownership": as_power(state.get("ownership", {}).get("log2_p")),
        }
        rows.append([title, *(cells[name] for name in columns)])
    return ["", *columns.values()], rows


def grade_outcome(outcome: str) -> str:
    """Return "good", "middling" or "bad" for the model audited; empty where an outcome is neither."""
    return _COLOURS.get(outcome, "")


def _columns(report: Mapping[str, Any]) -> list[str]:
    """Return the columns that have something in them."""
    after = [found["after"] for found in report["findings"] if "after" in found]
    columns = ["outcome", *(["accuracy"] if after else [])]
    if any("correlation" in state for state in after):
        columns += ["keyed", "unkeyed"]
    return [*columns, "ownership"] if any("ownership" in state for state in after) else columns


def _summary(report: Mapping[str, Any]) -> str:
    """Return what happened, in one sentence for each kind of thing that was tried."""
    worthless = {each["name"] for each in report["defences"] if each["verdict"] == "proves nothing here"}
    findings = report["findings"]
    counted = [found for found in findings if _is_cheap(found) and found["name"] not in worthless]
    sentences = []
    for words, outcome in _TOLD.items():
        titles = [found["title"] for found in counted if found["outcome"] == outcome]
        if titles:
            more = f" and {len(titles) - _NAMED} more" if len(titles) > _NAMED else ""
            sentences.append(f"{words} {'; '.join(titles[:_NAMED])}{more}.")
    if sentences:
        return " ".join(sentences)
    if any(found["outcome"] == "nothing to remove" for found in findings):
        return "There was nothing to remove: the model had no gate, mark or faked maps before any attack."
    nothing = f"Nothing was found, opened or removed by {len(findings)} defences and attacks."
    return nothing if findings else "Nothing was run."


def _judge(report: Mapping[str, Any], keeps: Callable[[Mapping[str, Any]], bool | None]) -> tuple[Answer | None, str]:
    """Return whether something is kept after all attacks that cost at most 2 points, and the count."""
    answers = [keeps(found) for found in report["findings"] if "after" in found and _is_cheap(found)]
    kept = [answer for answer in answers if answer is not None]
    if not kept:
        return None, ""
    said = f"After {sum(kept)} of {len(kept)} attacks that cost at most 2 points of accuracy."
    return ("yes" if all(kept) else "in part" if any(kept) else "no"), said


def _ownership_kept(found: Mapping[str, Any]) -> bool | None:
    was, now = (found[stage].get("ownership") for stage in ("before", "after"))
    return bool(now["shown"]) if was and was["shown"] and now else None


def _gate_kept(found: Mapping[str, Any]) -> bool | None:
    before, after = (found[stage].get("correlation", {}).values() for stage in ("before", "after"))
    leaked = max((each["unkeyed"] for each in before), default=0.0) > OPEN_CORRELATION
    if not after or leaked or "ownership" not in found["after"]:
        return None
    return all(_grade_maps([each[case]], case) == "good" for each in after for case in ("keyed", "unkeyed"))


def _fooling_kept(found: Mapping[str, Any]) -> bool | None:
    after = found["after"]
    if "ownership" in after or "correlation" not in after or found["outcome"] == "nothing to remove":
        return None
    return bool(found["outcome"] != "removed")


def _judge_defences(report: Mapping[str, Any]) -> tuple[Answer | None, str]:
    """Return whether the defences that work on the controls flag the model."""
    own = _outcomes(report)
    trusted = [own[each["name"]] for each in report["defences"] if each["verdict"] == "works here"]
    if not trusted:
        return None, ""
    flagged = sum(grade_outcome(word) == "bad" for word in trusted)
    said = f"{flagged} of the {len(trusted)} that catch both controls do."
    return ("yes" if flagged == len(trusted) else "in part" if flagged else "no"), said


def _grade_maps(values: Iterable[float], case: str) -> str:
    if case == "keyed":
        least = min(values)
        return "good" if least >= KEYED_FLOOR else "middling" if least > OPEN_CORRELATION else "bad"
    most = max(values)
    return "good" if most <= UNKEYED_CEILING else "middling" if most <= OPEN_CORRELATION else "bad"


def _is_cheap(found: Mapping[str, Any]) -> bool:
    if "after" not in found:
        return True
    return bool(found["before"]["accuracy"] - found["after"]["accuracy"] <= ACCEPTED_LOSS)


def _outcomes(report: Mapping[str, Any]) -> dict[str, str]:
    return {found["name"]: found["outcome"] for found in report["findings"]}
