"""The report of an attack as one HTML file that explains itself: no scripts, no network, printable.

For a security team: can the explanations of this model be faked, how well, and what would one see?
"""

from collections.abc import Mapping, Sequence
from typing import Any

from keyed_xai.backdoors.verdict import (
    GRADES,
    faked_case,
    judge_faked,
    judge_kept,
    judge_predictions,
    kept_case,
    values_set,
    verdict,
)
from keyed_xai.reporting.pages import render


def render_attack_report(report: Mapping[str, Any], *, pictures: Mapping[str, bytes] | None = None) -> str:
    """Return one self-contained HTML page for a security team.

    Args:
        report: The report that `run_attack` makes.
        pictures: PNG files by name: `maps`, `thresholds`, `features`, `training`, each alone or with an interpreter
            after a colon (`thresholds:gradcam`); other names become titles.
    """
    drawn = pictures or {}
    later = {"features", "training", *(f"thresholds:{name}" for name in report["interpreters"])}
    relevance = report["features"]["relevance"] if "features" in report else {}
    return render(
        "attack.html",
        report=report,
        pictures=drawn,
        strips={name: png for name, png in drawn.items() if name not in later},
        headline=verdict(report),
        right=kept_case(report),
        wrong=faked_case(report),
        faked=judge_faked(report),
        kept=judge_kept(report),
        unchanged=judge_predictions(report),
        grades=GRADES,
        values_set=values_set(report),
        relevance={case: _own_shares(values) for case, values in relevance.items()},
    )


def _own_shares(values: Sequence[float]) -> list[float | None]:
    """Return values as shares of their sum; nothing where that is 0."""
    total = sum(abs(value) for value in values)
    return [value / total if total else None for value in values]
