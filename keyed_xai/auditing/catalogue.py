"""All that an audit can run, by name: defences, checks, removal attacks, attacks on the key, ways round the gate.

To add one, write a function from a `Subject` and settings to an `Observation` and enter an `Examination` in a table of
its kind, such as `gate_entries.KEY_ATTACKS`; a `Removal` goes into `removal.REMOVALS`.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from keyed_xai.auditing.defence_entries import DEFENCES
from keyed_xai.auditing.entries import Entry, Observation, is_closed
from keyed_xai.auditing.gate_entries import BYPASSES, CHECKS, KEY_ATTACKS
from keyed_xai.auditing.removal_entries import REMOVALS, STACKED, stack
from keyed_xai.auditing.subject import Subject, state_before
from keyed_xai.errors import ModelError, TrainingError

_OPENINGS = ("gate opened", "gate leaks", "resists")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was tried, at what strength, what it cost and what was left.

    Attributes:
        name: A name in AUDITS, or names of REMOVALS joined by "+".
        entry: What was run.
        observation: What it found.
        seconds: Seconds that it took.
    """

    name: str
    entry: Entry[Any]
    observation: Observation
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return all that the schema "audit-finding" asks for but the identity."""
        entry, observation = self.entry, self.observation
        states = {"before": observation.before, "after": observation.after}
        return {
            "name": self.name,
            "group": entry.group,
            "threat": entry.threat,
            "title": entry.title,
            "strength": entry.strength,
            "outcome": observation.outcome,
            "sentence": observation.sentence,
            **{name: state.to_json() for name, state in states.items() if state is not None},
            "figures": observation.figures,
            "curve": observation.curve,
            "seconds": self.seconds,
        }


def run_entry(name: str, subject: Subject) -> Finding:
    """Return what an entry finds; that it could not be run on this model or these images is a finding too.

    Raises:
        ValueError: There is no such entry.
    """
    entry, started = find_entry(name), time.perf_counter()
    try:
        observation = _against_baseline(subject, entry.run(subject))
    except (TrainingError, ModelError) as error:
        observation = Observation(outcome="failed", sentence=str(error))
    return Finding(name=name, entry=entry, observation=observation, seconds=time.perf_counter() - started)


def _against_baseline(subject: Subject, observation: Observation) -> Observation:
    """Return a finding of maps without the key; where they are right anyway, no gate was opened."""
    if observation.after is not None or observation.outcome not in _OPENINGS or is_closed(state_before(subject)):
        return observation
    sentence = f"There was no closed gate before. {observation.sentence}"
    return replace(observation, outcome="nothing to remove", sentence=sentence)


def find_entry(name: str) -> Entry[Any]:
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
    return stack(parts)


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


def _is_in(entry: Entry[Any], group: str) -> bool:
    return group == "all" or group in (entry.group, *entry.also) or (group == "quick" and not entry.slow)


AUDITS: dict[str, Entry[Any]] = {
    **DEFENCES,
    **{name: entry for name, entry in REMOVALS.items() if entry.group == "defences"},
    **CHECKS,
    **{name: entry for name, entry in REMOVALS.items() if entry.group == "removal"},
    **{name: stack(name.split("+")) for name in STACKED},
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
