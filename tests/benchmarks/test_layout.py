"""benchmarks/layout.py: what it calls right is right, and it times every way."""

import runpy
from itertools import product
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "layout.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("stride", "layout"), [*product((1, 2), ("plain", "last"))])
def test_the_safe_way_is_right(script, stride, layout, order):
    assert script["is_right"]((4, 8, 1, stride, layout, order), safe=True)


def test_a_wrong_gradient_is_found(script, monkeypatch):
    usual = torch.autograd.grad

    def spoilt(output, inputs, **options):
        gradients = usual(output, inputs, **options)
        return [1.01 * each if each.dtype == torch.float32 else each for each in gradients]

    monkeypatch.setattr(torch.autograd, "grad", spoilt)
    assert not script["is_right"]((4, 8, 1, 2, "plain", 1), safe=False)


def test_every_way_is_timed(script):
    medians = script["time_steps"]("SmallResNet", ("gradcam",), 1)
    assert set(medians) == set(product(("plain", "last"), (False, True)))
    assert min(medians.values()) > 0
