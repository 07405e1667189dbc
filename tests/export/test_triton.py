"""Model repositories, read with Triton's own protobuf, and held against what its onnxruntime backend checks."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from click.testing import CliRunner
from google.protobuf import text_format
from jsonschema import Draft202012Validator
from tritonclient.grpc import model_config_pb2

from keyed_xai.artifacts.documents import validate
from keyed_xai.artifacts.onnx_file import decode_onnx, encode_onnx, read_onnx
from keyed_xai.errors import ArtifactError
from keyed_xai.export.building import ExportSettings
from keyed_xai.export.exporting import export_onnx
from keyed_xai.export.triton import TritonSettings, check_name, describe_model, write_triton
from keyed_xai_cli import main as cli
from tests.exported import make_classifier
from tests.marked import unmarked_classifier, write_folder

EXAMPLE = Path(__file__).parents[2] / "examples" / "kserve.yaml"
AMOUNTS = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|Mi|Gi)?$"}}
INFERENCE_SERVICE = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "serving.kserve.io/v1beta1"},
        "kind": {"const": "InferenceService"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}},
        },
        "spec": {
            "type": "object",
            "required": ["predictor"],
            "additionalProperties": False,
            "properties": {
                "predictor": {
                    "type": "object",
                    "required": ["model"],
                    "additionalProperties": False,
                    "properties": {
                        "minReplicas": {"type": "integer", "minimum": 0},
                        "maxReplicas": {"type": "integer", "minimum": 1},
                        "scaleMetric": {"enum": ["cpu", "memory", "concurrency", "rps"]},
                        "scaleTarget": {"type": "integer", "minimum": 1},
                        "timeout": {"type": "integer", "minimum": 1},
                        "model": {
                            "type": "object",
                            "required": ["modelFormat", "runtime", "protocolVersion", "storageUri"],
                            "additionalProperties": False,
                            "properties": {
                                "modelFormat": {
                                    "type": "object",
                                    "required": ["name", "version"],
                                    "additionalProperties": False,
                                    "properties": {"name": {"const": "triton"}, "version": {"const": "2"}},
                                },
                                "runtime": {"const": "kserve-tritonserver"},
                                "protocolVersion": {"const": "v2"},
                                "storageUri": {"type": "string", "pattern": r"^(pvc|gs|s3|hdfs|https?)://\S+$"},
                                "args": {"type": "array", "items": {"type": "string", "pattern": r"^--[a-z-]+=\S+$"}},
                                "resources": {
                                    "type": "object",
                                    "additionalProperties": False,
                                    "properties": {"requests": AMOUNTS, "limits": AMOUNTS},
                                },
                            },
                        },
                    },
                }
            },
        },
    },
}
"""The part of KServe's API (serving.kserve.io/v1beta1) that the example uses; unknown fields are typing errors."""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    classifier = make_classifier("SmallResNet")
    classifier.network.fc.weight.data.abs_()  # so that Grad-CAM's maps are not empty
    classifier.label_names = ("none", 'a "quoted" one', "back\\slash", "Ünïcode", "five")
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    return export_onnx(classifier, path, ExportSettings(interpreters=("gradcam", "vbp", "simplegrad"))).file


def parse(text):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize(
    "settings", [TritonSettings(), TritonSettings(max_batch=32, max_delay=0, instances=3, tensorrt=True)], ids=str
)
def test_configuration_parses_and_fits_what_the_backend_checks(file, tmp_path, settings):
    home = write_triton(tmp_path / "repository", "maps-1", file, settings)
    config = parse((home / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("maps-1", "onnxruntime", settings.max_batch)
    session = onnxruntime.InferenceSession(home / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    assert not session.get_overridable_initializers()
    assert not any(each.optional for each in config.input)  # refused where requests are batched
    check_tensors(config.input, session.get_inputs())
    check_tensors(config.output, session.get_outputs())
    assert config.instance_group[0].count == settings.instances
    assert config.dynamic_batching.max_queue_delay_microseconds == settings.max_delay
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [each.name for each in accelerators] == (["tensorrt"] if settings.tensorrt else [])
    assert all(each.parameters["precision_mode"] == "FP32" for each in accelerators)


def check_tensors(described, real):
    """As CompareDimsSupported of Triton's onnxruntime backend does: all but the batch, after reshaping."""
    types = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64", "tensor(uint8)": "TYPE_UINT8"}
    assert [each.name for each in described] == [each.name for each in real]
    for one, other in zip(described, real, strict=True):
        dims = list(one.reshape.shape) if one.HasField("reshape") else list(one.dims)
        assert len(one.dims) > 0
        assert isinstance(other.shape[0], str)  # the batch
        assert dims == other.shape[1:]
        assert model_config_pb2.DataType.Name(one.data_type) == types[other.type]


def test_warm_up_is_a_whole_request_of_every_size(file):
    config = parse(describe_model("m", file, TritonSettings(max_batch=4)))
    assert [each.batch_size for each in config.model_warmup] == [1, 4]
    for request in config.model_warmup:
        assert set(request.inputs) == {each.name for each in config.input}
        for each in config.input:
            assert list(request.inputs[each.name].dims) == list(each.dims)
            assert request.inputs[each.name].data_type == each.data_type


def test_metadata_travel_in_a_parameter_and_labels_beside(file, tmp_path):
    home = write_triton(tmp_path, "m", file)
    config = parse((home / "config.pbtxt").read_text())
    assert json.loads(config.parameters["keyed_xai"].string_value) == {"metadata": file.metadata}
    labelled = {each.name: each.label_filename for each in config.output}
    assert labelled["logits"] == "labels.txt"
    assert not labelled["saliency_gradcam"]
    assert (home / "labels.txt").read_text(encoding="utf-8").splitlines() == file.metadata["model"]["label_names"]


def test_model_in_the_repository_computes_the_same(file, tmp_path):
    home = write_triton(tmp_path, "m", file)
    stored = (home / "1" / "model.onnx").read_bytes()
    assert decode_onnx(stored, origin="it").metadata == file.metadata
    images = np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    target = np.array([-1, 2, 0])
    before, after = (
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(
            None, {"image": images, "target": target}
        )
        for data in (file.data, stored)
    )
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_model_without_target_and_labels_has_neither(tmp_path):
    made = export_onnx(
        make_classifier("SmallResNet"), tmp_path / "m.onnx", ExportSettings(interpreters=("vbp",), eight_bits=True)
    )
    config = parse(describe_model("m", made.file))
    (image,) = config.input
    assert (image.name, model_config_pb2.DataType.Name(image.data_type)) == ("image", "TYPE_UINT8")
    assert not any(each.label_filename for each in config.output)


def test_second_model_joins_and_same_name_is_replaced(file, tmp_path):
    write_triton(tmp_path, "one", file)
    write_triton(tmp_path, "two", file, TritonSettings(max_batch=2))
    write_triton(tmp_path, "one", file, TritonSettings(max_batch=5))
    found = {home.name: parse((home / "config.pbtxt").read_text()).max_batch_size for home in tmp_path.iterdir()}
    assert found == {"one": 5, "two": 2}


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "ä", "x" * 201, "a\n"])
def test_name_that_is_no_folder_or_address_is_refused(name):
    with pytest.raises(ArtifactError, match="cannot be a served model's name"):
        check_name(name)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="max_batch: expected at least 1, got 0"):
        TritonSettings(max_batch=0)


def test_no_half_repository_when_the_disk_refuses(file, tmp_path):
    (tmp_path / "m").write_text("a file in the way")
    with pytest.raises(ArtifactError, match="Cannot write"):
        write_triton(tmp_path, "m", file)


def test_hostile_label_cannot_break_out_of_the_text(file):
    model = onnx.load_model_from_string(file.data)
    metadata = json.loads(json.dumps(file.metadata))
    metadata["model"]["label_names"] = ['"} backend: "python', "x\\", "'", "{", "}"]
    config = parse(describe_model("m", encode_onnx(model, metadata)))
    assert config.backend == "onnxruntime"
    assert json.loads(config.parameters["keyed_xai"].string_value)["metadata"] == metadata


class TestCommand:
    def run(self, place, *arguments):
        command = ["export", place / "m.keyed", "-o", place / "m.onnx", "--triton", place / "models", *arguments]
        return CliRunner().invoke(cli.main, [str(argument) for argument in command])

    def test_repository_is_written_beside_the_file(self, tmp_path):
        classifier = unmarked_classifier()
        classifier.network.fc.weight.data.abs_()
        write_folder(tmp_path / "m.keyed", classifier)
        result = self.run(tmp_path, "--max-batch", 3, "--tensorrt", "--json", tmp_path / "j.json")
        assert result.exit_code == 0, result.output
        document = json.loads((tmp_path / "j.json").read_text())
        validate(document, "export", origin="it")
        home = tmp_path / "models" / "m"
        assert document["triton"] == str(home)
        assert parse((home / "config.pbtxt").read_text()).max_batch_size == 3
        assert read_onnx(home / "1" / "model.onnx").metadata == read_onnx(tmp_path / "m.onnx").metadata
        (tmp_path / "m.onnx").unlink()
        again = self.run(tmp_path)
        assert again.exit_code == 1
        assert "is there already" in again.output
        assert not (tmp_path / "m.onnx").exists()
        assert self.run(tmp_path, "--force").exit_code == 0
        assert (tmp_path / "m.onnx").is_file()

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--tensorrt"], "--tensorrt: only for --triton"),
            (["--check", "F", "--triton", "d"], "writes nothing: leave out --triton"),
        ],
    )
    def test_wrong_usage_is_2(self, arguments, complaint, tmp_path):
        (tmp_path / "m.pt").touch()
        (tmp_path / "m.onnx").touch()
        arguments = [str(tmp_path / "m.onnx") if each == "F" else each for each in arguments]
        result = CliRunner().invoke(cli.main, ["export", str(tmp_path / "m.pt"), *arguments])
        assert result.exit_code == 2
        assert complaint in result.output


class TestKServeExample:
    def test_fits_the_api(self):
        errors = Draft202012Validator(INFERENCE_SERVICE).iter_errors(yaml.safe_load(EXAMPLE.read_text()))
        assert [f"{error.json_path}: {error.message}" for error in errors] == []

    def test_limits_cover_what_is_requested(self):
        resources = yaml.safe_load(EXAMPLE.read_text())["spec"]["predictor"]["model"]["resources"]
        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"
        assert set(resources["requests"]) == set(resources["limits"])

    def test_typing_error_is_found(self):
        document = yaml.safe_load(EXAMPLE.read_text())
        document["spec"]["predictor"]["model"]["protocol"] = "v2"
        assert not Draft202012Validator(INFERENCE_SERVICE).is_valid(document)
