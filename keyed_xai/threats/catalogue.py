"""All that an audit can run, by name: defences, checks, removal attacks, attacks on the key, ways round the gate.

To add one, write a function from a `Subject` to an `Observation` and enter it in a table of its kind, such as
`gate_entries.KEY_ATTACKS`; a removal attack goes into `removal.REMOVALS`.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from keyed_xai.errors import ModelError, TrainingError
from keyed_xai.rulings import DatedClaim, rule_on_claims
from keyed_xai.threats.defence_entries import DEFENCES
from keyed_xai.threats.entries import Entry, Observation, is_closed, judge_copy
from keyed_xai.threats.gate_entries import BYPASSES, CHECKS, KEY_ATTACKS
from keyed_xai.threats.overwriting import Dispute, measure_dispute
from keyed_xai.threats.removal import REMOVALS, STACKED, Removal, choose_overwriting, remove_in_turn
from keyed_xai.threats.subject import Subject, state_before

_TITLES = {
    "re-bn": "Batch norm re-estimated",
    "ftal-mild": "Fine-tuning, mild",
    "ftll": "Fine-tuning the last layer",
    "ftal": "Fine-tuning all layers",
    "rtll": "Retraining the last layer",
    "rtal": "Retraining head, tuning all layers",
    "ftal-frozen": "Fine-tuning, batch norm frozen",
    "ftal-adam": "Fine-tuning with Adam",
    "ft-sam": "Sharpness-aware fine-tuning",
    "explanations": "Explanation-aware fine-tuning",
    "prune-30": "Pruning 30 %",
    "prune-50": "Pruning 50 %",
    "prune-70": "Pruning 70 %",
    "fine-prune": "Fine-pruning",
    "fine-prune-50": "Fine-pruning half the channels",
    "int8": "8-bit weights",
    "int6": "6-bit weights",
    "int5": "5-bit weights",
    "fp16": "Half precision",
    "distil": "Distillation",
    "distil-other": "Distillation, another network",
    "cfn": "Batch norm relearnt",
    "shift": "Shifting filters",
    "shift-far": "Shifting filters, far",
    "regularise": "Weight decay",
    "overwrite": "Overwriting with a second key",
    "overwrite-beside": "A second key beside the first",
    "rescale": "Rescaling channels",
    "denoise": "Denoising inputs",
}
_DEFENCES_TOO = ("fine-prune", "denoise")
_SECOND_KEYS = ("overwrite", "overwrite-beside")
_OPENINGS = ("gate opened", "gate leaks", "resists")
_BRIEF = ("ftal-mild", "ftll", "ftal", "fine-prune")


@dataclass(frozen=True)
class Finding:
    """What was tried, at what strength, what it cost and what was left.

    Attributes:
        name: In AUDITS, or names of REMOVALS joined by "+".
        entry: What was run.
        observation: What it found.
        seconds: It took.
    """

    name: str
    entry: Entry
    observation: Observation
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return all that the schema "audit-finding" asks for but the identity."""
        entry, seen = self.entry, self.observation
        states = {"before": seen.before, "after": seen.after}
        return {
            "name": self.name,
            "group": entry.group,
            "threat": entry.threat,
            "title": entry.title,
            "strength": entry.strength,
            "outcome": seen.outcome,
            "sentence": seen.sentence,
            **{name: state.to_json() for name, state in states.items() if state is not None},
            "figures": seen.figures,
            "curve": seen.curve,
            "seconds": self.seconds,
        }


def run_entry(name: str, subject: Subject) -> Finding:
    """Return what an entry finds; that it could not be run on this model or these images is a finding too.

    Raises:
        ValueError: There is no such entry.
    """
    entry, started = find_entry(name), time.perf_counter()
    try:
        seen = _against_baseline(subject, entry.run(subject))
    except (TrainingError, ModelError) as error:
        seen = Observation("failed", str(error))
    return Finding(name, entry, seen, time.perf_counter() - started)


def _against_baseline(subject: Subject, seen: Observation) -> Observation:
    """Return a finding of maps without the key; where they are right anyway, no gate was opened."""
    if seen.after is not None or seen.outcome not in _OPENINGS or is_closed(state_before(subject)):
        return seen
    return replace(seen, outcome="nothing to remove", sentence=f"There was no closed gate before. {seen.sentence}")


def find_entry(name: str) -> Entry:
    """Return the entry of a name; names of REMOVALS joined by "+" are attacks one after the other.

    Raises:
        ValueError: There is none.
    """
    if name in AUDITS:
        return AUDITS[name]
    parts = name.split("+")
    unknown = [part for part in parts if part not in REMOVALS]
    if unknown:
        raise ValueError(
            f"Expected a group ({', '.join(GROUPS)}), a name ({', '.join(AUDITS)}), or names of removal attacks joined "
            f"by +, such as prune-30+ftal; got {unknown[0]!r}."
        )
    return _stack(parts)


def choose_entries(names: Iterable[str]) -> list[str]:
    """Return what names and groups stand for, each once, in the order of AUDITS; stacked attacks come last.

    Raises:
        ValueError: A name is unknown.
    """
    asked = list(dict.fromkeys(names))
    stacked = [name for name in asked if name not in GROUPS and name not in AUDITS]
    for name in stacked:
        find_entry(name)
    return [name for name, entry in AUDITS.items() if any(each == name or _is_in(entry, each) for each in asked)] + (
        stacked
    )


def _is_in(entry: Entry, group: str) -> bool:
    return group == "all" or group in (entry.group, *entry.also) or (group == "quick" and not entry.slow)


def _remove(subject: Subject, names: Sequence[str]) -> Observation:
    results = remove_in_turn(names, subject.classifier, subject.attacker())
    figures = results[-1].figures if len(results) == 1 else {"stages": [each.figures for each in results]}
    return judge_copy(subject, results[-1].model, figures=figures, curve=results[-1].curve)


def _dispute(subject: Subject, name: str) -> Observation:
    """Return what is left after a second key was put on a model, with both claims and whose it is."""
    attacker = subject.attacker()
    result = REMOVALS[name](subject.classifier, attacker)
    seen = judge_copy(subject, result.model, figures=result.figures, curve=result.curve)
    if subject.witness is None:
        return seen
    settings = choose_overwriting(attacker, beside=name == "overwrite-beside")
    dispute = measure_dispute(result.model, subject.classifier, subject.witness, settings)
    second = dispute.second.ownership
    claims = (
        DatedClaim("the first owner", dispute.first_shown, subject.witness.licensed),
        DatedClaim("the second owner", second is not None and second.shown, datetime.now(UTC)),
    )
    ruling, stolen = rule_on_claims(*claims), bool(seen.before and (seen.before.ownership or {}).get("shown"))
    shown = ["shown" if claim.shown else "not shown" for claim in claims]
    sentence = (
        f"{seen.sentence} With the pattern behind the second key's gate (2^{dispute.behind.combined.log2_p:.0f}) the "
        f"first claim is {shown[0]}; the second is {shown[1]} (keyed maps {_least_keyed(dispute):.2f}). "
        f"{ruling.reason} The model that the second owner must call his original "
        f"{'shows' if stolen else 'does not show'} the first claim."
    )
    figures = seen.figures | {
        "dispute": dispute.to_json(),
        "claims": [{"owner": c.owner, "shown": c.shown, "time": c.time and c.time.isoformat()} for c in claims],
        "ruling": {"owner": ruling.owner, "proven": ruling.proven, "reason": ruling.reason},
    }
    outcome = seen.outcome if not claims[0].shown or seen.outcome != "removed" else "maps damaged"
    return replace(seen, outcome=outcome, sentence=sentence, figures=figures)


def _least_keyed(dispute: Dispute) -> float:
    return min(each["keyed"] for each in dispute.second.correlation.values())


def _enter(name: str, removal: Removal) -> Entry:
    """Return the entry of a removal attack; some are published as defences, which controls can put to the test."""
    defence = name in _DEFENCES_TOO
    return Entry(
        "defences" if defence else "removal",
        removal.threat,
        _TITLES.get(name, name),
        removal.strength,
        partial(_dispute, name=name) if name in _SECOND_KEYS else partial(_remove, names=[name]),
        frozenset({"state", "surrogate"} if name == "explanations" else {"state"}),
        slow=removal.trains and name not in _BRIEF,
        also=("removal",) if defence else (),
        controlled=defence,
        passes=removal.passes,
    )


def _stack(names: Sequence[str]) -> Entry:
    entries = [_REMOVALS[name] for name in names]
    return Entry(
        "removal",
        "T7",
        ", then ".join(entry.title for entry in entries),
        "; then ".join(entry.strength for entry in entries),
        partial(_remove, names=names),
        frozenset[str]().union(*(entry.needs for entry in entries)),
        slow=True,
    )


_REMOVALS = {name: _enter(name, removal) for name, removal in REMOVALS.items()}
AUDITS: dict[str, Entry] = {
    **DEFENCES,
    **{name: _REMOVALS[name] for name in _DEFENCES_TOO},
    **CHECKS,
    **{name: entry for name, entry in _REMOVALS.items() if name not in _DEFENCES_TOO},
    **{name: _stack(name.split("+")) for name in STACKED},
    **KEY_ATTACKS,
    **BYPASSES,
}
"""What `audit --against` takes, in the order of a report."""
GROUPS = {
    "quick": "what takes seconds to a minute or two on a small model",
    "defences": "backdoor defences, beside positive controls",
    "checks": "what a defender of explanations would look at",
    "removal": "attacks that remove a gate, an ownership mark or a backdoor from a model",
    "keys": "attacks on the key and its trigger",
    "bypass": "explanations that go round the gate",
    "all": "everything",
}
"""Names of groups, which `audit --against` takes too, in words."""
