"""ONNX models with saliency maps on disk. PyTorch is not needed to read them.

A file from elsewhere is untrusted. Reading refuses what would have the runtime open other files or code (external
data, operators of other domains) or run without end (loops and all else that holds a graph), and bounds sizes; what an
accepted graph computes is its maker's word alone.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import gt
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError

from keyed_xai.artifacts.card import Card
from keyed_xai.artifacts.documents import Document, parse_json, printable, read_limited, validate, write_atomically
from keyed_xai.errors import ArtifactError
from keyed_xai.limits import describe_excess

METADATA_KEY = "keyed_xai"
"""Name under which metadata stand in a file, and in the parameters of a served model's configuration."""
METADATA_SCHEMA = "keyed-xai/onnx-metadata/v1"
LARGEST_MODEL = 2**31 - 1
"""Bytes; what one protobuf message can hold."""
LARGEST_METADATA = 4 * 1024 * 1024
"""Letters that the metadata may have, at most."""
_DOMAINS = {"", "ai.onnx"}
# Operators that no exported classifier needs. Some end the process on odd inputs (SplitToSequence of 0 in
# onnxruntime 1.31: division by zero).
_UNUSED = re.compile(
    r".*Sequence.*|Sequence.*|Optional.*|String.*|Regex.*|TfIdf.*|Image.*|Random.*|Multinomial|Bernoulli|"
    r".*Window|MelWeightMatrix|STFT|DFT|.*Encoder|NonMaxSuppression|RNN|LSTM|GRU"
)


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model, read and looked over.

    Attributes:
        data: The file's bytes, as a runtime takes them.
        metadata: What it says about itself; fits the schema "onnx-metadata".
    """

    data: bytes
    metadata: Document

    @property
    def sha256(self) -> str:
        """Digest of the file, hex."""
        return hashlib.sha256(self.data).hexdigest()


def encode_onnx(model: onnx.ModelProto, metadata: Mapping[str, object]) -> OnnxFile:
    """Return a model with metadata as it will stand on the disk.

    Raises:
        ArtifactError: The metadata do not fit their schema, or the model is too large for one file.
    """
    text = json.dumps(metadata, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    document = json.loads(text)
    validate(document, "onnx-metadata", origin="the model's metadata")
    del model.metadata_props[:]
    model.metadata_props.add(key=METADATA_KEY, value=text)
    try:
        data = model.SerializeToString(deterministic=True)
    except (ValueError, EncodeError) as error:
        raise ArtifactError("The ONNX model has more than 2 GiB, the most that one file holds. Try int8 weights.") \
            from error  # fmt: skip
    return OnnxFile(data, document)


def write_onnx(path: Path, file: OnnxFile) -> None:
    """Write a model, whole or not at all; an existing file is replaced.

    Raises:
        ArtifactError: The file cannot be written.
    """
    write_atomically(path, file.data)


def read_onnx(path: Path) -> OnnxFile:
    """Return the model in a file.

    Raises:
        ArtifactError: It cannot be read, is no ONNX model, holds something that is refused, or was not made by export.
    """
    return decode_onnx(read_limited(path, LARGEST_MODEL), origin=str(path))


def check_metadata(metadata: Any, *, origin: str) -> Document:  # noqa: ANN401 - whatever JSON held
    """Return metadata that fit their schema, and the card in them its own.

    Args:
        metadata: The metadata, parsed.
        origin: Names them in the message: "the metadata of ...".

    Raises:
        ArtifactError: They do not fit.
    """
    validate(metadata, "onnx-metadata", origin=origin)
    excess = describe_excess(*map(int, metadata["model"]["input_size"]))
    if excess is not None:
        raise ArtifactError(f"The input_size in {printable(origin)} is out of range: {excess}.")
    if metadata["card"] is not None:
        Card.from_json(metadata["card"], origin=f"the card in {origin}")
    return dict(metadata)


def encode_parameter(metadata: Mapping[str, object]) -> str:
    """Return metadata as the JSON text that servers hand out in a model's configuration."""
    return json.dumps({"metadata": metadata}, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def decode_onnx(data: bytes, *, origin: str) -> OnnxFile:
    """Return the model in bytes; see `read_onnx`."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ArtifactError(f"{printable(origin)} is not an ONNX model.") from error
    if not model.graph.node or not model.graph.output:
        raise ArtifactError(f"{printable(origin)} is not an ONNX model: it has no graph.")
    _check_operators(model, origin)
    return OnnxFile(data, _read_metadata(model, origin))


def _check_operators(model: onnx.ModelProto, origin: str) -> None:
    if model.functions or model.training_info:
        raise ArtifactError(f"{printable(origin)} defines functions or training steps, which export never writes.")
    for tensor in _tensors(model.graph):
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ArtifactError(f"{printable(origin)} keeps weights in another file, which is refused.")
    for node in model.graph.node:
        _check_node(node, origin)


def _check_node(node: onnx.NodeProto, origin: str) -> None:
    if not isinstance(node.domain, str) or not isinstance(node.op_type, str):  # bytes: not UTF-8
        raise ArtifactError(f"{printable(origin)} names an operator in letters that are not UTF-8.")
    if node.domain not in _DOMAINS:
        raise ArtifactError(
            f"{printable(origin)} uses {printable(node.op_type)} of the domain {printable(node.domain)!r}; "
            "only standard operators are run."
        )
    if _UNUSED.fullmatch(node.op_type):
        raise ArtifactError(
            f"{printable(origin)} uses {printable(node.op_type)}, an operator of sequences, texts or chance; expected "
            "those of numbers, as export writes them. Export it again."
        )
    if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        raise ArtifactError(
            f"{printable(origin)} uses {printable(node.op_type)} with a graph inside, which may run without end; "
            "expected operators without loops and branches, as export writes them. Export it again."
        )
    if node.op_type == "ConvTranspose":
        _check_padding(node, origin)


def _check_padding(node: onnx.NodeProto, origin: str) -> None:
    """Refuse a transposed convolution whose padding takes more than its kernel gives.

    The output could have fewer than no rows, at which onnxruntime ends the process (an assertion in Slice).
    """
    integers = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    kernel, pads = integers.get("kernel_shape", []), integers.get("pads", [])
    dilations = integers.get("dilations") or [1] * len(kernel)
    extents = [step * (side - 1) + 1 for side, step in zip(kernel, dilations, strict=False)]
    sides = len(pads) // 2
    taken = [first + last for first, last in zip(pads[:sides], pads[sides:], strict=False)]
    if any(pads) and (len(extents) != sides or any(map(gt, taken, extents))):
        raise ArtifactError(
            f"{printable(origin)} pads a transposed convolution by {pads} around one of {kernel}: expected at most "
            "the kernel's own size. Export it again."
        )


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    sparse = list(graph.sparse_initializer)
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            sparse += [*attribute.sparse_tensors, *([attribute.sparse_tensor] * attribute.HasField("sparse_tensor"))]
    for each in sparse:
        yield each.values
        yield each.indices


def _read_metadata(model: onnx.ModelProto, origin: str) -> Document:
    texts = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    if len(texts) != 1 or not isinstance(texts[0], str):  # bytes: not UTF-8
        raise ArtifactError(f"{printable(origin)} has no metadata of keyed-xai: make it with `keyed-xai export`.")
    if len(texts[0]) > LARGEST_METADATA:
        raise ArtifactError(f"{printable(origin)} has more than {LARGEST_METADATA} letters of metadata.")
    document = parse_json(texts[0].encode(), origin=f"the metadata of {origin}")
    return check_metadata(document, origin=f"the metadata of {origin}")
