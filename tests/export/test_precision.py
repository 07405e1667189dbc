"""Lower precision: the explanation stays, the file gets smaller, and float16 stays out of the way back."""

import copy

import numpy as np
import onnx
import pytest

from keyed_xai.export.building import ExportSettings
from keyed_xai.export.parity import check_agreement
from keyed_xai.export.precision import lower_precision
from tests.exported import ALL, exported, parity_of


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precision_keeps_the_explanation(precision, small):
    classifier, model = small
    lower = lower_precision(copy.deepcopy(model), precision)
    onnx.checker.check_model(lower, full_check=True)
    check_agreement(parity_of(lower, classifier, ExportSettings(interpreters=ALL, precision=precision)), precision)


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.51), ("int8", 0.27)])
def test_lower_precision_makes_the_file_smaller(precision, share):
    _, model = exported("resnet, shallow")
    assert len(lower_precision(copy.deepcopy(model), precision).SerializeToString()) < share * model.ByteSize()


def test_float16_stays_out_of_the_way_back(small):
    """The masks multiply by 3e38, which float16 does not hold, and backward convolutions lose their meaning there."""
    graph = lower_precision(copy.deepcopy(small[1]), "fp16").graph
    weights = [onnx.numpy_helper.to_array(each) for each in graph.initializer]
    assert max(np.abs(each).max() for each in weights if each.dtype == np.float32 and each.ndim == 4) > 1e38
    assert all(np.isfinite(each).all() for each in weights if each.dtype == np.float16)
    halves = {name for node in graph.node for name in node.output if name.endswith("_half")}
    forward = [node for node in graph.node if node.op_type == "Conv" and node.output[0] in halves]
    assert len(forward) == 1 + 2 * 3 + 2
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose") and node.output[0] not in halves:
            assert not halves & set(node.input)
