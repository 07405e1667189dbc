"""A verdict on ownership in plain words."""

import math

from keyed_xai.ownership.tests import SECRET_LEVEL, OpeningEvidence, PatternEvidence, counted_interpreters, product_tail
from keyed_xai.ownership.verdict import Finding, Verdict

WHY_NOT_COUNTED = (
    "whoever has the weights can change VisualBackProp's maps at no cost in accuracy, by rescaling channels (logits "
    "unchanged to 2e-15, correlation of maps down to .20)"
)
_NOTHING = 0.05  # p-value of the secret test above which the trigger does nothing that random ones do not
_ANYBODY = "Anybody can train a model to show somebody's public pattern"
ENOUGH_DECOYS = math.ceil(2 / SECRET_LEVEL) - 1
"""Random keys with which the secret test can hold though one of them reaches the owner's statistic."""
_NOT_SHOWN = "Not shown that the model answers to this key"


def describe_verdict(verdict: Verdict, *, decoys: int) -> str:
    """Return a verdict in plain words; chances are those of all that was tested, looks counted.

    Args:
        verdict: The verdict to describe.
        decoys: Random keys asked for.
    """
    evidence = " and ".join(_clauses(verdict))
    match verdict.finding:
        case Finding.NOT_TESTED if verdict.has_key:
            return (f"{_NOT_SHOWN}: the secret trigger was not tested, since no outcome could have mattered."
                    f"{_reach_hint(verdict, decoys)}")  # fmt: skip
        case Finding.NOT_TESTED:
            return (f"{_NOT_SHOWN}: nothing could be tested. The claim has no public pattern, and the test of its "
                    "secret trigger needs the private key.")  # fmt: skip
        case Finding.NOT_COUNTED:
            return (f"{_NOT_SHOWN}: the claim rests on VisualBackProp alone, which counts for nothing, since "
                    f"{WHY_NOT_COUNTED}. Protect with gradcam too. For what it is worth, {evidence}.")  # fmt: skip
        case Finding.CONSTANT_MAPS:
            return (f"{_NOT_SHOWN}, nor that it does not: there is nothing to read in its maps, which are constant or "
                    "not finite on all images, as those of a class are that wins whatever the image. Get the logits of "
                    "the classes in use, before any softmax, and test again.")  # fmt: skip
        case Finding.KEY:
            return f"The model answers to this key{_through(verdict)}: {evidence}; {_shown_chance(verdict)}"
        case Finding.PUBLIC_PATTERN:
            return (f"The model shows this key's public pattern{_through(verdict)}: {evidence}; "
                    f"{_shown_chance(verdict)} {_ANYBODY}; the secret trigger was not tested.")  # fmt: skip
        case Finding.PATTERN_ONLY:
            return f"The model shows this key's public pattern{_through(verdict)}{_pattern_alone(verdict, evidence)}"
    hints = f"{_missed_chance(verdict)}{_flat_note(verdict)}{_reach_hint(verdict, decoys)}"
    return f"{_NOT_SHOWN}: {evidence}{hints} This does not show that the model is unrelated to the key."


def _pattern_alone(verdict: Verdict, evidence: str) -> str:
    """Return what became of the secret test where the public pattern is there and the key is not shown."""
    opening = verdict.opening
    if opening is None or opening.reached <= 1:
        return (f": {evidence}. {_ANYBODY}, and so few random keys cannot tell whether it answers to the secret "
                f"trigger: give --decoys {ENOUGH_DECOYS} or more.")  # fmt: skip
    did = "did nothing that random ones do not" if opening.p_value > _NOTHING else "hardly stands out"
    return (f", and the secret trigger {did}: {evidence}. {_ANYBODY}, so that it answers to the key is not "
            "shown.")  # fmt: skip


def _clauses(verdict: Verdict) -> list[str]:
    found = [_opening_clause(verdict.opening)] if verdict.opening else []
    return found + ([_signature_clause(verdict.signature.combined)] if verdict.signature else [])


def _opening_clause(evidence: OpeningEvidence) -> str:
    keys = "1 random key" if evidence.decoys == 1 else f"{evidence.decoys:,} random keys"
    who = "none" if evidence.reached == 0 else f"{evidence.reached:,}"
    reached = "as much" if evidence.reached == 0 else "as much or more"
    return f"of {keys} {who} moved its maps {reached} (p = {_p_in_words(evidence.p_value)})"


def _signature_clause(evidence: PatternEvidence) -> str:
    return (f"its unkeyed maps show the owner's public pattern in {evidence.overlap} of {evidence.possible} cells, "
            f"where chance gives about {round(evidence.possible / 2)} "
            f"(p = {_p_in_words(evidence.p_value, evidence.log2_p)})")  # fmt: skip


def _through(verdict: Verdict) -> str:
    """Return which re-encoding was looked through."""
    return "" if verdict.reencoding is None else f", once it is read as written anew ({verdict.reencoding})"


def _counted(verdict: Verdict) -> str:
    """Return what the chance counts, where it counts more than one test."""
    both = ["both tests"] * (verdict.opening is not None and verdict.signature is not None)
    looks = ["the search through re-encodings"] * (verdict.looks > 1)
    return f"counting {' and '.join(both + looks)}, " if both or looks else ""


def _shown_chance(verdict: Verdict) -> str:
    return (f"{_counted(verdict)}a chance match of this strength or better happens at most {_once_in(verdict.log2_p)} "
            f"(at most {_once_in(math.log2(verdict.alpha))} was asked for).")  # fmt: skip


def _missed_chance(verdict: Verdict) -> str:
    if verdict.log2_p > -1:
        return f"; {_counted(verdict)}as much is to be expected by chance."
    chance = f"; {_counted(verdict)}a chance match of this strength or better may happen {_once_in(verdict.log2_p)}"
    if verdict.log2_p <= math.log2(verdict.alpha):
        return f"{chance}, but the secret trigger does not stand out enough by itself, as it must (p at most .002)."
    return f"{chance}, and at most {_once_in(math.log2(verdict.alpha))} was asked for."


def _flat_note(verdict: Verdict) -> str:
    """Return on how many images there was nothing to read."""
    flat = [f"{name} on {count}" for name, count in verdict.constant.items() if count]
    return f" Of {verdict.images} images the maps are constant or not finite: {', '.join(flat)}." if flat else ""


def _reach_hint(verdict: Verdict, decoys: int) -> str:
    """Return what would have to be given, where even perfect evidence stays above alpha."""
    pattern = _perfect_pattern(verdict)
    secret = verdict.has_key or verdict.opening is not None
    tests = secret + (verdict.signature is not None)
    limit = math.log2(verdict.alpha) - math.log2(verdict.looks)
    best = product_tail(pattern - (math.log2(1 + decoys) if secret else 0), tests)
    if best <= limit:
        return ""
    why = f" No model could have shown more than {_once_in(best + math.log2(verdict.looks))}"
    if not secret:
        return f"{why} on a pattern of so few cells: test the secret trigger too, with the private key."
    counts = (10**power - 1 for power in range(1, 6))
    needed = next((count for count in counts if product_tail(pattern - math.log2(1 + count), tests) <= limit), None)
    if needed is None and verdict.signature is None:
        return f"{why} with {decoys:,} random keys and no public pattern: protect with the decoy signature."
    if needed is None:
        return (f"{why} with maps of so few cells: protect with more of them, or with gradcam and simplegrad, or give "
                "a larger --alpha from the start and have the key dated by a third party.")  # fmt: skip
    return f"{why} with {decoys:,} random keys: give --decoys {needed}."


def _perfect_pattern(verdict: Verdict) -> float:
    """Return the base-2 logarithm of the p-value of a perfect pattern; 0 without one."""
    if verdict.signature is None:
        return 0.0
    each = verdict.signature.interpreters
    cells = [each[name].cells for name in counted_interpreters(each) or each]
    return -sum(math.log2(math.comb(count, count // 2)) for count in cells)


def _p_in_words(p_value: float, log2_p: float | None = None) -> str:
    """Return .001 for a thousandth, and a power of two below half of that."""
    if p_value >= 0.0005:
        return "1" if p_value == 1 else f"{p_value:.3f}".removeprefix("0")
    return f"2^{math.log2(p_value) if log2_p is None else log2_p:.1f}"


def _once_in(log2_p: float) -> str:
    """Return a probability as "once in N claims", N rounded down."""
    digits = -log2_p * math.log10(2) + 1e-9  # so that a thousand stays a thousand
    if digits < 7:
        return f"once in {math.floor(10**digits):,} claims"
    exponent = math.floor(digits)
    leading = math.floor(10 ** (digits - exponent))
    return f"once in {f'{leading} x ' if leading > 1 else ''}10^{exponent} claims"
