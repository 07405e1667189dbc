"""Thresholds on L_p: placed as an exhaustive search places them, and curves counted distance by distance."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keyed_xai import metrics
from keyed_xai.metrics import place_threshold, threshold_curve

# A few levels only, so that the samples overlap and repeat each other's values.
levels = st.sampled_from([0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32)
samples = st.lists(levels, min_size=1, max_size=8)
quick = settings(max_examples=150, deadline=None)


def rate_sum(unaltered, altered, threshold):
    """CR + FSR, counted one by one, of 2."""
    right = sum(1 for value in unaltered if value >= threshold) / len(unaltered)
    return right + sum(1 for value in altered if value < threshold) / len(altered)


def gaps(unaltered, altered):
    """All intervals of thresholds that part the same distances, as (below, above)."""
    values = sorted({0.0, *unaltered, *altered, 1.0})
    return list(zip(values[:-1], values[1:], strict=True))


@quick
@given(samples, samples)
def test_placed_threshold_has_the_largest_sum_and_the_widest_gap(unaltered, altered):
    found = place_threshold(torch.tensor(unaltered), torch.tensor(altered))
    middles = {(low + high) / 2: high - low for low, high in gaps(unaltered, altered)}
    sums = {middle: rate_sum(unaltered, altered, middle) for middle in middles}
    largest = max(sums.values())
    equally_good = {middle: middles[middle] for middle, value in sums.items() if value > largest - 1e-9}
    assert rate_sum(unaltered, altered, found) == pytest.approx(largest)
    assert equally_good[found] == max(equally_good.values())


@quick
@given(samples, samples)
def test_no_threshold_on_a_fine_grid_is_better(unaltered, altered):
    found = place_threshold(torch.tensor(unaltered), torch.tensor(altered))
    assert 0 <= found <= 1
    best = max(rate_sum(unaltered, altered, threshold) for threshold in np.linspace(0.002, 1, 500))
    assert rate_sum(unaltered, altered, found) >= best - 1e-9


def test_threshold_stands_in_the_middle_of_the_gap_between_two_samples():
    found = place_threshold(torch.tensor([0.6, 0.75, 0.9]), torch.tensor([0.1, 0.2, 0.05]))
    assert found == pytest.approx(0.4)


def test_threshold_stands_in_the_wider_of_two_equal_gaps():
    """Sums are 1.5 in (.2, .3) and in (.4, .8)."""
    found = place_threshold(torch.tensor([0.3, 0.8]), torch.tensor([0.2, 0.4]))
    assert found == pytest.approx(0.6)
    found = place_threshold(torch.tensor([0.6, 0.8]), torch.tensor([0.2, 0.7]))
    assert found == pytest.approx(0.4)


def test_threshold_of_samples_that_do_not_differ_is_in_range():
    same = torch.full((5,), 0.25)
    assert rate_sum([0.25] * 5, [0.25] * 5, place_threshold(same, same)) == 1


@pytest.mark.parametrize(("unaltered", "altered"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sample_is_refused(unaltered, altered):
    with pytest.raises(ValueError, match=f"{unaltered} unaltered and {altered} altered"):
        place_threshold(torch.zeros(unaltered), torch.zeros(altered))


def test_curve_counts_at_101_thresholds():
    generator = torch.Generator().manual_seed(0)
    unaltered, altered = 0.3 + 0.7 * torch.rand(9, generator=generator), 0.6 * torch.rand(7, generator=generator)
    altered[0] = 0.5  # stands on a threshold, so it is not below it
    curve = threshold_curve(unaltered, altered)
    assert set(curve) == {"threshold", "cr", "fsr"}
    assert curve["threshold"] == pytest.approx([number / 100 for number in range(101)])
    for threshold, cr, fsr in zip(curve["threshold"], curve["cr"], curve["fsr"], strict=True):
        assert cr == pytest.approx(100 * sum(1 for value in unaltered if float(value) >= threshold) / 9)
        assert fsr == pytest.approx(100 * sum(1 for value in altered if float(value) < threshold) / 7)
    assert curve["fsr"] == sorted(curve["fsr"])
    assert curve["cr"] == sorted(curve["cr"], reverse=True)


def test_curve_agrees_with_the_rates_at_the_placed_threshold():
    unaltered, altered = torch.tensor([0.5, 0.75]), torch.tensor([0.125, 0.25])
    threshold = place_threshold(unaltered, altered)
    curve = threshold_curve(unaltered, altered)
    place = curve["threshold"].index(pytest.approx(round(threshold, 2)))
    assert (curve["cr"][place], curve["fsr"][place]) == (100, 100)
    assert metrics.correct_rate(unaltered, threshold) == metrics.fooling_success_rate(altered, threshold) == 100
