"""The report of an audit as one HTML file that explains itself: no scripts, no network, printable.

Names in a report may come from files of strangers: `markup` escapes every value. What a report lacks is left out.
"""

from collections.abc import Callable, Mapping, Sequence

from keyed_xai.markup import (
    NOTHING,
    Answer,
    Html,
    as_decimal,
    as_duration,
    as_p_value,
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
)
from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.threats.entries import ACCEPTED_LOSS, KEYED_FLOOR, THREATS, UNKEYED_CEILING

_STYLE = (
    ".audit td,.audit th{padding:.38rem .5rem;vertical-align:top}"
    ".audit td{text-align:left;white-space:normal}.audit td.figure{text-align:right;white-space:nowrap}"
    ".audit th.group{color:var(--soft);padding-top:1.1rem;text-align:left;font-weight:600}"
    ".audit thead th{text-align:left}.audit thead th.figure{text-align:right}"
    ".audit tbody th{min-width:11rem}.audit small{display:block;color:var(--soft);font-weight:400}"
    ".good{background:color-mix(in srgb,var(--yes) 16%,transparent)}"
    ".middling{background:color-mix(in srgb,var(--part) 20%,transparent)}"
    ".bad{background:color-mix(in srgb,var(--no) 18%,transparent)}"
    "main td.power{white-space:nowrap}main .outcome{font-weight:600;white-space:nowrap}"
    "body{max-width:76rem}.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(24rem,1fr));gap:0 1.5rem}"
)
_GROUPS = {
    "defences": "Backdoor defences",
    "checks": "Checks of explanations",
    "removal": "Removal attacks",
    "keys": "Attacks on the key",
    "bypass": "Ways round the gate",
}
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
    "Ownership or a backdoor is removed by:": ("removed",),
    "A key is forged by:": ("forged",),
    "The gate is opened by:": ("gate opened",),
    "It leaks under:": ("gate leaks",),
    "The trigger is noticed by:": ("flagged",),
}
_NAMED = 3
_WORTH = {"works here": "good", "proves little here": "middling", "proves nothing here": "bad"}
_FIGURES = ("accuracy", "keyed", "unkeyed")
_PLAIN = {
    "outcome": "result",
    "accuracy": "accuracy",
    "keyed": "keyed",
    "unkeyed": "unkeyed",
    "ownership": "ownership p",
}
_KINDS = {
    "keyed": "a model whose explanations need a key",
    "attacked": "a model whose explanations were backdoored with a public trigger",
    "plain": "a model of which nothing is known",
}
_CONTROLS = {"clean": "Clean network", "badnets": "Patch backdoor", "blended": "Blended backdoor"}
_MEASURES = {"top1": "Top-1 accuracy", "auroc": "AUROC", "agreement": "Agreement with the model before"}
_MEANING = (
    ("Colours.", "Red: found, opened or removed. Green: it was not. Amber: in part, or at a price."),
    (
        "Nothing to remove.",
        "The state before any attack is in the first row. What was not there before cannot have been removed: no gate "
        "where unkeyed maps correlate over .5 with the right ones, no mark where ownership is not shown, no backdoor "
        "where triggered maps are right.",
    ),
    (
        "Accuracy.",
        "Of images without a trigger, after the attack; below it the change. An attack that costs more than 2 points "
        "spoils what it wants to keep, and its cell is red.",
    ),
    (
        "Maps with and without the trigger.",
        "Mean correlation of the model's saliency maps with the right ones: those of the reference model, or without "
        "one those of the model itself where they are not faked. 1 is the same, 0 unrelated. A gate holds while keyed "
        "maps are at .8 or more and unkeyed ones at .3 or less.",
    ),
    (
        "Ownership.",
        "Probability that a model that has nothing to do with the key shows as much by chance, both tests together, "
        "and below it that of each test: 2^-40 is one in a million millions, which is what shown means.",
    ),
    (
        "Positive controls.",
        "Each defence also ran, with the same settings, on a clean network and on two with plain backdoors (a patch, "
        "and a pattern blended into the image), fitted to the same images. What a defence does not find proves "
        "nothing if it does not find these either.",
    ),
    (
        "What this does not show.",
        "Only what is listed was tried, at the strength that is listed. Stronger attacks may exist.",
    ),
)


def render_audit_report(report: Mapping[str, object], *, pictures: Mapping[str, bytes] | None = None) -> str:
    """Return one self-contained HTML page.

    Args:
        report: As schemas/audit-report.json describes it; what is missing is left out.
        pictures: PNG files by name: "curve:" and a finding's name, or "curve:", a control's, ":" and a finding's.
    """
    drawn = pictures or {}
    return page(
        "Report on an audit",
        element("style", _STYLE),
        _headline(report),
        section("What was tried, and what was left", _findings(report), about=_about_findings(report)),
        section("What the defences are worth", _controls(report)),
        section("Stage by stage", _curves(report, drawn), about="Small steps of the attacks that have any."),
        section("Not run", _not_run(report)),
        section("How to read this", _meaning()),
        section("Settings and versions", _settings(report)),
    )


def list_findings(report: Mapping[str, object]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of a plain table: what was tried, the result, and in few figures what is left."""
    columns = {name: title for name, title in _PLAIN.items() if name in _columns(report)}
    states = [("Before any attack", "", get_mapping(report, "model", "before"))] if len(columns) > 1 else []
    found = get_list(report, "findings")
    states += [(get_string(each, "title"), get_string(each, "outcome"), get_mapping(each, "after")) for each in found]
    rows = []
    for title, outcome, state in states:
        maps = get_mapping(state, "correlation")
        cells = {
            "outcome": outcome,
            "accuracy": as_share(get_number(state, "accuracy")),
            "keyed": _few(min, [get_number(maps, name, "keyed") for name in maps]),
            "unkeyed": _few(max, [get_number(maps, name, "unkeyed") for name in maps]),
            "ownership": _power(get_number(state, "ownership", "log2_p")),
        }
        rows.append([title, *(cells[name] for name in columns)])
    return ["", *columns.values()], rows


def grade_outcome(outcome: str) -> str:
    """Return "good", "middling" or "bad" for the model audited; empty where an outcome is neither."""
    return _COLOURS.get(outcome, "")


# Sections, in the order of the page


def _headline(report: Mapping[str, object]) -> Html:
    name, kind = get_string(report, "model", "name"), get_string(report, "model", "kind")
    cards = [
        card("Is ownership still shown?", *_judge(report, _ownership_kept)),
        card("Does the gate hold?", *_judge(report, _gate_kept)),
        card("Does the backdoor of its explanations survive?", *_judge(report, _fooling_kept), alarm=True),
        card("Do defences notice the trigger?", *_judge_defences(report), alarm=True),
    ]
    return join(
        [
            element("h1", f"Report on an audit of {name}" if name else "Report on an audit"),
            element("p", _summary(report), kind="headline"),
            element("div", *cards, kind="cards") if any(cards) else NOTHING,
            element("p", f"This is {_KINDS[kind]}. {_known(report)}") if kind in _KINDS else NOTHING,
            fact_table(_facts(report)),
            *(element("p", note) for note in get_strings(report, "notes")),
        ]
    )


def _findings(report: Mapping[str, object]) -> Html:
    found = get_list(report, "findings")
    columns, before = _columns(report), get_mapping(report, "model", "before")
    rows = [_finding_row({"title": "Before any attack", "after": before}, columns)] if len(columns) > 1 else []
    for group, title in _GROUPS.items():
        some = [each for each in found if get_string(each, "group") == group]
        if some:
            rows.append(element("tr", element("th", title, kind="group"), *(element("td", "") for _ in columns)))
            rows += [_finding_row(each, columns) for each in some]
    if not found:
        return NOTHING
    heads = [element("th", title, kind="figure" if name in _FIGURES else "") for name, title in columns.items()]
    first = element("th", "What was tried, and how hard")
    body = element("table", element("thead", element("tr", first, *heads)), element("tbody", *rows), kind="audit")
    return element("div", body, kind="scroll")


def _finding_row(found: object, columns: Mapping[str, str]) -> Html:
    threat, strength = get_string(found, "threat"), get_string(found, "strength")
    kind = f"{THREATS[threat]} ({threat}): " if threat in THREATS else ""
    said = element("small", f"{kind}{strength}")
    cells = {
        "outcome": _outcome_cell(get_string(found, "outcome"), get_string(found, "sentence")),
        "accuracy": _accuracy_cell(found),
        "keyed": _map_cell(found, "keyed"),
        "unkeyed": _map_cell(found, "unkeyed"),
        "ownership": _ownership_cell(found),
    }
    name = element("th", get_string(found, "title") or get_string(found, "name"), said)
    return element("tr", name, *(cells[column] for column in columns))


def _outcome_cell(outcome: str, sentence: str) -> Html:
    return element(
        "td", element("span", outcome, kind="outcome"), element("small", sentence), kind=grade_outcome(outcome)
    )


def _accuracy_cell(found: object) -> Html:
    before, after = (get_number(found, stage, "accuracy") for stage in ("before", "after"))
    if after is None:
        return element("td", "")
    lost = None if before is None else before - after
    change = "" if lost is None else f"{round(-100 * lost, 1) + 0.0:+.1f} points"  # + 0.0: no negative zero
    kind = "" if lost is None else " bad" if lost > ACCEPTED_LOSS else " good"
    return element("td", as_share(after), element("small", change), kind=f"figure{kind}")


def _map_cell(found: object, case: str) -> Html:
    """Return correlations of each interpreter's maps, coloured where a gate is judged by them."""
    after = get_mapping(found, "after", "correlation")
    lines = []
    for name in after:
        value = get_number(after, name, case)
        label = f" {name}" if len(after) > 1 else ""
        lines.append(element("div", f"{as_decimal(value)}{label}"))
    values = [value for name in after if (value := get_number(after, name, case)) is not None]
    gated = bool(get_mapping(found, "after", "ownership")) and values
    kind = _grade_maps(values, case) if gated else ""
    return element("td", *lines, kind=f"figure {kind}".strip())


def _grade_maps(values: Sequence[float], case: str) -> str:
    if case == "keyed":
        return "good" if min(values) >= KEYED_FLOOR else "middling" if min(values) > OPEN_CORRELATION else "bad"
    return "good" if max(values) <= UNKEYED_CEILING else "middling" if max(values) <= OPEN_CORRELATION else "bad"


def _ownership_cell(found: object) -> Html:
    proof = get_mapping(found, "after", "ownership")
    if not proof:
        return element("td", "")
    shown = proof.get("shown") is True
    parts = [
        element("small", f"{title} {_power(get_number(proof, test, 'log2_p'))}")
        for test, title in (("opening", "by the trigger"), ("signature", "by the pattern"))
        if get_mapping(proof, test)
    ]
    words = f"{'shown' if shown else 'not shown'}, {_power(get_number(proof, 'log2_p'))}"
    return element("td", words, *parts, kind="power good" if shown else "power bad")


def _controls(report: Mapping[str, object]) -> Html:
    judged, own = get_list(report, "defences"), _outcomes(report)
    if not judged:
        return NOTHING
    heads = [element("th", title) for title in ("Defence", "This model", *_CONTROLS.values(), "What it is worth")]
    rows = []
    for each in judged:
        outcomes = [own.get(get_string(each, "name"), "")]
        outcomes += [get_string(each, "outcomes", control) for control in _CONTROLS]
        cells = [element("td", word, kind=f"outcome {grade_outcome(word)}".strip()) for word in outcomes[:1]]
        cells += [
            element("td", word, kind=_right_answer(word, control))
            for word, control in zip(outcomes[1:], _CONTROLS, strict=True)
        ]
        verdict = get_string(each, "verdict")
        worth = element("td", verdict, element("small", get_string(each, "sentence")), kind=_WORTH.get(verdict, ""))
        rows.append(element("tr", element("th", get_string(each, "title")), *cells, worth))
    body = element("table", element("thead", element("tr", *heads)), element("tbody", *rows), kind="audit")
    return join([element("div", body, kind="scroll"), _control_facts(report)])


def _control_facts(report: Mapping[str, object]) -> Html:
    rows = []
    for name, title in _CONTROLS.items():
        figures = get_mapping(report, "controls", name)
        poisoned = get_number(figures, "poisoned")
        cells = [
            as_share(get_number(figures, "before", "accuracy")),
            as_share(get_number(figures, "before", "attack_success")),
            "" if poisoned is None else f"{poisoned:,.0f}",
        ]
        rows.append((title, cells))
    return table(
        ("Positive control", "Accuracy", "Images that its trigger sends to the class", "Poisoned images"), rows
    )


def _curves(report: Mapping[str, object], pictures: Mapping[str, bytes]) -> Html:
    own, others = [], []
    for each in get_list(report, "findings"):
        name, title = get_string(each, "name"), get_string(each, "title")
        if f"curve:{name}" in pictures:
            own.append(_figure(pictures[f"curve:{name}"], title))
        for control, words in _CONTROLS.items():
            if f"curve:{control}:{name}" in pictures:
                others.append(_figure(pictures[f"curve:{control}:{name}"], f"{title}, {words.lower()}"))
    grid = element("div", *own, kind="curves") if own else NOTHING
    return join([grid, fold("Positive controls", element("div", *others, kind="curves") if others else NOTHING)])


def _not_run(report: Mapping[str, object]) -> Html:
    rows = [
        (get_string(each, "title") or get_string(each, "name"), [get_string(each, "strength"), get_string(each, "why")])
        for each in get_list(report, "not_run")
    ]
    kept = [
        element("tr", element("th", label), *(element("td", cell) for cell in cells)) for label, cells in rows if label
    ]
    if not kept:
        return NOTHING
    heads = [element("th", title) for title in ("What", "How hard", "Not run because it")]
    body = element("table", element("thead", element("tr", *heads)), element("tbody", *kept), kind="audit")
    return element("div", body, kind="scroll")


def _meaning() -> Html:
    return element("ul", *(element("li", element("strong", title), f" {text}") for title, text in _MEANING))


def _settings(report: Mapping[str, object]) -> Html:
    seconds = get_number(report, "seconds")
    return join(
        [
            element("p", f"The audit took {as_duration(seconds)}.") if seconds is not None else NOTHING,
            fold("Settings", fact_table(plain_facts(get_mapping(report, "settings")))),
            fold("Versions", fact_table(plain_facts(get_mapping(report, "versions")))),
        ]
    )


# Words and figures; an empty string where there is nothing to say


def _summary(report: Mapping[str, object]) -> str:
    """Return what happened, in one sentence for each kind of thing that was tried."""
    worthless = {
        get_string(each, "name")
        for each in get_list(report, "defences")
        if get_string(each, "verdict") == "proves nothing here"
    }
    found = get_list(report, "findings")
    counted = [each for each in found if _is_cheap(each) and get_string(each, "name") not in worthless]
    sentences = []
    for words, outcomes in _TOLD.items():
        names = [get_string(each, "title") for each in counted if _outcome(each) in outcomes]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            sentences.append(f"{words} {'; '.join(names[:_NAMED])}{more}.")
    if sentences:
        return " ".join(sentences)
    if any(_outcome(each) == "nothing to remove" for each in found):
        return "There was nothing to remove: the model had no gate, mark or faked maps before any attack."
    nothing = f"Nothing was found, opened or removed by {len(found)} defences and attacks."
    return nothing if found else "Nothing was run."


def _about_findings(report: Mapping[str, object]) -> str:
    measure = get_string(report, "model", "before", "measure")
    before = get_number(report, "model", "before", "accuracy")
    return f"{_MEASURES[measure]} is {as_share(before)} before any attack." if measure in _MEASURES else ""


def _known(report: Mapping[str, object]) -> str:
    names = {"key": "the owner's key", "reference": "the reference model", "trigger": "the trigger",
             "surrogate": "a surrogate", "labels": "labels"}  # fmt: skip
    known = [names[each] for each in get_strings(report, "model", "known") if each in names]
    return f"The auditor had {', '.join(known)}." if known else "The auditor had the model alone."


def _facts(report: Mapping[str, object]) -> list[tuple[str, str]]:
    before = get_mapping(report, "model", "before", "correlation")
    maps = [
        f"{name}: with the trigger {as_decimal(get_number(before, name, 'keyed'))}, "
        f"without {as_decimal(get_number(before, name, 'unkeyed'))}"
        for name in before
    ]
    return [
        ("Architecture", get_string(report, "model", "architecture")),
        ("Maps before any attack", "; ".join(maps)),
        ("Key", get_string(report, "model", "key_id")[:16]),
        ("Images to attack and defend with", describe_data(get_mapping(report, "data", "train"))),
        ("Measured on", describe_data(get_mapping(report, "data", "held_out"))),
    ]


def _judge(report: Mapping[str, object], keeps: Callable[[object], bool | None]) -> tuple[Answer | None, str]:
    """Return whether something is kept after all attacks that cost at most 2 points, and the count."""
    answers = [keeps(each) for each in get_list(report, "findings") if _is_cheap(each)]
    kept = [answer for answer in answers if answer is not None]
    if not kept:
        return None, ""
    said = f"After {sum(kept)} of {len(kept)} attacks that cost at most 2 points of accuracy."
    return ("yes" if all(kept) else "in part" if any(kept) else "no"), said


def _ownership_kept(found: object) -> bool | None:
    proof = get_mapping(found, "after", "ownership")
    return proof.get("shown") is True if proof and get_mapping(found, "before", "ownership").get("shown") else None


def _gate_kept(found: object) -> bool | None:
    after = get_mapping(found, "after", "correlation")
    before = get_mapping(found, "before", "correlation")
    leaks = [get_number(before, name, "unkeyed") or 0.0 for name in before]
    if not after or not get_mapping(found, "after", "ownership") or max(leaks, default=0.0) > OPEN_CORRELATION:
        return None
    return all(
        _grade_maps([value], case) == "good"
        for name in after
        for case in ("keyed", "unkeyed")
        if (value := get_number(after, name, case)) is not None
    )


def _fooling_kept(found: object) -> bool | None:
    if get_mapping(found, "after", "ownership") or not get_mapping(found, "after", "correlation"):
        return None
    return None if _outcome(found) == "nothing to remove" else _outcome(found) != "removed"


def _judge_defences(report: Mapping[str, object]) -> tuple[Answer | None, str]:
    """Return whether the defences that work on the controls flag the model."""
    own = _outcomes(report)
    worth = {get_string(each, "name"): get_string(each, "verdict") for each in get_list(report, "defences")}
    trusted = [own[name] for name, verdict in worth.items() if verdict == "works here" and name in own]
    if not trusted:
        return None, ""
    flagged = sum(grade_outcome(word) == "bad" for word in trusted)
    said = f"{flagged} of the {len(trusted)} that catch both controls do."
    return ("yes" if flagged == len(trusted) else "in part" if flagged else "no"), said


def _columns(report: Mapping[str, object]) -> dict[str, str]:
    """Return the columns that have something in them."""
    after = [get_mapping(each, "after") for each in get_list(report, "findings")]
    columns = {"outcome": "Result"}
    if any(after):
        columns["accuracy"] = "Accuracy left"
    if any(each.get("correlation") for each in after):
        columns |= {"keyed": "Maps with the trigger", "unkeyed": "Maps without it"}
    if any(each.get("ownership") for each in after):
        columns["ownership"] = "Ownership"
    return columns


def _is_cheap(found: object) -> bool:
    before, after = (get_number(found, stage, "accuracy") for stage in ("before", "after"))
    return before is None or after is None or before - after <= ACCEPTED_LOSS


def _right_answer(outcome: str, control: str) -> str:
    caught = grade_outcome(outcome) == "bad"
    return "good" if caught != (control == "clean") else "bad" if outcome else ""


def _power(log2_p: float | None) -> str:
    """Return a probability as a power of two, or as it is where it is no small one."""
    return as_p_value(None, log2_p).partition(" ")[0]


def _few(choose: Callable[[list[float]], float], values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return as_decimal(choose(known)) if known else ""


def _outcome(found: object) -> str:
    return get_string(found, "outcome")


def _outcomes(report: Mapping[str, object]) -> dict[str, str]:
    return {get_string(each, "name"): _outcome(each) for each in get_list(report, "findings")}


def _figure(png: bytes, title: str) -> Html:
    paper = element("div", image(png, f"Curves: {title}"), kind="paper")
    return element("figure", paper, element("figcaption", element("strong", title)))
