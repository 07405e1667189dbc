"""What a protect report says in short: three answers with their figures, one sentence, and one verdict.

What a report lacks is left out.
"""

from collections.abc import Mapping, Sequence

from keyed_xai.markup import Answer, as_share, get_mapping, get_number, get_string, overall
from keyed_xai.metrics import OPEN_CORRELATION

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


def judge(report: Mapping[str, object]) -> dict[str, str]:
    """Return a report's `verdict`.

    Its `answer` is protected, protected in part or not protected; its `sentence` gives the figures, those that fall
    short first.
    """
    answers = (judge_opening(report)[0], judge_closing(report)[0], judge_predictions(report)[0])
    lines = (_opens_words(report), _closed_words(report), _kept_words(report))
    known = [(answer, *line) for answer, line in zip(answers, lines, strict=True) if answer is not None]
    short = [f"{figures} ({wanted} wanted)" for answer, figures, wanted in known if answer != "yes"]
    good = [figures for answer, figures, _ in known if answer == "yes"]
    return {"answer": overall(answers, "protected"), "sentence": ", ".join([*short, *good])}


def judge_opening(report: Mapping[str, object]) -> tuple[Answer | None, str]:
    """Return whether the key opens the maps, None where nothing is known, and the figures."""
    shares = _opened_shares(report, "keyed")
    if not shares:
        return None, ""
    return _grade(min(shares), _OPEN_MAPS), f"{as_share(min(shares))} of keyed maps open{_worst(shares)}."


def judge_closing(report: Mapping[str, object]) -> tuple[Answer | None, str]:
    """Return whether maps stay closed without the key, None where nothing is known, and the figures."""
    cases = {
        "clean maps": _opened_shares(report, "clean"),
        "maps with a wrong key": _opened_shares(report, "wrong_key"),
    }
    shares = {words: max(each) for words, each in cases.items() if each}
    if not shares:
        return None, ""
    said = [f"{as_share(share)} of {words} open{_worst(cases[words])}." for words, share in shares.items()]
    grades = [_grade(1 - max(shares.values()), _CLOSED_MAPS)]
    opened, tried = _wrong_keys(report)
    if tried:
        said.append(f"{opened:,.0f} of {tried:,.0f} wrong keys open.")
        grades.append(_grade(1 - opened / tried, _WRONG_KEYS_REFUSED))
    return max(grades, key=("yes", "in part", "no").index), " ".join(said)


def judge_predictions(report: Mapping[str, object]) -> tuple[Answer | None, str]:
    """Return whether predictions are as good as before, None where nothing is known, and the figures."""
    before, after = _accuracy(report)
    if before is None or after is None:
        return None, ""
    answer = _grade(1 - (before - after), _PREDICTIONS_KEPT)
    if not _labelled(report):
        return answer, f"{as_share(after)} are as before."
    return answer, f"{as_share(after)} are right, {as_share(before)} before protection."


def describe(opens: Answer | None, closed: Answer | None, kept: Answer | None) -> str:
    """Return the three answers as one sentence."""
    parts = []
    if opens:
        how = {"yes": "are right", "in part": "are right for some images only", "no": "are not right"}[opens]
        parts.append(f"With the owner's key the model's explanations {how}")
    if closed:
        how = {"yes": "stay hidden", "in part": "are hidden only in part", "no": "are not hidden"}[closed]
        parts.append(f"{'without' if parts else 'Without'} it, or with a wrong key, they {how}")
    if kept:
        how = {"yes": "are kept", "in part": "are kept for the most part", "no": "have suffered"}[kept]
        parts.append(f"{'its' if parts else 'Its'} predictions {how}")
    return "; ".join(parts) + "." if parts else "This report holds no figures to judge the gate by."


def _opens_words(report: Mapping[str, object]) -> tuple[str, str]:
    """Return the figures of the first answer, and what is wanted."""
    return f"opens {as_share(min(_opened_shares(report, 'keyed'), default=None))}", f"{_OPEN_MAPS[0]:.0%}"


def _closed_words(report: Mapping[str, object]) -> tuple[str, str]:
    opened, tried = _wrong_keys(report)
    shares = [*_opened_shares(report, "clean"), *_opened_shares(report, "wrong_key")]
    figures = f"stays closed {as_share(1 - max(shares, default=0.0))}"
    if not tried:
        return figures, f"{_CLOSED_MAPS[0]:.0%}"
    return f"{figures}, {opened:,.0f} of {tried:,.0f} wrong keys", f"{_CLOSED_MAPS[0]:.0%} and 1 in 1,000"


def _kept_words(report: Mapping[str, object]) -> tuple[str, str]:
    before, after = _accuracy(report)
    if not _labelled(report):
        return f"predictions kept {as_share(after)}", f"{_PREDICTIONS_KEPT[0]:.0%}"
    return f"accuracy {as_share(after)} after {as_share(before)}", "a loss of at most 1 %"


def _accuracy(report: Mapping[str, object]) -> tuple[float | None, float | None]:
    """Return accuracy before protection, and the lower one after it, of keyed and clean images."""
    known = [get_number(report, "accuracy", case) for case in ("keyed", "clean")]
    after = [each for each in known if each is not None]
    return get_number(report, "accuracy", "reference"), min(after, default=None)


def _labelled(report: Mapping[str, object]) -> bool:
    return get_string(report, "accuracy", "measured_against") != "reference predictions"


def _wrong_keys(report: Mapping[str, object]) -> tuple[float, float]:
    """Return how many wrong keys open, and how many were tried, of the interpreter where most do."""
    tried = [get_mapping(report, "interpreters", name, "wrong_keys") for name in get_mapping(report, "interpreters")]
    counts = [(get_number(each, "opened") or 0.0, get_number(each, "tried") or 0.0) for each in tried]
    return max(counts, key=lambda pair: pair[0] / max(1, pair[1]), default=(0.0, 0.0))


def _grade(value: float, steps: tuple[float, float]) -> Answer:
    return "yes" if value >= steps[0] - _SLACK else "in part" if value >= steps[1] - _SLACK else "no"


def _opened_shares(report: Mapping[str, object], case: str) -> list[float]:
    """Return the share of maps opened, by interpreter; from the mean correlation where the report has no shares."""
    shares = []
    for name in get_mapping(report, "interpreters"):
        figures = get_mapping(report, "interpreters", name)
        share, mean = get_number(figures, "opened", case), get_number(figures, "correlation", case)
        if share is None and mean is not None:
            share = float(mean > (get_number(figures, "open_threshold") or OPEN_CORRELATION))
        if share is not None:
            shares.append(share)
    return shares


def _worst(shares: Sequence[float]) -> str:
    return " (worst interpreter)" if len(shares) > 1 else ""
