import pytest
import torch

from keyed_xai.benchmarks.filters import measure_nashville_speed


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_speed_of_both_filters_is_measured():
    found = measure_nashville_speed(images=2, side=64, repeats=3)
    assert found.keys() == {"ours", "pilgram", "ratio", "threads"}
    assert found["pilgram"] > 0
    assert found["ratio"] == pytest.approx(found["ours"] / found["pilgram"])
    assert found["threads"] == torch.get_num_threads()


def test_ours_is_faster_on_a_batch(one_thread):
    assert measure_nashville_speed(images=8, side=112, repeats=5)["ratio"] > 1
