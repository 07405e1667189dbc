"""Rules: an operator's gradient, written with forward operators, is autograd's; kinks, ties and odd sizes included."""

import pytest
import torch
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.export.rules import RULES
from tests.exported import (
    LAYERS,
    Both,
    Function,
    classifier_of,
    images_of,
)


def check_gradient(both, number):
    by_rules, wanted = both.gradients(number)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(by_rules, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_is_that_of_autograd(name, every):
    check_gradient(every, list(LAYERS).index(name))


def test_of_equal_maxima_the_first_gets_the_gradient():
    pools = {name: make for name, make in LAYERS.items() if name.startswith("max pool")}
    both = Both(classifier_of(pools), images_of(ties=True))
    for number in range(len(pools)):
        check_gradient(both, number)


def test_every_rule_was_tried(every):
    assert not {str(each) for each in set(RULES) - {node.target for node in every.program.nodes}}


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (lambda: Function(lambda x: x.softmax(1)), "softmax"),
        (lambda: Function(lambda x: x.cumsum(1)), "cumsum"),
        (lambda: nn.GELU(approximate="tanh"), "gelu"),
        (lambda: Function(lambda x: x - x.mean(0, keepdim=True)), "mean"),
        (lambda: Function(lambda x: x - x[0]), "select"),
    ],
)
def test_operator_that_cannot_be_transposed_is_named_with_its_layer(layer, operator):
    with pytest.raises(ModelError, match=rf"{operator}.*'network\.layers\.culprit'"):
        Both(classifier_of({"culprit": layer}), images_of()).gradients()
