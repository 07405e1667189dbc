"""A graph that brings onnxruntime down takes only the process with it in which it is tried."""

import onnx
import pytest
import torch
from onnx import helper

from keyed_xai.artifacts.onnx_file import read_onnx
from keyed_xai.errors import ModelError
from keyed_xai.export.building import ExportSettings
from keyed_xai.export.exporting import export_onnx
from keyed_xai.inference.trial import try_graph
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.ownership.black_box import open_black_box
from keyed_xai.serving.service import open_service

ENORMOUS = 2**63 - 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    classifier = wrap_network(SmallResNet(1, 3, (2, 2)), input=InputSpec(1, 16, 16, mean=(0.5,), std=(0.25,)))
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    export_onnx(classifier, path, ExportSettings(interpreters=("gradcam", "vbp")))
    return path


def altered(path, operator, **attributes):
    model = onnx.load(path)
    nodes = [node for node in model.graph.node if node.op_type == operator]
    assert nodes
    for name, value in attributes.items():
        for attribute in [each for each in nodes[0].attribute if each.name == name]:
            nodes[0].attribute.remove(attribute)
        nodes[0].attribute.append(helper.make_attribute(name, value))
    return model.SerializeToString()


def test_exported_model_passes(exported):
    try_graph(read_onnx(exported).data)


def test_graph_that_ends_onnxruntime_is_refused_and_this_process_lives(exported, tmp_path):
    data = altered(exported, "ConvTranspose", kernel_shape=[3, ENORMOUS])
    with pytest.raises(ModelError, match="onnxruntime ends on this graph .SIGABRT"):
        try_graph(data)
    (tmp_path / "bad.onnx").write_bytes(data)
    with pytest.raises(ModelError, match="onnxruntime ends on this graph"):
        open_black_box(str(tmp_path / "bad.onnx"), device="cpu")
    with pytest.raises(ModelError, match="onnxruntime ends on this graph"):
        open_service([tmp_path / "bad.onnx"], device="cpu")


def test_graph_that_onnxruntime_refuses_is_refused_in_its_words(exported):
    with pytest.raises(ModelError, match="onnxruntime cannot load the graph: "):
        try_graph(altered(exported, "Conv", kernel_shape=[3, 7]))


def test_graph_that_spreads_an_image_over_gigabytes_is_refused(exported):
    model, first = onnx.load(exported), "image"
    for node in model.graph.node:
        node.input[:] = ["moved" if name == first else name for name in node.input]
    added = [
        helper.make_node("ReduceMean", [first], ["tiny"], keepdims=0),
        helper.make_node("Expand", ["tiny", "grown"], ["vast"]),
        helper.make_node("ReduceMean", ["vast"], ["average"], keepdims=0),
        helper.make_node("Mul", ["average", "zero"], ["nothing"]),
        helper.make_node("Add", [first, "nothing"], ["moved"]),
    ]
    for place, node in enumerate(added):
        model.graph.node.insert(place, node)
    model.graph.initializer.append(helper.make_tensor("grown", onnx.TensorProto.INT64, [2], [2**16, 2**15]))  # 8 GiB
    model.graph.initializer.append(helper.make_tensor("zero", onnx.TensorProto.FLOAT, [], [0.0]))
    with pytest.raises(ModelError, match="allocat|ends on this graph"):
        try_graph(model.SerializeToString())


def test_time_is_limited(exported):
    with pytest.raises(ModelError, match=r"within 0.01 s"):
        try_graph(read_onnx(exported).data, seconds=0.01)
