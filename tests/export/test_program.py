"""Programs: batch norm folded, sizes gone, concatenations in pairs, and the classifier left as it was."""

import pytest
import torch
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.export.program import layer_of, trace_program
from keyed_xai.models import InputSpec, wrap_network
from tests.exported import (
    LAYERS,
    Dense,
    classifier_of,
)


def test_program_folds_batch_norm_and_keeps_no_sizes():
    classifier = classifier_of({"block": lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())})
    names = [str(node.target) for node in trace_program(classifier, []).nodes]
    assert not [name for name in names if "norm" in name or "sym_size" in name]
    assert names.count("aten.convolution.default") == 1


def test_dense_block_is_nested_pairs():
    nodes = trace_program(classifier_of({"dense": Dense}), []).nodes
    pairs = [
        node for node in nodes if layer_of(node) == "network.layers.dense" and str(node.target) == "aten.cat.default"
    ]
    assert [len(node.args[0]) for node in pairs] == [2, 2, 2]


def test_tracing_leaves_the_classifier_as_it_was():
    classifier = classifier_of({"block": LAYERS["convolution, then batch norm"]})
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    trace_program(classifier, [])
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not [module for module in classifier.modules() if module._forward_hooks]


class Branching(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def test_network_that_branches_on_values_is_refused():
    spec = InputSpec(3, 8, 8, mean=(0.0,) * 3, std=(1.0,) * 3)
    classifier = wrap_network(Branching().eval(), input=spec, require_map=False)
    with pytest.raises(ModelError, match="branch"):
        trace_program(classifier, [])
