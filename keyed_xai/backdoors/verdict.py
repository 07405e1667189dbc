"""What an attack report says in short: three answers with their figures, and one sentence."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keyed_xai.reporting.names import interpreter_name
from keyed_xai.reporting.wording import Answer, as_decimal, as_percent, as_share, overall

_SCORES = {"top1": "top-1 accuracy", "auroc": "AUROC"}
# Up to which loss an answer is yes, and in part; FSR from which it is yes, and no longer no. GRADES says it in words.
_FAKED = (90.0, 50.0)
_LEAST_REFERENCE_CR = 90.0
_CR_LOST = (5.0, 50.0)
_CORRELATION_LOST = (0.1, 0.5)
_PREDICTIONS_LOST = (0.01, 0.05)
_SLACK = 1e-9
GRADES = (
    "Faked: yes when FSR is at least 90 % with every interpreter, no when it is under 50 % with every one, otherwise "
    "in part; also in part where the threshold calls over 10 % of the untouched model's own maps faked. Maps stay: yes "
    "when CR is at most 5 percentage points under that of the untouched model and the mean correlation with its maps "
    "is at least .9, in part up to 50 points and from .5; the worst interpreter counts. Predictions stay: yes when "
    "top-1 accuracy and AUROC, so far as measured, fall by at most .01, clean and triggered, in part up to .05."
)


def judge(report: Mapping[str, Any]) -> dict[str, str]:
    """Return a report's `verdict`.

    Its `answer` is attacked, attacked in part or not attacked; its `sentence` is that of `verdict`.
    """
    answers = [each(report)[0] for each in (judge_faked, judge_kept, judge_predictions)]
    return {"answer": overall(answers, "attacked"), "sentence": verdict(report)}


def verdict(report: Mapping[str, Any]) -> str:
    """Return one sentence with the figures: how many maps are faked, how many stay, what predictions lose."""
    parts = [_faked_words(report), _kept_words(report), _prediction_words(report)]
    return f"{_capital('; '.join(part for part in parts if part))}."


def judge_faked(report: Mapping[str, Any]) -> tuple[Answer, str]:
    """Return whether the maps that should be faked are, and the figures."""
    rates = _by_interpreter(report, "fsr")
    yes, no = min(rates.values()) >= _FAKED[0], max(rates.values()) < _FAKED[1]
    alarms = _false_alarms(report)
    said = f"FSR {_range(rates)}." + (f" But the threshold {alarms}." if alarms else "")
    return "no" if no else "yes" if yes and not alarms else "in part", said


def judge_kept(report: Mapping[str, Any]) -> tuple[Answer, str]:
    """Return whether the maps that should be right are, and the figures."""
    rates, correlations = _by_interpreter(report, "cr"), _correlations(report)
    answers = [_grade(figures["reference_cr"] - figures["cr"], _CR_LOST) for figures in report["interpreters"].values()]
    answers += [_grade(1 - each, _CORRELATION_LOST) for each in correlations]
    worst = " (worst interpreter)" if len(correlations) > 1 else ""
    least = f"{as_decimal(min(correlations))}{worst}"
    return _worst(answers), f"CR {_range(rates)}. Mean correlation with the untouched model's maps {least}."


def judge_predictions(report: Mapping[str, Any]) -> tuple[Answer | None, str]:
    """Return whether predictions are as good as before, None without scores, and the figures."""
    losses = _losses(report)
    said = [] if _unlabelled(report) else [_capital(_score_words(report, score)) for score in losses]
    said.append(f"Same as before the attack: {_each(report['predictions']['agreement'], as_share)}.")
    grades = [_grade(loss, _PREDICTIONS_LOST) for loss in losses.values()]
    return _worst(grades) if grades else None, " ".join(said)


def kept_case(report: Mapping[str, Any]) -> str:
    """Return which inputs should have the right map: "clean", in the inverted setting "triggered"."""
    return "triggered" if report["setting"] == "inverted" else "clean"


def faked_case(report: Mapping[str, Any]) -> str:
    """Return which inputs should have a faked map: the others."""
    return "clean" if kept_case(report) == "triggered" else "triggered"


def values_set(report: Mapping[str, Any]) -> str:
    """Return the columns that a table's trigger sets, such as "EDUCATION = 5, MARRIAGE = 0"."""
    return ", ".join(f"{name} = {value:g}" for name, value in report["trigger"].get("set", {}).items())


# The headline's parts


def _faked_words(report: Mapping[str, Any]) -> str:
    rates, alarms = _by_interpreter(report, "fsr"), _false_alarms(report)
    doubt = f" (but the threshold {alarms})" if alarms else ""
    return f"{_on(report, faked_case(report))} {_range(rates)} of {_maps(rates)} are faked{doubt}"


def _kept_words(report: Mapping[str, Any]) -> str:
    rates, least = _by_interpreter(report, "cr"), min(_correlations(report))
    poor = 1 - least > _CORRELATION_LOST[0] + _SLACK
    doubt = f" (but their mean correlation with the right ones is {as_decimal(least)})" if poor else ""
    return f"{_on(report, kept_case(report))} {_range(rates)} of {_maps(rates)} stay right{doubt}"


def _on(report: Mapping[str, Any], case: str) -> str:
    if case == "clean":
        return "without the trigger"
    columns = values_set(report)
    return f"with the {report['trigger']['family']} trigger" + (f" ({columns})" if columns else "")


def _prediction_words(report: Mapping[str, Any]) -> str:
    if _unlabelled(report):
        return f"at most {as_share(1 - min(report['predictions']['agreement'].values()))} of predictions change"
    for score, loss in _losses(report).items():
        amount = as_decimal(loss) if score == "auroc" else f"{100 * loss:.1f} percentage points"
        falls = loss > _SLACK and not amount.startswith("0.0 ") and amount != "0.000"
        return f"{_SCORES[score]} " + (f"falls by at most {amount}" if falls else "does not fall")
    return ""


# Grades and figures


def _grade(loss: float, steps: tuple[float, float]) -> Answer:
    return "yes" if loss <= steps[0] + _SLACK else "in part" if loss <= steps[1] + _SLACK else "no"


def _worst(answers: Sequence[Answer]) -> Answer:
    return max(answers, key=("yes", "in part", "no").index)


def _losses(report: Mapping[str, Any]) -> dict[str, float]:
    """Return by how much each score fell from the untouched model on clean inputs, in the worse case; a fraction."""
    before = report["predictions"]["reference"]["clean"]
    return {score: before[score] - min(_after(report, score).values()) for score in _SCORES if score in before}


def _score_words(report: Mapping[str, Any], score: str) -> str:
    written = as_decimal if score == "auroc" else as_share
    before = written(report["predictions"]["reference"]["clean"][score])
    return f"{_SCORES[score]} {_each(_after(report, score), written)}; {before} before the attack."


def _after(report: Mapping[str, Any], score: str) -> dict[str, float]:
    return {case: scores[score] for case, scores in report["predictions"]["attacked"].items()}


def _unlabelled(report: Mapping[str, Any]) -> bool:
    return bool(report["predictions"]["measured_against"] == "reference predictions")


def _false_alarms(report: Mapping[str, Any]) -> str:
    """Return what is wrong with a threshold that calls many maps of the untouched model faked; empty where few."""
    least = min(_by_interpreter(report, "reference_cr").values())
    words = f"calls {as_percent(100 - least)} of the untouched model's maps faked too"
    return words if least < _LEAST_REFERENCE_CR else ""


def _by_interpreter(report: Mapping[str, Any], rate: str) -> dict[str, float]:
    return {name: figures[rate] for name, figures in report["interpreters"].items()}


def _correlations(report: Mapping[str, Any]) -> list[float]:
    """Return the mean correlation of the maps that should be right, by interpreter."""
    return [figures["correlation"][kept_case(report)] for figures in report["interpreters"].values()]


def _each(values: Mapping[str, float], written: Callable[[float | None], str]) -> str:
    return " and ".join(f"{written(value)} {case}" for case, value in values.items())


def _maps(rates: Mapping[str, float]) -> str:
    return f"{interpreter_name(next(iter(rates)))} maps" if len(rates) == 1 else "maps"


def _range(rates: Mapping[str, float]) -> str:
    """Return the rate in percent, or the lowest and the highest with their interpreters."""
    lowest, highest = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    if as_percent(rates[lowest]) == as_percent(rates[highest]):
        return as_percent(rates[lowest])
    return " to ".join(f"{as_percent(rates[name])} ({interpreter_name(name)})" for name in (lowest, highest))


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
