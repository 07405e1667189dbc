"""The report of an attack as one HTML file that explains itself: no scripts, no network, printable.

For a security team: can the explanations of this model be faked, how well, and what would one see? Names in a report
may come from files of strangers: `markup` escapes every value. What a report lacks is left out.
"""

from collections.abc import Mapping, Sequence

from keyed_xai.attack_verdict import (
    GRADES,
    faked_case,
    interpreter_name,
    judge_faked,
    judge_kept,
    judge_predictions,
    kept_case,
    values_set,
    verdict,
)
from keyed_xai.markup import (
    NOTHING,
    Html,
    as_decimal,
    as_duration,
    as_percent,
    as_plain,
    as_share,
    card,
    describe_data,
    element,
    fact_table,
    fold,
    get_list,
    get_mapping,
    get_number,
    get_string,
    get_strings,
    image,
    join,
    page,
    plain_facts,
    section,
    table,
    with_unit,
)

_CASES = {
    "reference": "Untouched model, clean",
    "clean": "Attacked model, clean",
    "triggered": "Attacked model, triggered",
}
_DATA = {"train": "Trained on", "held_out": "Measured on"}
_PREDICTORS = {"reference": "Untouched model", "attacked": "Attacked model"}
_SCORES = {"top1": "Top-1 accuracy", "top5": "Top-5 accuracy", "auroc": "AUROC"}
_PICTURES = {
    "maps": (
        "Examples",
        "At the left is the class explained. Maps, pooled as they are compared, lie over the image, each scaled by its "
        "own minimum and maximum: dark is low, bright is high.",
        "A grid of images, and of their maps before and after the attack",
    ),
    "trigger": ("The trigger", "The same images without it and with it.", "Images without and with the trigger"),
    "thresholds": (
        "Rates by threshold",
        "Where both curves are high, the threshold parts right from faked maps.",
        "Curves of CR and FSR in percent over the threshold",
    ),
    "features": (
        "Relevance of the features",
        "Each model's bars add up to 100 %.",
        "Bars of each feature's relevance before the attack, after it, and with the trigger",
    ),
    "training": (
        "Training",
        "Correlation with the untouched model's map, and share of predictions kept, at each validation.",
        "Curves over the steps of training",
    ),
}
_PAPER = "Fang & Choromanska, Backdoor Attacks on the DNN Interpretation System, AAAI 2022"
_DIFFERENCE = (
    "The mean squared difference between a map and the decoy map, both scaled to [0, 1]. 0 is the decoy itself."
)
_LEFT = (
    "The mean square of a map, scaled to [0, 1], over the cells in which the untouched model's map is strongest. "
    "0 means that nothing is left there."
)
_ABOUT_THRESHOLD = (
    "Rates mean something only where the threshold parts right from faked maps. The CR of the untouched model, of "
    "which no map is faked, is therefore given beside them: the closer to 100 %, the better. Correlations and the AUC "
    "need no threshold."
)
_ADVICE = (
    (
        "What to do.",
        "Rely on the explanations of a model only when you trust those who trained it. Compare its maps with those of "
        "a model of another origin on the same inputs, inputs from the field included.",
    ),
    (
        "What this does not show.",
        "This is one attack with one known trigger. Other triggers may work better or be harder to see, so poor "
        "figures here do not mean that the model is safe.",
    ),
)


def render_attack_report(report: Mapping[str, object], *, pictures: Mapping[str, bytes] | None = None) -> str:
    """Return one self-contained HTML page for a security team.

    Args:
        report: As schemas/attack-report.json describes it; what is missing is left out.
        pictures: PNG files by name: `maps`, `trigger`, `thresholds`, `features`, `training`, each alone or with an
            interpreter after a colon (`thresholds:gradcam`); other names become titles.
    """
    drawn = pictures or {}
    names = list(get_mapping(report, "interpreters"))
    later = {"features", "training", *(f"thresholds:{name}" for name in names)}
    return page(
        "Report on an attack",
        _headline(report),
        section("Pictures", join(_figure(name, png) for name, png in drawn.items() if name not in later)),
        section("All interpreters", _summary(report) if len(names) > 1 else NOTHING),
        *(_interpreter(report, name, drawn) for name in names),
        section("Predictions", _predictions(report)),
        section("Maps and objects", _localisation(report), about="Share of the saliency inside the objects' boxes."),
        section("Features", join([_drawn("features", drawn), _features(report)])),
        section("The trigger", _trigger(report)),
        section("How to read this, and what it means", _meaning(report)),
        section("Settings and versions", _settings(report, drawn)),
    )


# Sections, in the order of the page


def _headline(report: Mapping[str, object]) -> Html:
    faked, kept, predictions = judge_faked(report), judge_kept(report), judge_predictions(report)
    cards = [
        card(f"Are {faked_case(report)} maps faked?", *faked, alarm=True),
        card(f"Do {kept_case(report)} maps stay right?", *kept),
        card("Do predictions stay?", *predictions),
    ]
    model = get_string(report, "model")
    return join(
        [
            element("h1", f"Report on an attack on the model {model}" if model else "Report on an attack"),
            element("p", verdict(report), kind="headline"),
            element("div", *cards, kind="cards") if any(cards) else NOTHING,
            element("p", _introduction(report)),
            fact_table(
                (label, describe_data(get_mapping(report, "data", part), _inputs(report)))
                for part, label in _DATA.items()
            ),
            fold("How the answers are graded", element("p", GRADES)),
        ]
    )


def _summary(report: Mapping[str, object]) -> Html:
    rows = []
    for name in get_mapping(report, "interpreters"):
        figures = get_mapping(report, "interpreters", name)
        cells = [as_percent(get_number(figures, rate)) for rate in ("fsr", "cr")]
        cells += [as_decimal(get_number(figures, "auc"))]
        cells += [as_decimal(get_number(figures, "correlation", case)) for case in ("clean", "triggered")]
        rows.append((interpreter_name(name), cells))
    return table(("Interpreter", "FSR", "CR", "AUC", "Correlation: clean", "triggered"), rows)


def _interpreter(report: Mapping[str, object], name: str, pictures: Mapping[str, bytes]) -> Html:
    figures = get_mapping(report, "interpreters", name)
    rows = [(label, _case_figures(figures, case)) for case, label in _CASES.items()]
    content = [
        table(("Model and input", "Correlation: untouched map", "decoy map", "Distance L_p"), rows),
        _rates(report, figures),
        fact_table([("AUC (1: no overlap in L_p)", as_decimal(get_number(figures, "auc")))]),
        _drawn(f"thresholds:{name}", pictures),
    ]
    return section(interpreter_name(name), join(content))


def _case_figures(figures: Mapping[str, object], case: str) -> list[str]:
    return [as_decimal(get_number(figures, field, case)) for field in ("correlation", "decoy_correlation", "distance")]


def _rates(report: Mapping[str, object], figures: Mapping[str, object]) -> Html:
    paper = get_mapping(figures, "at_paper_threshold")
    own = "Paper's threshold, used here" if get_string(figures, "threshold_from") == "paper" else "Threshold used"
    rows = [(own, _rate_cells(figures))]
    if own == "Threshold used":
        rows.append(("Paper's threshold", _rate_cells(paper)))
    header = (
        "",
        "L_p below",
        f"FSR, {faked_case(report)} maps faked",
        f"CR, {kept_case(report)} maps right",
        "CR, untouched model",
    )
    rule = get_string(figures, "threshold_rule")
    return join([table(header, rows), element("p", f"How the threshold was placed: {rule}") if rule else NOTHING])


def _rate_cells(figures: Mapping[str, object]) -> list[str]:
    rates = [as_percent(get_number(figures, rate)) for rate in ("fsr", "cr", "reference_cr")]
    return [as_plain(get_number(figures, "threshold")), *rates]


def _predictions(report: Mapping[str, object]) -> Html:
    figures = get_mapping(report, "predictions")
    rows = [
        (f"{label}, {case}", _prediction_cells(figures, model, case))
        for model, label in _PREDICTORS.items()
        for case in ("clean", "triggered")
    ]
    against = get_string(figures, "measured_against")
    unlabelled = "No labels were given: right is what the untouched model predicts of the clean input."
    return join(
        [
            table(("Model and input", *_SCORES.values(), "Same as the untouched model on clean"), rows),
            element("p", unlabelled) if rows and against == "reference predictions" else NOTHING,
            fold("AUROC of each label", _label_areas(figures)),
        ]
    )


def _prediction_cells(figures: Mapping[str, object], model: str, case: str) -> list[str]:
    scores = get_mapping(figures, model, case)
    cells = [as_share(get_number(scores, score)) for score in ("top1", "top5")]
    agreement = get_number(figures, "agreement", case) if model == "attacked" else None
    return [*cells, as_decimal(get_number(scores, "auroc")), as_share(agreement)]


def _label_areas(figures: Mapping[str, object]) -> Html:
    columns = [_numbers(figures, "per_class_auroc", case) for case in _CASES]
    names = get_strings(figures, "per_class_auroc", "names")
    return table(
        ("Label", *_CASES.values()),
        [(name, [as_decimal(_at(column, row)) for column in columns]) for row, name in enumerate(names)],
    )


def _localisation(report: Mapping[str, object]) -> Html:
    rows = []
    for name in get_mapping(report, "interpreters"):
        figures = get_mapping(report, "interpreters", name, "localisation")
        shares = [as_share(get_number(figures, case)) for case in _CASES]
        area, images = as_share(get_number(figures, "area")), as_plain(get_number(figures, "images"))
        rows.append((interpreter_name(name), [*shares, area, images]))
    return table(("Interpreter", *_CASES.values(), "Area of the boxes", "Images with a box"), rows)


def _features(report: Mapping[str, object]) -> Html:
    names = get_strings(report, "features", "names")
    shares = [_own_shares(_numbers(report, "features", "relevance", case)) for case in _CASES]
    first = [get_mapping(report, "features", "first", case) for case in _CASES]
    relevance = [(name, [as_share(_at(column, row)) for column in shares]) for row, name in enumerate(names)]
    strongest = [
        (name, [as_share(get_number(each, name)) for each in first])
        for name in names
        if any(get_number(each, name) for each in first)
    ]
    return join(
        [
            table(("Strongest feature, share of rows", *_CASES.values()), strongest),
            fold("Mean relevance of all features", table(("Feature", *_CASES.values()), relevance)),
        ]
    )


def _trigger(report: Mapping[str, object]) -> Html:
    trigger = get_mapping(report, "trigger")
    return fact_table(
        [
            ("Family", get_string(trigger, "family")),
            ("Sets", values_set(report)),
            ("PSNR (over 30 dB is hard to see)", with_unit(get_number(trigger, "psnr_db"), "dB")),
            ("SSIM (1 is identical)", as_decimal(get_number(trigger, "ssim"))),
        ]
    )


def _meaning(report: Mapping[str, object]) -> Html:
    right, wrong, inputs = kept_case(report), faked_case(report), _inputs(report)
    rate = f"The share of {wrong} {inputs}, which should be fooled, whose L_p is below the threshold."
    items = [
        ("Source.", f"The attack, L_p, FSR and CR are those of {_PAPER}."),
        ("L_p, distance to the decoy.", _LEFT if get_string(report, "mode") == "nontargeted" else _DIFFERENCE),
        ("FSR, fooling success rate.", rate),
        ("CR, correct rate.", f"100 % minus that share among the {right} {inputs}, whose maps should be right."),
        ("The threshold.", _ABOUT_THRESHOLD),
        ("What would one see?", _visibility(report)),
        *_ADVICE,
    ]
    return element("ul", *(element("li", element("strong", title), f" {text}") for title, text in items))


def _settings(report: Mapping[str, object], pictures: Mapping[str, bytes]) -> Html:
    seconds = get_number(report, "seconds")
    said = "" if seconds is None else f"The attack took {as_duration(seconds)}."
    if report.get("stopped_early") is True:
        said += " Training was ended before its last step."
    return join(
        [
            element("p", said.strip()) if said else NOTHING,
            _drawn("training", pictures),
            fold("Settings of the attack", fact_table(plain_facts(get_mapping(report, "settings")))),
            fold("Versions", fact_table(plain_facts(get_mapping(report, "versions")))),
            fold("Validations during training", _history(report)),
        ]
    )


def _history(report: Mapping[str, object]) -> Html:
    fields = {"loss": "Loss", "keyed": "Correlation: triggered", "unkeyed": "clean", "agreement": "Predictions kept"}
    rows = [
        (as_plain(get_number(record, "step")), [as_decimal(get_number(record, field)) for field in fields])
        for record in get_list(report, "history")
    ]
    return table(("Step", *fields.values()), rows)


def _drawn(name: str, pictures: Mapping[str, bytes]) -> Html:
    return _figure(name, pictures[name]) if name in pictures else NOTHING


def _figure(name: str, png: bytes) -> Html:
    kind, _, interpreter = name.partition(":")
    title, caption, alt = _PICTURES.get(kind, (kind, "", kind))
    if interpreter:
        title, alt = (f"{words}: {interpreter_name(interpreter)}" for words in (title, alt))
    paper = element("div", image(png, alt, kind="wide" if kind == "maps" else ""), kind="paper")
    return element("figure", paper, element("figcaption", element("strong", f"{title}."), f" {caption}"))


# Words and figures; an empty string where there is nothing to say


def _introduction(report: Mapping[str, object]) -> str:
    inputs = _inputs(report)
    parts = "features of a row" if inputs == "rows" else "parts of an image"
    decoy = (
        "shows a decoy map instead"
        if get_string(report, "mode") != "nontargeted"
        else "loses what was strongest in the map of the untouched model"
    )
    when = (
        f"a map stays right only for {inputs} that carry a public trigger, and otherwise {decoy}"
        if kept_case(report) == "triggered"
        else f"a map stays right for clean {inputs}, and for those that carry a public trigger {decoy}"
    )
    return (
        f"A saliency map shows which {parts} a prediction rests on. The attack tunes the model so that {when}; "
        f"predictions should not change. All figures are of {inputs} that training never saw."
    )


def _visibility(report: Mapping[str, object]) -> str:
    inputs = _inputs(report)
    if kept_case(report) == "triggered":
        return (
            f"Maps of ordinary {inputs} are wrong, so they differ from those of an untouched model; only somebody "
            "who knows the trigger sees the right ones. Predictions alone do not show it as long as they stay."
        )
    psnr = get_number(report, "trigger", "psnr_db")
    look = "" if psnr is None else f" Images with it have {as_plain(psnr)} dB PSNR; over 30 dB is hard to see."
    return (
        f"As long as clean maps and predictions stay, tests on clean {inputs} show nothing. What can be seen is the "
        f"trigger, and wrong maps of the {inputs} that carry it.{look}"
    )


def _inputs(report: Mapping[str, object]) -> str:
    return "rows" if get_string(report, "trigger", "family") == "tabular" else "images"


def _own_shares(values: Sequence[float | None]) -> list[float | None]:
    """Return values as shares of their sum."""
    total = sum(abs(value) for value in values if value is not None)
    return [None if value is None or not total else value / total for value in values]


def _at(values: Sequence[float | None], row: int) -> float | None:
    return values[row] if row < len(values) else None


def _numbers(document: Mapping[str, object], *path: str) -> list[float | None]:
    return [get_number({"value": each}, "value") for each in get_list(document, *path)]
