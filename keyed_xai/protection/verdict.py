"""What a protect report says in short: three answers with their figures, one sentence, and one verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

from keyed_xai.reporting.wording import Answer, as_share, overall

# Shares from which an answer is yes, and in part. GRADES says them in words.
_OPEN_MAPS = (0.9, 0.5)
_CLOSED_MAPS = (0.95, 0.5)
_WRONG_KEYS_REFUSED = (0.999, 0.5)
_PREDICTIONS_KEPT = (0.99, 0.95)
_SLACK = 1e-9
GRADES = (
    "Opens: yes when at least 90 % of keyed maps are open, in part from 50 %. Stays closed: yes when at most 5 % of "
    "clean and of wrong-key maps and at most one wrong key in a thousand open, in part up to 50 %. Predictions kept: "
    "yes when accuracy falls by at most 1 percentage point, clean and keyed, in part up to 5. The worst interpreter "
    "counts. Protected: three times yes; not protected: at least one no."
)


def judge(report: Mapping[str, Any]) -> dict[str, str]:
    """Return a report's `verdict`.

    Its `answer` is protected, protected in part or not protected; its `sentence` gives the figures, those that fall
    short first.
    """
    answers = (judge_opening(report)[0], judge_closing(report)[0], judge_predictions(report)[0])
    lines = (_opens_words(report), _closed_words(report), _kept_words(report))
    judged = [(answer, *line) for answer, line in zip(answers, lines, strict=True)]
    short = [f"{figures} ({wanted} wanted)" for answer, figures, wanted in judged if answer != "yes"]
    good = [figures for answer, figures, _ in judged if answer == "yes"]
    return {"answer": overall(answers, "protected"), "sentence": ", ".join([*short, *good])}


def judge_opening(report: Mapping[str, Any]) -> tuple[Answer, str]:
    """Return whether the key opens the maps, and the figures."""
    shares = _opened_shares(report, "keyed")
    return _grade(min(shares), _OPEN_MAPS), f"{as_share(min(shares))} of keyed maps open{_worst(shares)}."


def judge_closing(report: Mapping[str, Any]) -> tuple[Answer, str]:
    """Return whether maps stay closed without the key, and the figures."""
    cases = {
        "clean maps": _opened_shares(report, "clean"),
        "maps with a wrong key": _opened_shares(report, "wrong_key"),
    }
    said = [f"{as_share(max(shares))} of {words} open{_worst(shares)}." for words, shares in cases.items()]
    grades = [_grade(1 - max(map(max, cases.values())), _CLOSED_MAPS)]
    opened, tried = _wrong_keys(report)
    if tried:
        said.append(f"{opened:,} of {tried:,} wrong keys open.")
        grades.append(_grade(1 - opened / tried, _WRONG_KEYS_REFUSED))
    return max(grades, key=("yes", "in part", "no").index), " ".join(said)


def judge_predictions(report: Mapping[str, Any]) -> tuple[Answer, str]:
    """Return whether predictions are as good as before, and the figures."""
    before, after = _accuracy(report)
    answer = _grade(1 - (before - after), _PREDICTIONS_KEPT)
    if not _labelled(report):
        return answer, f"{as_share(after)} are as before."
    return answer, f"{as_share(after)} are right, {as_share(before)} before protection."


def describe(opens: Answer, closed: Answer, kept: Answer) -> str:
    """Return the three answers as one sentence."""
    right = {"yes": "are right", "in part": "are right for some images only", "no": "are not right"}[opens]
    hidden = {"yes": "stay hidden", "in part": "are hidden only in part", "no": "are not hidden"}[closed]
    stay = {"yes": "are kept", "in part": "are kept for the most part", "no": "have suffered"}[kept]
    return (
        f"With the owner's key the model's explanations {right}; without it, or with a wrong key, they {hidden}; "
        f"its predictions {stay}."
    )


def _opens_words(report: Mapping[str, Any]) -> tuple[str, str]:
    """Return the figures of the first answer, and what is wanted."""
    return f"opens {as_share(min(_opened_shares(report, 'keyed')))}", f"{_OPEN_MAPS[0]:.0%}"


def _closed_words(report: Mapping[str, Any]) -> tuple[str, str]:
    opened, tried = _wrong_keys(report)
    shares = [*_opened_shares(report, "clean"), *_opened_shares(report, "wrong_key")]
    figures = f"stays closed {as_share(1 - max(shares))}"
    if not tried:
        return figures, f"{_CLOSED_MAPS[0]:.0%}"
    return f"{figures}, {opened:,} of {tried:,} wrong keys", f"{_CLOSED_MAPS[0]:.0%} and 1 in 1,000"


def _kept_words(report: Mapping[str, Any]) -> tuple[str, str]:
    before, after = _accuracy(report)
    if not _labelled(report):
        return f"predictions kept {as_share(after)}", f"{_PREDICTIONS_KEPT[0]:.0%}"
    return f"accuracy {as_share(after)} after {as_share(before)}", "a loss of at most 1 %"


def _accuracy(report: Mapping[str, Any]) -> tuple[float, float]:
    """Return accuracy before protection, and the lower one after it, of keyed and clean images."""
    accuracy = report["accuracy"]
    return accuracy["reference"], min(accuracy["keyed"], accuracy["clean"])


def _labelled(report: Mapping[str, Any]) -> bool:
    return bool(report["accuracy"]["measured_against"] == "labels")


def _wrong_keys(report: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many wrong keys open, and how many were tried, of the interpreter where most do."""
    tried = [figures["wrong_keys"] for figures in report["interpreters"].values()]
    worst = max(tried, key=lambda each: each["opened"] / max(1, each["tried"]))
    return worst["opened"], worst["tried"]


def _grade(value: float, steps: tuple[float, float]) -> Answer:
    return "yes" if value >= steps[0] - _SLACK else "in part" if value >= steps[1] - _SLACK else "no"


def _opened_shares(report: Mapping[str, Any], case: str) -> list[float]:
    """Return the share of maps opened, by interpreter."""
    return [figures["opened"][case] for figures in report["interpreters"].values()]


def _worst(shares: Sequence[float]) -> str:
    return " (worst interpreter)" if len(shares) > 1 else ""
