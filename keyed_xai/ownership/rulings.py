"""Whose a model is when two keys claim it."""

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class DatedClaim:
    """What one claimant has shown on a model, and when the claim was signed.

    Attributes:
        owner: The claimant's key id, or a name.
        shown: Whether a test shows the claim on the model in dispute.
        time: Time of the licence, with a time zone; None without a licence. It is the claimant's own word: whoever
            signs can set the clock back.
    """

    owner: str
    shown: bool
    time: datetime | None = None


@dataclass(frozen=True)
class Ruling:
    """Who owns a model, as far as claims show it.

    Attributes:
        owner: The owner's name as in the claim; None where nobody's claim is shown, or the times do not tell.
        proven: Whether it rests on more than a claimant's word for a time.
        reason: The reason, in a sentence.
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
    return Ruling(
        first.owner if first.time < second.time else second.owner,
        False,
        "Both claims are shown, and the earlier licence wins; but both times are the claimants' own word, which a "
        "third party's date would prove.",
    )


def _rule_on_single(shown: DatedClaim, other: DatedClaim) -> Ruling:
    """Rule where one claim alone is shown; an older licence of the other party leaves it unproven."""
    if other.time is None or (shown.time is not None and shown.time <= other.time):
        return Ruling(shown.owner, True, "One claim alone is shown, and no older licence stands against it.")
    reason = (
        "One claim alone is shown, and the other party has the older licence: a second protection may have hidden the "
        "first. Test both keys on the models that the licences cover; the older time is its owner's own word."
    )
    return Ruling(shown.owner, False, reason)
