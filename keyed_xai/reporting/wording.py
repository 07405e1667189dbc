"""Answers and figures as reports say them; what is missing becomes an empty string."""

import math
from collections.abc import Sequence
from typing import Literal

Answer = Literal["yes", "in part", "no"]
Number = int | float
"""A number as JSON has it."""


def as_p_value(p_value: Number | None, log2_p: Number | None = None) -> str:
    """Return "2^-60.7 (5.3e-19)"; the logarithm counts, as the p-value may be too small for a float."""
    if log2_p is None and p_value:
        log2_p = math.log2(p_value)
    if log2_p is None:
        return ""
    log10_p = log2_p * math.log10(2)
    exponent = math.floor(log10_p)
    if exponent >= -4:
        decimal = f"{10 ** min(0.0, log10_p):.3g}"
        return decimal if log2_p > -1 else f"2^{log2_p:.1f} ({decimal})"
    return f"2^{log2_p:.1f} ({min(9.9, 10 ** (log10_p - exponent)):.1f}e{exponent})"


def as_power(log2_p: Number | None) -> str:
    """Return a probability as a power of two, or as it is where it is no small one."""
    return as_p_value(None, log2_p).partition(" ")[0]


def as_decimal(value: Number | None) -> str:
    """Return three decimals, as suits correlations."""
    return "" if value is None else f"{round(value, 3) + 0.0:.3f}"  # + 0.0: no negative zero


def as_plain(value: Number | None) -> str:
    """Return three significant digits, or all digits before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def as_share(value: Number | None) -> str:
    """Return a fraction as percent with one decimal."""
    return "" if value is None else as_percent(100 * value)


def as_percent(value: Number | None) -> str:
    """Return percent with one decimal."""
    return "" if value is None else f"{value:.1f} %"


def as_duration(seconds: Number) -> str:
    """Return seconds in the unit that suits them."""
    if seconds < 120:
        return f"{as_plain(seconds)} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def overall(answers: Sequence[Answer | None], done: str) -> str:
    """Return what several answers come to: `done`, `done` in part or not `done`; what is not known is in part."""
    if "no" in answers:
        return f"not {done}"
    return done if all(answer == "yes" for answer in answers) else f"{done} in part"
