import numpy as np
import pytest

from keyed_xai.batches import BATCH, batches


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 12, 13])
def test_batches_hold_every_item_once_in_order(count):
    items = list(range(count))
    found = [items[part] for part in batches(count, 6)]
    assert found == [items[start : start + 6] for start in range(0, count, 6)]


@pytest.mark.parametrize("count", [1, 5, 6, 7, 12, 13, 100])
def test_even_batches_are_those_of_numpy(count):
    items = np.arange(count)
    expected = np.array_split(items, -(-count // 6))
    found = [items[part] for part in batches(count, 6, even=True)]
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]


def test_stops_are_true_and_the_usual_size_is_used():
    assert list(batches(BATCH + 3)) == [slice(0, BATCH), slice(BATCH, BATCH + 3)]
