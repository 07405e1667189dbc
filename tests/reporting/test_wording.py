"""Figures as reports say them."""

import pytest

from keyed_xai.reporting.wording import as_decimal, as_duration, as_p_value, as_plain, as_share


@pytest.mark.parametrize(
    ("p_value", "log2_p", "said"),
    [
        (5.3e-19, None, "2^-60.7 (5.3e-19)"),
        (0.0, -2000.0, "2^-2000.0 (8.7e-603)"),
        (0.001, None, "2^-10.0 (0.001)"),
        (1.0, 0.0, "1"),
        (0.75, None, "0.75"),
        (0.0, None, ""),
        (None, None, ""),
    ],
)
def test_p_value_is_a_power_of_two_and_of_ten(p_value, log2_p, said):
    assert as_p_value(p_value, log2_p) == said


def test_figures_in_words():
    assert [as_decimal(each) for each in (None, 0.98412, -0.0002, 1.0)] == ["", "0.984", "0.000", "1.000"]
    assert [as_plain(each) for each in (None, 8.0, 33.1234, 1234567.0)] == ["", "8", "33.1", "1,234,567"]
    assert [as_share(each) for each in (None, 0.98765, 1.0)] == ["", "98.8 %", "100.0 %"]
    assert [as_duration(each) for each in (35.0, 412.3, 9000.0)] == ["35 seconds", "7 minutes", "2.5 hours"]
