"""Whose a model is when two keys claim it."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class DatedClaim:
    """What one claimant has shown on a model, and when the claim was signed.

    Attributes:
        owner: The claimant's key id, or a name.
        shown: Whether a test shows the claim on the model in dispute.
        time: Of the licence, with a time zone; None without a licence.
        witnessed: Whether a third party dated the licence, such as a timestamping authority or a court. Without one
            a time is the claimant's own word: whoever signs can set the clock back.
    """

    owner: str
    shown: bool
    time: datetime | None = None
    witnessed: bool = False


@dataclass(frozen=True)
class Ruling:
    """Whose a model is.

    Attributes:
        owner: As in the claim; None where nobody's claim is shown, or the times do not tell.
        proven: Whether it rests on more than a claimant's word for a time.
        reason: In a sentence.
    """

    owner: str | None
    proven: bool
    reason: str


def rule_on_claims(first: DatedClaim, second: DatedClaim) -> Ruling:
    """Return whose a model is when two keys claim it: of claims that are shown, the first licence wins.

    A second protection may hide the first, so that one claim shown alone is not the last word where the other party has
    an older licence: ask both for what they protected. The overwriter's is the owner's protected model.
    """
    shown = [claim for claim in (first, second) if claim.shown]
    if not shown:
        return Ruling(None, False, "Neither claim is shown on this model.")
    if len(shown) == 1:
        return _rule_on_single(shown[0], second if shown[0] is first else first)
    if first.time is None or second.time is None:
        return Ruling(None, False, "Both claims are shown, and not both have a licence that says when it was signed.")
    if first.time == second.time:
        return Ruling(None, False, "Both claims are shown, and their licences have the same time.")
    return _rule_on_times(*((first, second) if first.time < second.time else (second, first)))


def _rule_on_single(shown: DatedClaim, other: DatedClaim) -> Ruling:
    """Rule where one claim alone is shown; an older licence of the other party, if it is dated, leaves it open."""
    if other.time is None or (shown.time is not None and shown.time <= other.time):
        return Ruling(shown.owner, True, "One claim alone is shown, and no older licence stands against it.")
    hidden = (
        "One claim alone is shown, and the other party has the older licence: a second protection may have hidden the "
        "first. Test both keys on the models that the licences cover"
    )
    if other.witnessed:
        return Ruling(None, False, f"{hidden}.")
    return Ruling(shown.owner, False, f"{hidden}; the older time is its owner's own word.")


def _rule_on_times(earlier: DatedClaim, later: DatedClaim) -> Ruling:
    if earlier.witnessed:
        return Ruling(earlier.owner, True, "Both claims are shown; the earlier licence is dated by a third party.")
    if later.witnessed:
        return Ruling(
            None,
            False,
            "Both claims are shown; the earlier time is its owner's own word, and the later licence is dated by a "
            "third party.",
        )
    return Ruling(
        earlier.owner,
        False,
        "Both claims are shown, and the earlier licence wins; but both times are the claimants' own word, which a "
        "third party's date would prove.",
    )
