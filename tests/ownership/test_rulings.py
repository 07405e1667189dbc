"""Two claims on one model: the first licence wins, and a time is a claimant's own word."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from keyed_xai.ownership.rulings import DatedClaim, rule_on_claims

EARLY, LATE = datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 3, 4, tzinfo=UTC)
FIRST, SECOND = DatedClaim("first", True, EARLY), DatedClaim("second", True, LATE)


def ruled(first, second):
    """The ruling, which must not depend on who is named first."""
    ruling = rule_on_claims(first, second)
    assert rule_on_claims(second, first) == ruling
    return ruling.owner, ruling.proven


@pytest.mark.parametrize(
    ("first", "second", "owner", "proven"),
    [
        ({}, {}, "first", False),
        ({"time": LATE}, {}, None, False),
        ({"time": None}, {}, None, False),
        ({}, {"time": None}, None, False),
        ({"shown": False}, {"shown": False}, None, False),
        ({}, {"shown": False}, "first", True),
        ({"time": None}, {"shown": False, "time": None}, "first", True),
        ({"shown": False}, {}, "second", False),
        ({"shown": False}, {"time": None}, "second", False),
        ({"shown": False, "time": None}, {}, "second", True),
    ],
)
def test_first_licence_wins_among_claims_that_are_shown(first, second, owner, proven):
    assert ruled(replace(FIRST, **first), replace(SECOND, **second)) == (owner, proven)


def test_ruling_says_that_a_time_is_a_claimant_s_own_word():
    assert "own word" in rule_on_claims(FIRST, SECOND).reason
    assert "own word" not in rule_on_claims(FIRST, replace(SECOND, shown=False)).reason
