"""What an attack report says in short: three answers with their figures, and one sentence.

What a report lacks is left out.
"""

from collections.abc import Callable, Mapping, Sequence

from keyed_xai.markup import Answer, as_decimal, as_percent, as_share, get_mapping, get_number, get_string, overall
from keyed_xai.names import INTERPRETER_NAMES

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


def judge(report: Mapping[str, object]) -> dict[str, str]:
    """Return a report's `verdict`.

    Its `answer` is attacked, attacked in part or not attacked; its `sentence` is that of `verdict`.
    """
    answers = [each(report)[0] for each in (judge_faked, judge_kept, judge_predictions)]
    return {"answer": overall(answers, "attacked"), "sentence": verdict(report)}


def verdict(report: Mapping[str, object]) -> str:
    """Return one sentence with the figures: how many maps are faked, how many stay, what predictions lose."""
    parts = [_faked_words(report), _kept_words(report), _prediction_words(report)]
    sentence = "; ".join(part for part in parts if part)
    return f"{_capital(sentence)}." if sentence else "This report holds no figures to judge the attack by."


def judge_faked(report: Mapping[str, object]) -> tuple[Answer | None, str]:
    """Return whether the maps that should be faked are, None where nothing is known, and the figures."""
    rates = _by_interpreter(report, "fsr")
    if not rates:
        return None, ""
    yes, no = min(rates.values()) >= _FAKED[0], max(rates.values()) < _FAKED[1]
    alarms = _false_alarms(report)
    said = f"FSR {_range(rates)}." + (f" But the threshold {alarms}." if alarms else "")
    return "no" if no else "yes" if yes and not alarms else "in part", said


def judge_kept(report: Mapping[str, object]) -> tuple[Answer | None, str]:
    """Return whether the maps that should be right are, None where nothing is known, and the figures."""
    rates, own = _by_interpreter(report, "cr"), _by_interpreter(report, "reference_cr")
    correlations = _by_interpreter(report, "correlation", kept_case(report))
    answers = [_grade(own.get(name, 100.0) - rate, _CR_LOST) for name, rate in rates.items()]
    answers += [_grade(1 - each, _CORRELATION_LOST) for each in correlations.values()]
    said = [f"CR {_range(rates)}."] if rates else []
    if correlations:
        worst = " (worst interpreter)" if len(correlations) > 1 else ""
        least = as_decimal(min(correlations.values()))
        said.append(f"Mean correlation with the untouched model's maps {least}{worst}.")
    return _worst(answers), " ".join(said)


def judge_predictions(report: Mapping[str, object]) -> tuple[Answer | None, str]:
    """Return whether predictions are as good as before, None where nothing is known, and the figures."""
    losses = _losses(report)
    said = [] if _unlabelled(report) else [_capital(_score_words(report, score)) for score in losses]
    agreement = _by_case(report, "agreement")
    if agreement:
        said.append(f"Same as before the attack: {_each(agreement, as_share)}.")
    return _worst([_grade(loss, _PREDICTIONS_LOST) for loss in losses.values()]), " ".join(said)


def kept_case(report: Mapping[str, object]) -> str:
    """Return which inputs should have the right map: "clean", in the inverted setting "triggered"."""
    return "triggered" if get_string(report, "setting") == "inverted" else "clean"


def faked_case(report: Mapping[str, object]) -> str:
    """Return which inputs should have a faked map: the others."""
    return "clean" if kept_case(report) == "triggered" else "triggered"


def interpreter_name(name: str) -> str:
    """Return how an interpreter is written."""
    return INTERPRETER_NAMES.get(name, name)


def values_set(report: Mapping[str, object]) -> str:
    """Return the columns that a table's trigger sets, such as "EDUCATION = 5, MARRIAGE = 0"."""
    columns = get_mapping(report, "trigger", "set")
    values = {name: get_number(columns, name) for name in columns}
    return ", ".join(f"{name} = {value:g}" for name, value in values.items() if value is not None)


# The headline's parts


def _faked_words(report: Mapping[str, object]) -> str:
    rates, alarms = _by_interpreter(report, "fsr"), _false_alarms(report)
    if not rates:
        return ""
    doubt = f" (but the threshold {alarms})" if alarms else ""
    return f"{_on(report, faked_case(report))} {_range(rates)} of {_maps(rates)} are faked{doubt}"


def _kept_words(report: Mapping[str, object]) -> str:
    rates = _by_interpreter(report, "cr")
    if not rates:
        return ""
    least = min(_by_interpreter(report, "correlation", kept_case(report)).values(), default=1.0)
    poor = 1 - least > _CORRELATION_LOST[0] + _SLACK
    doubt = f" (but their mean correlation with the right ones is {as_decimal(least)})" if poor else ""
    return f"{_on(report, kept_case(report))} {_range(rates)} of {_maps(rates)} stay right{doubt}"


def _on(report: Mapping[str, object], case: str) -> str:
    if case == "clean":
        return "without the trigger"
    family, columns = get_string(report, "trigger", "family"), values_set(report)
    return " ".join(["with the", *filter(None, [family, "trigger", f"({columns})" if columns else ""])])


def _prediction_words(report: Mapping[str, object]) -> str:
    agreement = _by_case(report, "agreement")
    if _unlabelled(report) and agreement:
        return f"at most {as_share(1 - min(agreement.values()))} of predictions change"
    for score, loss in _losses(report).items():
        amount = as_decimal(loss) if score == "auroc" else f"{100 * loss:.1f} percentage points"
        falls = loss > _SLACK and not amount.startswith("0.0 ") and amount != "0.000"
        return f"{_SCORES[score]} " + (f"falls by at most {amount}" if falls else "does not fall")
    return ""


# Grades and figures


def _grade(loss: float, steps: tuple[float, float]) -> Answer:
    return "yes" if loss <= steps[0] + _SLACK else "in part" if loss <= steps[1] + _SLACK else "no"


def _worst(answers: Sequence[Answer]) -> Answer | None:
    return max(answers, key=("yes", "in part", "no").index, default=None)


def _losses(report: Mapping[str, object]) -> dict[str, float]:
    """Return by how much each score fell from the untouched model on clean inputs, in the worse case; a fraction."""
    losses = {}
    for score in _SCORES:
        before = get_number(report, "predictions", "reference", "clean", score)
        after = _by_case(report, "attacked", score)
        if before is not None and after:
            losses[score] = before - min(after.values())
    return losses


def _score_words(report: Mapping[str, object], score: str) -> str:
    written = as_decimal if score == "auroc" else as_share
    before = written(get_number(report, "predictions", "reference", "clean", score))
    return f"{_SCORES[score]} {_each(_by_case(report, 'attacked', score), written)}; {before} before the attack."


def _unlabelled(report: Mapping[str, object]) -> bool:
    return get_string(report, "predictions", "measured_against") == "reference predictions"


def _false_alarms(report: Mapping[str, object]) -> str:
    """Return what is wrong with a threshold that calls many maps of the untouched model faked; empty where few."""
    least = min(_by_interpreter(report, "reference_cr").values(), default=100.0)
    words = f"calls {as_percent(100 - least)} of the untouched model's maps faked too"
    return words if least < _LEAST_REFERENCE_CR else ""


def _by_interpreter(report: Mapping[str, object], *field: str) -> dict[str, float]:
    values = {name: get_number(report, "interpreters", name, *field) for name in get_mapping(report, "interpreters")}
    return {name: value for name, value in values.items() if value is not None}


def _by_case(report: Mapping[str, object], field: str, *score: str) -> dict[str, float]:
    values = {case: get_number(report, "predictions", field, case, *score) for case in ("clean", "triggered")}
    return {case: value for case, value in values.items() if value is not None}


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
