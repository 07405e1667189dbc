"""A model repository for NVIDIA Triton's onnxruntime backend: ``<folder>/<name>/config.pbtxt`` and ``1/model.onnx``.

Source: Triton's model configuration (protobuf ``inference.ModelConfig``) and what its onnxruntime backend checks when
it loads a model. That backend refuses optional inputs where requests are batched, so that ``target`` is a required
input of the copy in the repository: [n, 1] as all batched inputs, -1 for the predicted class.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.text_encoding import CEscape

from keyed_xai.artifacts.documents import printable, write_atomically, writing
from keyed_xai.artifacts.onnx_file import METADATA_KEY, OnnxFile, encode_parameter
from keyed_xai.errors import ArtifactError
from keyed_xai.outputs import claimed, remove, sync_folder

VERSION = "1"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT64: "TYPE_INT64",
}
_LABELS = "labels.txt"


class _Word(str):
    """A name of an enumeration, which stands in the text without quotes."""

    __slots__ = ()


_Message = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class TritonSettings:
    """How Triton runs a model.

    Attributes:
        max_batch: Images at once, at most.
        max_delay: How long a request waits for others, microseconds.
        instances: Copies of the model on each device.
        tensorrt: Have onnxruntime hand what it can to TensorRT, in float32. Never in TensorRT's own float16: masks of
            ReLU are made with numbers that float16 has no room for; export with fp16 instead.
    """

    max_batch: int = 8
    max_delay: int = 1000
    instances: int = 1
    tensorrt: bool = False

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        for name, least in (("max_batch", 1), ("max_delay", 0), ("instances", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def write_triton(folder: Path, name: str, file: OnnxFile, settings: TritonSettings | None = None) -> Path:
    """Write a model into a model repository, and return its own folder there; other models are left alone.

    A new model appears when all of it is on the disk. One of the same name is replaced file by file, the configuration
    last, so that other versions stay.

    Args:
        folder: Folder of Triton's model repository.
        name: What clients call the model.
        file: The exported model.
        settings: How it is run.

    Raises:
        ArtifactError: The name is no file name, or a file cannot be written.
    """
    home = folder / check_name(name)
    with writing(home), claimed(home) as draft:
        if home.exists():
            _write_files(home, name, file, settings)
            return home
        try:
            _write_files(draft, name, file, settings)
            draft.rename(home)
            sync_folder(folder)
        finally:
            remove(draft)
    return home


def _write_files(home: Path, name: str, file: OnnxFile, settings: TritonSettings | None) -> None:
    write_atomically(home / VERSION / "model.onnx", require_target(file))
    labels = file.metadata["model"]["label_names"]
    if labels:
        write_atomically(home / _LABELS, ("\n".join(labels) + "\n").encode())
    write_atomically(home / "config.pbtxt", describe_model(name, file, settings).encode())


def check_name(name: str) -> str:
    """Return a model's name that servers and URLs take as it is.

    Raises:
        ArtifactError: It is none.
    """
    if not _NAME.fullmatch(name):
        raise ArtifactError(
            f"{printable(name)!r} cannot be a served model's name: expected letters, digits, '.', '_' and '-', the "
            "first a letter or a digit. Rename the file."
        )
    return name


def require_target(file: OnnxFile) -> bytes:
    """Return the model with ``target`` a required input instead of one with a default."""
    model = onnx.load_model_from_string(file.data)
    defaults = [each for each in model.graph.initializer if each.name == "target"]
    for each in defaults:
        model.graph.initializer.remove(each)
    encoded: bytes = model.SerializeToString(deterministic=True)
    return encoded


def describe_model(name: str, file: OnnxFile, settings: TritonSettings | None = None) -> str:
    """Return the text of config.pbtxt.

    Args:
        name: What clients call the model.
        file: The exported model.
        settings: How it is run.
    """
    settings = settings or TritonSettings()
    graph = onnx.load_model_from_string(file.data).graph
    inputs = [_input(each) for each in graph.input]
    config: dict[str, object] = {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": settings.max_batch,
        "input": inputs,
        "output": [_output(each, labelled=bool(file.metadata["model"]["label_names"])) for each in graph.output],
        "dynamic_batching": {"max_queue_delay_microseconds": settings.max_delay},
        "instance_group": [{"count": settings.instances, "kind": _Word("KIND_AUTO")}],
        "model_warmup": [_warmup(inputs, size) for size in sorted({1, settings.max_batch})],
        "parameters": [{"key": METADATA_KEY, "value": {"string_value": encode_parameter(file.metadata)}}],
    }
    if settings.tensorrt:
        config["optimization"] = _tensorrt()
    return _text(config)


def _input(value: onnx.ValueInfoProto) -> _Message:
    dims = _dims(value)
    described = {"name": value.name, "data_type": _Word(_TYPES[value.type.tensor_type.elem_type])}
    if dims:
        return {**described, "dims": dims}
    return {**described, "dims": [1], "reshape": {"shape": []}}  # a number for each image


def _output(value: onnx.ValueInfoProto, *, labelled: bool) -> _Message:
    described = {"name": value.name, "data_type": _Word("TYPE_FP32"), "dims": _dims(value)}
    return {**described, "label_filename": _LABELS} if labelled and value.name == "logits" else described


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    """Return a tensor's sides but the first, which is the batch's."""
    return [each.dim_value or -1 for each in value.type.tensor_type.shape.dim[1:]]


def _warmup(inputs: Sequence[_Message], size: int) -> _Message:
    """Return a request of zeros: the first real one need not wait for kernels to be chosen."""
    zeros = [
        {
            "key": each["name"],
            "value": {"data_type": each["data_type"], "dims": each["dims"], "zero_data": True},
        }
        for each in inputs
    ]
    return {"name": f"batch of {size}", "batch_size": size, "inputs": zeros}


def _tensorrt() -> _Message:
    accelerator = {"name": "tensorrt", "parameters": [{"key": "precision_mode", "value": "FP32"}]}
    return {"execution_accelerators": {"gpu_execution_accelerator": [accelerator]}}


def _text(message: _Message, indent: str = "") -> str:
    """Return a message in protobuf's text format."""
    return "".join(
        line
        for name, value in message.items()
        for each in (value if isinstance(value, list) and not _is_numbers(value) else [value])
        for line in _field(name, each, indent)
    )


def _field(name: str, value: object, indent: str) -> list[str]:
    if isinstance(value, Mapping):
        return [f"{indent}{name} {{\n", _text(value, indent + "  "), f"{indent}}}\n"]
    return [f"{indent}{name}: {_scalar(value)}\n"]


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, _Word):
        return f'"{CEscape(value.encode(), as_utf8=False)}"'
    return str(value)  # a word, a number, or a list of numbers


def _is_numbers(values: Sequence[object]) -> bool:
    return all(isinstance(each, int) for each in values)
