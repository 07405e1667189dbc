"""ONNX files from elsewhere: what is read, and what is refused."""

import json

import onnx
import pytest
from onnx import TensorProto, helper

from keyed_xai.artifacts.onnx_file import METADATA_KEY, check_metadata, decode_onnx, read_onnx
from keyed_xai.errors import ArtifactError
from tests.exported import altered


class TestUntrusted:
    @pytest.mark.parametrize("data", [b"", b"no model", b"\x08\x08"])
    def test_other_files_are_refused(self, data):
        with pytest.raises(ArtifactError, match="not an ONNX model"):
            decode_onnx(data, origin="it")

    def test_truncated_files_are_refused(self, exported):
        data = (exported[0] / "m.onnx").read_bytes()
        for share in range(100):
            with pytest.raises(ArtifactError):
                decode_onnx(data[: len(data) * share // 100], origin="it")
        for cut in (1, 2, 10, 100, 1000):
            with pytest.raises(ArtifactError):
                decode_onnx(data[:-cut], origin="it")

    @pytest.mark.parametrize(
        ("letters", "bad"),
        [(b'"keyed-xai/onnx-metadata/v1"', b'"keyed-xai/onnx-metadata/\xff\xff"'), (b"Conv", b"C\xff\xfev")],
    )
    def test_letters_that_are_not_utf8_are_refused(self, letters, bad, exported):
        data = read_onnx(exported[0] / "m.onnx").data
        assert letters in data
        with pytest.raises(ArtifactError):
            decode_onnx(data.replace(letters, bad), origin="it")

    def test_folder_in_place_of_a_file_is_refused(self, tmp_path):
        with pytest.raises(ArtifactError):
            read_onnx(tmp_path)

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (lambda m: m.graph.initializer[0].external_data.add(key="location", value="/etc/passwd"), "another file"),
            (lambda m: setattr(m.graph.initializer[0], "data_location", TensorProto.EXTERNAL), "another file"),
            (lambda m: m.graph.node.append(helper.make_node("Evil", [], ["x"], domain="com.evil")), "Evil"),
            (lambda m: m.functions.add(name="f", domain="d"), "functions"),
            (lambda m: m.metadata_props.add(key=METADATA_KEY, value="{}"), "no metadata"),
            (lambda m: setattr(m.metadata_props[0], "value", "{}"), "does not fit"),
            (lambda m: setattr(m.metadata_props[0], "value", "{" * 100000), "not a valid JSON"),
            (lambda m: m.ClearField("metadata_props"), "no metadata"),
        ],
    )
    def test_what_export_never_writes_is_refused(self, change, complaint, exported):
        file = read_onnx(exported[0] / "m.onnx")
        with pytest.raises(ArtifactError, match=complaint):
            decode_onnx(altered(file, change), origin="it")

    def test_external_data_inside_an_operator_is_refused(self, exported):
        hidden = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
        hidden.external_data.add(key="location", value="/etc/passwd")

        def change(model):
            model.graph.node.append(helper.make_node("Constant", [], ["x"], value=hidden))

        file = read_onnx(exported[0] / "m.onnx")
        with pytest.raises(ArtifactError, match="another file"):
            decode_onnx(altered(file, change), origin="it")

    @pytest.mark.parametrize(
        ("operator", "names"),
        [("If", ("then_branch", "else_branch")), ("Loop", ("body",)), ("Scan", ("body",))],
    )
    def test_operators_that_hold_a_graph_are_refused(self, operator, names, exported):
        body = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "inner", [], [])

        def change(model):
            model.graph.node.append(helper.make_node(operator, ["c"], ["y"], **dict.fromkeys(names, body)))

        file = read_onnx(exported[0] / "m.onnx")
        with pytest.raises(ArtifactError, match=f"uses {operator} with a graph inside"):
            decode_onnx(altered(file, change), origin="it")

    @pytest.mark.parametrize("operator", ["SplitToSequence", "SequenceAt", "StringConcat", "RandomNormal", "Optional"])
    def test_operators_of_sequences_texts_and_chance_are_refused(self, operator, exported):
        def change(model):
            model.graph.node.append(helper.make_node(operator, ["image"], ["y"]))

        file = read_onnx(exported[0] / "m.onnx")
        with pytest.raises(ArtifactError, match=f"uses {operator}, an operator of sequences"):
            decode_onnx(altered(file, change), origin="it")

    @pytest.mark.parametrize("pads", [[0, 0, 128, 0], [2, 2, 2, 2], [0, -1, 0, 9]])
    def test_padding_that_leaves_fewer_than_no_rows_is_refused(self, pads, exported):
        """It ended the process inside onnxruntime."""

        def change(model):
            sizes = {"kernel_shape": [3, 3], "strides": [1, 1], "dilations": [1, 1], "pads": pads}
            model.graph.node.append(helper.make_node("ConvTranspose", ["image", "weight"], ["y"], **sizes))

        with pytest.raises(ArtifactError, match="pads a transposed convolution"):
            decode_onnx(altered(read_onnx(exported[0] / "m.onnx"), change), origin="it")

    def test_graphs_listed_in_an_attribute_are_refused(self, exported):
        def change(model):
            model.graph.node[0].attribute.add(name="bodies", type=onnx.AttributeProto.GRAPHS).graphs.add(name="inner")

        with pytest.raises(ArtifactError, match="with a graph inside"):
            decode_onnx(altered(read_onnx(exported[0] / "m.onnx"), change), origin="it")

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("input_size", [3, 4096, 4096]),
            ("input_size", [3, 8192, 1]),
            ("num_classes", 100_001),
            ("num_classes", 10**400),
        ],
    )
    def test_metadata_that_ask_for_too_much_are_refused(self, field, value, exported):
        metadata = json.loads(json.dumps(read_onnx(exported[0] / "m.onnx").metadata))
        metadata["model"][field] = value
        with pytest.raises(ArtifactError, match=r"out of range|maximum"):
            check_metadata(metadata, origin="it")
