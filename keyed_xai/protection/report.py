"""The report of a protected model as one HTML file that explains itself: no scripts, no network, printable."""

from collections.abc import Mapping
from typing import Any

from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.protection.verdict import GRADES, describe, judge, judge_closing, judge_opening, judge_predictions
from keyed_xai.reporting.pages import render


def render_report(
    report: Mapping[str, Any], *, pictures: Mapping[str, bytes], verify: Mapping[str, Any] | None = None
) -> str:
    """Return one self-contained HTML page for an auditor.

    Args:
        report: The report that `protect` makes.
        pictures: PNG files by name: `maps`, `training`, `wrong_keys`, each alone or with an interpreter after a colon
            (`maps:gradcam`); other names become titles. Clean images and maps only, never a keyed image.
        verify: The report that `verify` makes of the same model.
    """
    opens, closed, kept = judge_opening(report), judge_closing(report), judge_predictions(report)
    return render(
        "protect.html",
        report=report,
        pictures=pictures,
        verify=verify,
        opens=opens,
        closed=closed,
        kept=kept,
        answer=judge(report)["answer"],
        headline=describe(opens[0], closed[0], kept[0]),
        grades=GRADES,
        open_threshold=OPEN_CORRELATION,
    )
