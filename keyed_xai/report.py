"""The report of a protected model as one HTML file that explains itself: no scripts, no network, printable.

Names in a report may come from files of strangers: `markup` escapes every value. What a report lacks is left out.
"""

from collections.abc import Mapping

from keyed_xai.gate_verdict import GRADES, describe, judge, judge_closing, judge_opening, judge_predictions
from keyed_xai.markup import (
    NOTHING,
    Answer,
    Html,
    as_decimal,
    as_duration,
    as_p_value,
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
    image,
    join,
    page,
    plain_facts,
    section,
    table,
    with_unit,
)
from keyed_xai.names import INTERPRETER_NAMES

_CASES = {
    "reference": "Before protection",
    "keyed": "With the key",
    "clean": "Clean, no key",
    "wrong_key": "With a wrong key",
}
_CHANNELS = {"png": "Stored as PNG", "jpeg75": "JPEG, quality 75", "resize": "Scaled up and back"}
_NEAR_KEYS = {
    "moved_1px": "Right texture, moved by a pixel",
    "moved_2px": "Right texture, moved by two pixels",
    "moved": "Right texture, moved anywhere",
    "half_strength": "Right texture, half strength",
}
_DATA = {"train": "Trained on", "held_out": "Measured on"}
_PICTURES = {
    "maps": (
        "Examples",
        "At the left is the class explained. Maps, pooled as they are compared, lie over the image, each scaled by its "
        "own minimum and maximum: dark is low, bright is high. With the key the map should "
        "look like the reference map; without it, or with a wrong key, it should not.",
    ),
    "training": (
        "Training",
        "Correlation with the reference map, and share of predictions kept, at each validation.",
    ),
    "wrong_keys": (
        "How far keys open",
        "Distributions over maps. The gate is good when the dashed line parts the right key from everything else.",
    ),
    "pattern": (
        "Signature pattern",
        "What unkeyed maps show instead of the explanation; anybody can draw it from the owner's public key.",
    ),
}
_ABOUT_CHANNELS = (
    "A keyed image is a file. These rows say how well the key still opens after the file was stored or changed in "
    "ordinary ways."
)
_ABOUT_NEAR_KEYS = "The right trigger, slightly wrong. The lower these figures, the more exact a key has to be."
_LIMITS = (
    (
        "Who sees the trigger has it.",
        "A trigger is a bearer credential: whoever sees one keyed image next to its original can subtract them, "
        "and use the result as a key. Keep keyed images as secret as the key.",
    ),
    (
        "Whoever has the weights can open the model.",
        "Gradient descent finds, in seconds of computing on a small network and without key, labels or the original "
        "model, a texture by which the maps come out right, hardened or not. Some sixteen keyed images without their "
        "originals are enough as well. The gate is for maps that are served by somebody who keeps the weights.",
    ),
    (
        "Other explanation methods still see the model.",
        "Only the maps named in this report are gated. Methods that do not use them, such as those that cover parts "
        "of the image and watch the prediction, work as on any other model.",
    ),
    (
        "Fine-tuning reopens the gate in part, and some of it removes the proof.",
        "Somebody with similar images can train the model further and get back a part of the explanations. In our "
        "trials the proof of ownership outlived plain fine-tuning, but not a new last layer where the model had not "
        "been hardened. See docs/audits.md for figures with and without --hardening.",
    ),
)


def render_report(
    report: Mapping[str, object], *, pictures: Mapping[str, bytes], verify: Mapping[str, object] | None = None
) -> str:
    """Return one self-contained HTML page for an auditor.

    Args:
        report: As schemas/protect-report.json describes it; what is missing is left out.
        pictures: PNG files by name: `maps`, `training`, `wrong_keys`, `pattern`, each alone or with an interpreter
            after a colon (`maps:gradcam`); other names become titles. Clean images and maps only, never a keyed image.
        verify: As schemas/verify-report.json describes it, of the same model.
    """
    return page(
        "Report on a protected model",
        _headline(report),
        _ownership(verify) if verify is not None else NOTHING,
        section("Pictures", join(_figure(name, png) for name, png in pictures.items())),
        *(_interpreter(report, name) for name in get_mapping(report, "interpreters")),
        section("Predictions", _accuracy(report)),
        section("On the way to the model", _openings(report, "channels", _CHANNELS), about=_ABOUT_CHANNELS),
        section("Near keys", _openings(report, "near_keys", _NEAR_KEYS), about=_ABOUT_NEAR_KEYS),
        section("The trigger", _trigger(report)),
        _limits(),
        section("Settings and versions", _settings(report, verify)),
    )


# Sections, in the order of the page


def _headline(report: Mapping[str, object]) -> Html:
    opens, closed, kept = judge_opening(report), judge_closing(report), judge_predictions(report)
    verdict = judge(report)
    cards = [
        card("Opens with the key", *opens),
        card("Stays closed without it", *closed),
        card("Predictions kept", *kept),
    ]
    model = get_string(report, "model")
    title = f"Report on the protected model {model}" if model else "Report on a protected model"
    return join(
        [
            element("h1", title),
            element(
                "p", f"{verdict['answer'].capitalize()}. {describe(opens[0], closed[0], kept[0])}", kind="headline"
            ),
            element("div", *cards, kind="cards"),
            element(
                "p",
                "A saliency map shows which parts of an image a prediction rests on. This model was changed so that "
                "its maps are right only for images that carry a faint texture made from the owner's secret key. A map "
                "is open when its correlation with that of the model before the change is above "
                f"{_open_threshold(report)}. All figures are of images that training never saw.",
            ),
            _data_facts(report),
            fold("How the answers are graded", element("p", GRADES)),
        ]
    )


def _ownership(verify: Mapping[str, object]) -> Html:
    shown = get_string(verify, "verdict") == "shown"
    answer: Answer = "yes" if shown else "no"
    said = get_string(verify, "sentence") or (
        "The tests show that the model knows the key."
        if shown
        else "The tests do not show that the model knows the key."
    )
    parts = [
        element("div", card("Ownership shown", answer, said), kind="cards"),
        table(("Test", "p-value"), _evidence(verify)),
    ]
    alpha, log2_p = get_number(verify, "alpha"), get_number(verify, "signature", "log2_p")
    meaning = [
        "A p-value is the chance of evidence at least this strong from a model that has nothing to do with the key. It "
        "holds for a key, and a licence with its card, that were fixed before their holder saw the model."
    ]
    if log2_p is not None and log2_p <= -2:
        meaning.append(f"2^{log2_p:.1f} is as likely as calling {-log2_p:.0f} fair coin tosses in a row correctly.")
    decoys = get_number(verify, "opening", "decoys")
    if decoys:
        meaning.append(f"The first test cannot go below 1 in {decoys + 1:,.0f}, as it tried {decoys:,.0f} decoy keys.")
    if alpha is not None:
        meaning.append(
            f"Ownership counts as shown when both tests together leave a chance of at most {as_p_value(alpha)}, and "
            "the secret one holds by itself too."
        )
    meaning.append("Not shown does not mean that the model is somebody else's.")
    facts = [
        ("Model", get_string(verify, "model")),
        ("Key", get_string(verify, "key_id")),
        ("Probe images", describe_data(get_mapping(verify, "probe"))),
        ("Their digest", get_string(verify, "probe", "digest")),
    ]
    return section("Ownership", join([*parts, element("p", " ".join(meaning)), fact_table(facts)]))


def _evidence(verify: Mapping[str, object]) -> list[tuple[str, list[str]]]:
    rows = []
    if tried := get_mapping(verify, "opening"):
        rows.append((_opening_words(tried), [_p_value(tried)]))
    if signature := get_mapping(verify, "signature"):
        rows.append((_signature_words("Signature pattern, public", signature), [_p_value(signature)]))
    interpreters = get_mapping(verify, "signature", "interpreters")
    if len(interpreters) > 1:
        for name in interpreters:
            each = get_mapping(interpreters, name)
            rows.append((_signature_words(f"{INTERPRETER_NAMES.get(name, name)} alone", each), [_p_value(each)]))
    return rows


def _data_facts(report: Mapping[str, object]) -> Html:
    return fact_table((label, describe_data(get_mapping(report, "data", part))) for part, label in _DATA.items())


def _interpreter(report: Mapping[str, object], name: str) -> Html:
    figures = get_mapping(report, "interpreters", name)
    rows = [(label, _case_figures(figures, case)) for case, label in _CASES.items()]
    threshold = get_number(figures, "threshold")
    at = "" if threshold is None else f", threshold {threshold:.3g}"
    wrong, paper = get_mapping(figures, "wrong_keys"), get_mapping(figures, "at_paper_threshold")
    facts = [
        (f"CR, keyed maps that are correct{at}", as_percent(get_number(figures, "cr"))),
        (f"FSR, unkeyed maps that show the decoy{at}", as_percent(get_number(figures, "fsr"))),
        ("The same two at the paper's threshold", _paper_rates(paper)),
        ("AUC, right key against wrong keys (1 is perfect)", as_decimal(get_number(figures, "auc"))),
        ("Wrong keys tried", _wrong_keys(wrong)),
        ("Highest correlation of a wrong key", as_decimal(get_number(wrong, "highest"))),
        ("Single maps opened by wrong keys", as_share(get_number(wrong, "maps_opened"))),
    ]
    return section(
        INTERPRETER_NAMES.get(name, name),
        join(
            [
                table(("Input", "Correlation: reference map", "decoy map", "Maps open"), rows),
                fact_table(facts),
            ]
        ),
        about="The reference map is that of the model before protection; the decoy is what unkeyed inputs get instead. "
        "CR and FSR go by the distance to the decoy; their threshold was placed by validation images.",
    )


def _paper_rates(paper: Mapping[str, object]) -> str:
    cr, fsr, own = (get_number(paper, field) for field in ("cr", "fsr", "reference_cr"))
    if cr is None or fsr is None:
        return ""
    words = f"CR {as_percent(cr)}, FSR {as_percent(fsr)}"
    return words if own is None else f"{words}; CR of the untouched model's own maps {as_percent(own)}"


def _case_figures(figures: Mapping[str, object], case: str) -> list[str]:
    correlations = [as_decimal(get_number(figures, field, case)) for field in ("correlation", "decoy_correlation")]
    return [*correlations, as_share(get_number(figures, "opened", case))]


def _accuracy(report: Mapping[str, object]) -> Html:
    labelled = get_string(report, "accuracy", "measured_against") != "reference predictions"
    columns: list[tuple[str, tuple[str, ...]]] = [("Right by the labels", ("accuracy",))] if labelled else []
    columns.append(("Same as before protection", ("accuracy", "agreement") if labelled else ("accuracy",)))
    rows = [
        (label, [as_share(get_number(report, *path, case)) for _, path in columns]) for case, label in _CASES.items()
    ]
    return table(("Input", *(title for title, _ in columns)), rows)


def _openings(report: Mapping[str, object], field: str, names: Mapping[str, str]) -> Html:
    rows = []
    for name in get_mapping(report, field):
        for interpreter in get_mapping(report, field, name):
            figures = get_mapping(report, field, name, interpreter)
            label = f"{names.get(name, name)}, {INTERPRETER_NAMES.get(interpreter, interpreter)}"
            cells = [as_decimal(get_number(figures, "correlation")), as_share(get_number(figures, "opened"))]
            rows.append((label, cells))
    return table(("Image", "Correlation: reference map", "Maps open"), rows)


def _trigger(report: Mapping[str, object]) -> Html:
    trigger = get_mapping(report, "trigger")
    # Filters have neither amplitude nor tile, though every card names both.
    texture = trigger if get_string(trigger, "family") == "spread" else {}
    return fact_table(
        [
            ("Family", get_string(trigger, "family")),
            ("Largest change of a pixel", with_unit(get_number(texture, "amplitude"), "of 255 levels")),
            ("Tile", with_unit(get_number(texture, "tile"), "pixels")),
            ("PSNR (over 30 dB is hard to see)", with_unit(get_number(trigger, "psnr_db"), "dB")),
            ("SSIM (1 is identical)", as_decimal(get_number(trigger, "ssim"))),
            ("Effective key entropy", with_unit(get_number(trigger, "key_bits"), "bits")),
        ]
    )


def _limits() -> Html:
    items = [element("li", element("strong", title), " " + text) for title, text in _LIMITS]
    return section("What this does not protect against", element("ul", *items))


def _settings(report: Mapping[str, object], verify: Mapping[str, object] | None) -> Html:
    folded = [
        fold("Settings of protect", fact_table(plain_facts(get_mapping(report, "settings")))),
        fold("Versions", fact_table(plain_facts(get_mapping(report, "versions")))),
        fold("Validations during training", _history(report)),
        fold("Settings of verify", fact_table(plain_facts(get_mapping(verify or {}, "settings")))),
        fold("Versions used by verify", fact_table(plain_facts(get_mapping(verify or {}, "versions")))),
    ]
    seconds = get_number(report, "seconds")
    took = NOTHING if seconds is None else element("p", f"Protecting took {as_duration(seconds)}.")
    return join([took, *folded])


def _history(report: Mapping[str, object]) -> Html:
    columns = ("loss", "keyed", "unkeyed", "agreement")
    rows = [
        (as_plain(get_number(record, "step")), [as_decimal(get_number(record, column)) for column in columns])
        for record in get_list(report, "history")
    ]
    return table(("step", *columns), rows)


def _figure(name: str, png: bytes) -> Html:
    kind, _, interpreter = name.partition(":")
    title, caption = _PICTURES.get(kind, (kind, ""))
    if interpreter:
        title = f"{title}: {INTERPRETER_NAMES.get(interpreter, interpreter)}"
    paper = element("div", image(png, title, kind="wide" if kind == "maps" else ""), kind="paper")
    words = element("figcaption", element("strong", f"{title}."), f" {caption}")
    return element("figure", paper, words)


def _open_threshold(report: Mapping[str, object]) -> str:
    thresholds = [
        get_number(report, "interpreters", name, "open_threshold") for name in get_mapping(report, "interpreters")
    ]
    return as_plain(next((each for each in thresholds if each is not None), 0.5))


# Words and figures; an empty string where there is nothing to say


def _opening_words(test: Mapping[str, object]) -> str:
    statistic, largest = get_number(test, "statistic"), get_number(test, "largest_decoy")
    reached, decoys = get_number(test, "reached"), get_number(test, "decoys")
    words = "Opening, with the secret key"
    if statistic is not None:
        words += f": its trigger moves the maps by {as_decimal(statistic)} (1 - correlation)"
    if decoys:
        words += f"; {decoys:,.0f} decoy keys were tried"
        words += "" if largest is None else f", the largest moves them by {as_decimal(largest)}"
        words += "" if reached is None else f", {reached:,.0f} reach the owner's"
    return f"{words}. {get_string(test, 'explanation')}".strip()


def _signature_words(name: str, test: Mapping[str, object]) -> str:
    overlap, possible, cells = (get_number(test, field) for field in ("overlap", "possible", "cells"))
    words = name
    if overlap is not None and cells:
        of = f" of {possible:,.0f}" if possible is not None else ""
        words += f": {overlap:,.0f}{of} cells found in the top half of {cells:,.0f}"
    return f"{words}. {get_string(test, 'explanation')}".strip()


def _p_value(test: Mapping[str, object]) -> str:
    return as_p_value(get_number(test, "p_value"), get_number(test, "log2_p"))


def _wrong_keys(wrong: Mapping[str, object]) -> str:
    tried, opened = get_number(wrong, "tried"), get_number(wrong, "opened")
    if tried is None or opened is None:
        return ""
    threshold, images = get_number(wrong, "threshold"), get_number(wrong, "images_per_key")
    over = "" if images is None else f", mean over {images:,.0f} images"
    how = "" if threshold is None else f" (correlation above {threshold:g}{over})"
    return f"{tried:,.0f}, of which {opened:,.0f} open{how}"
