"""What an audit runs: an entry looks at a subject and says what it observed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from keyed_xai.auditing.subject import State, Subject, measure_state, state_before
from keyed_xai.metrics import OPEN_CORRELATION
from keyed_xai.models import Classifier

Outcome = Literal[
    "flagged",
    "unclear",
    "left alone",
    "survives",
    "resists",
    "gate leaks",
    "gate opened",
    "maps damaged",
    "removed",
    "forged",
    "nothing to remove",
    "reported",
    "not applicable",
    "failed",
]
"""What came of an entry. A defence or check: flagged, unclear, left alone. A removal attack: survives, gate leaks, gate
opened, maps damaged (the keyed ones), removed (the ownership claim, or the backdoor). An attack on the key: resists,
gate leaks, gate opened, forged. Either, where no gate, mark or backdoor was there before: nothing to remove."""
CAUGHT = ("flagged", "removed")
"""Outcomes by which a defence catches a positive control."""
ACCEPTED_LOSS = 0.02
"""Loss of accuracy, as a fraction, beyond which an attack spoils what it wants to keep."""
KEYED_FLOOR = 0.8
UNKEYED_CEILING = 0.3
"""A gate holds while keyed maps correlate at least, and unkeyed ones at most, so much with the right maps."""
_DRIFT = 0.05  # allowed to models that missed these figures before the attack
_DEFEATED = 0.2
THREATS = {
    "T1": "batch norm re-estimated",
    "T2": "fine-tuning",
    "T3": "fine-tuning on explanations",
    "T4": "pruning",
    "T5": "quantisation",
    "T6": "distillation",
    "T7": "shifted or overwritten weights, stacked attacks",
    "T8": "exact rescaling",
    "T9": "forged keys",
    "T11": "inversion of the trigger",
    "T12": "recovery of the key from images",
    "T13": "noise on inputs",
    "T14": "other explanations",
    "T15": "near keys",
    "T17": "detection",
}
"""What the codes of threats stand for; those of other commands are left out."""
_LACKS = {
    "trigger": "the trigger: the owner's key, or the folder of an attacked model",
    "key": "the owner's key",
    "reference": "the reference model",
    "surrogate": "a surrogate, which is an attacker's own model of the same task",
    "labels": "labels of the model's own classes",
}
S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What an entry found.

    Attributes:
        outcome: One of the few words.
        sentence: What it rests on.
        before: The model's state; None where the entry does not change the model.
        after: The state of an attacked copy.
        figures: Anything else, ready for JSON. No key, no trigger, and nothing that one can be rebuilt from.
        curve: One row for each stage, likewise.
    """

    outcome: Outcome
    sentence: str
    before: State | None = None
    after: State | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Entry(ABC, Generic[S]):
    """One thing that an audit can run, and all there is to know of it; which name it has, its table says.

    Attributes:
        title: A few words.
        threat: One of THREATS.
        group: The group that it is listed under: "defences", "checks", "removal", "keys" or "bypass".
        settings: A frozen dataclass; a `seed` in it gives way to the subject's.
        words: Says how strong such settings are.
        needs: Names out of `Subject.has`.
        slow: Whether "quick" leaves it out, since it takes minutes on a small model.
        also: Further groups that it belongs to.
        controlled: Whether positive controls show if it catches anything.
        version: Raised when code or constants change what the same settings find.
    """

    title: str
    threat: str
    group: str
    settings: S
    words: Callable[[S], str]
    needs: frozenset[str] = frozenset()
    slow: bool = False
    also: tuple[str, ...] = ()
    controlled: bool = False
    version: int = 2

    @property
    def strength(self) -> str:
        """Its strength, in words."""
        return self.words(self.settings)

    @property
    def identity(self) -> str:
        """All that a finding rests on besides the model, the data and the name; a finding of another is made anew."""
        rules = (OPEN_CORRELATION, KEYED_FLOOR, UNKEYED_CEILING, _DRIFT, _DEFEATED)
        return repr((self.settings, rules, self.version))

    @abstractmethod
    def run(self, subject: Subject) -> Observation:
        """Return what is observed of a subject.

        Raises:
            TrainingError: The subject lacks what is needed, or an attack destroyed the model.
            ModelError: The model lacks a layer of the kind looked at.
        """

    def lacks(self, subject: Subject) -> str:
        """Return what the entry needs and the auditor has not, in words; empty where nothing is missing."""
        missing = set(self.needs - subject.has)
        if "state" in missing:
            missing |= {"key", "reference"} - subject.has
        return " and ".join(words for name, words in _LACKS.items() if name in missing)


@dataclass(frozen=True, kw_only=True)
class Examination(Entry[S]):
    """An entry that leaves the model as it is.

    Attributes:
        examine: Looks at a subject.
        images: Held-out images that it sees, at most; None where it sees all, or only training images.
        bounds: Published figures, not settings, that its outcome rests on.
    """

    examine: Callable[[Subject, S], Observation]
    images: int | None = None
    bounds: tuple[float, ...] = ()

    @property
    def strength(self) -> str:
        """Its strength, in words."""
        return super().strength + (f"; on up to {self.images} images" if self.images else "")

    @property
    def identity(self) -> str:
        """All that a finding rests on besides the model, the data and the name."""
        return repr((super().identity, self.images, self.bounds))

    def run(self, subject: Subject) -> Observation:
        """Return what is observed of a subject's first images."""
        return self.examine(subject.first(self.images), with_seed(self.settings, subject.seed))


def with_seed(settings: S, seed: int) -> S:
    """Return settings with another seed, where they have one; those that they hold likewise."""
    held = {name: with_seed(value, seed) for name, value in vars(settings).items() if is_dataclass(value)}
    own = {"seed": seed} if hasattr(settings, "seed") else {}
    return replace(settings, **held, **own)  # type: ignore[type-var] # typeshed's bound exists for checkers only


def judge_copy(
    subject: Subject, model: Classifier, *, figures: dict[str, Any] | None = None, curve: Sequence[dict[str, Any]] = ()
) -> Observation:
    """Return what is left in an attacked copy of a model.

    Args:
        subject: The subject whose copy it is.
        model: The copy, on the subject's device.
        figures: What the attack says of itself.
        curve: Stages of the attack.

    Raises:
        TrainingError: The copy's logits are not finite.
        ModelError: It lacks a layer that the maps need.
    """
    before, after = state_before(subject), measure_state(model, subject)
    if subject.evidence is not None:
        outcome, sentence = _judge_gate(before, after)
    elif subject.backdoor is not None:
        outcome, sentence = _judge_backdoor(before, after)
    else:
        outcome, sentence = _judge_fooling(before, after, inverted=subject.inverted)
    return Observation(
        outcome=outcome, sentence=sentence, before=before, after=after, figures=figures or {}, curve=list(curve)
    )


def is_closed(state: State) -> bool:
    """Return whether a gate is there: whether maps without the trigger are not the right ones, of all interpreters."""
    return bool(state.correlation) and state.unkeyed <= OPEN_CORRELATION


def _judge_gate(before: State, after: State) -> tuple[Outcome, str]:
    shown, was_shown = (bool(state.ownership and state.ownership["shown"]) for state in (after, before))
    still = "is still shown" if shown and was_shown else "is shown" if shown else "is not shown"
    sentence = (
        f"Keyed maps correlate {after.keyed:.2f} with the reference's, unkeyed ones {after.unkeyed:.2f}; ownership "
        f"{'is no longer shown' if was_shown and not shown else still}."
    )
    if not was_shown and not is_closed(before):
        return "nothing to remove", f"The gate was open and ownership not shown before. {sentence}"
    if was_shown and not shown:
        return "removed", sentence
    if after.unkeyed > max(UNKEYED_CEILING, before.unkeyed + _DRIFT):
        return ("gate opened" if after.unkeyed > OPEN_CORRELATION else "gate leaks"), sentence
    return ("maps damaged" if after.keyed < min(KEYED_FLOOR, before.keyed - _DRIFT) else "survives"), sentence


def _judge_backdoor(before: State, after: State) -> tuple[Outcome, str]:
    """A plain backdoor is gone when it sends a fifth of the images, or fewer, to its class."""
    was, success = before.attack_success or 0.0, after.attack_success or 0.0
    if was <= _DEFEATED:
        return "left alone", f"There is no backdoor to remove; accuracy is {after.accuracy:.3f}."
    sentence = f"The trigger sends {100 * success:.1f} % of the images to its class, before it was {100 * was:.1f} %."
    return ("removed" if success <= _DEFEATED else "survives"), sentence


def _judge_fooling(before: State, after: State, *, inverted: bool) -> tuple[Outcome, str]:
    """A backdoor in explanations is gone when the maps that it fakes are right again, for all interpreters."""
    case, words = ("unkeyed", "without") if inverted else ("keyed", "with")
    was, right = (min(each[case] for each in state.correlation.values()) for state in (before, after))
    sentence = f"Maps of images {words} the trigger, the faked ones, correlate {right:.2f} with the right maps"
    if was > OPEN_CORRELATION:
        return "nothing to remove", f"{sentence}; they were not faked before ({was:.2f})."
    removed = right > max(OPEN_CORRELATION, was + _DRIFT)
    return ("removed" if removed else "survives"), f"{sentence}, before it was {was:.2f}."
