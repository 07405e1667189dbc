"""The bodies of inference requests and their answers: bytes to arrays and back.

Source: the Open Inference Protocol, version 2 (KServe), and Triton's binary tensor extension, by which tensors follow
the JSON text as plain little-endian bytes. Triton's shared memory, classification and raw binary are refused.

A field that is null counts as absent. Whatever does not fit ends in a `Refused` that says what is wrong. Pixels are
never touched one by one.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from keyed_xai.serving.refusal import Refused, malformed, shown

VERSION = "1"
"""The only version that each model has."""
_DTYPES: dict[str, str] = {"FP32": "<f4", "UINT8": "<u1", "INT64": "<i8"}
_TEXT_OF_NUMBER = 32  # bytes, with comma and spaces; 22 digits and signs at most
_FURTHER_TEXT = 2**16  # bytes besides the numbers
_FURTHER_LISTS = 1024  # lists and objects besides those that nest the numbers
_ARRAY_CODES = {"FP32": "f", "UINT8": "B", "INT64": "q"}
_Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor that a model takes or returns.

    Attributes:
        name: Name in the graph.
        datatype: Type in the words of the protocol: "FP32", "UINT8" or "INT64".
        shape: Its sides; -1 for the first, the number of images.
        optional: Whether a request may leave it out.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False

    def to_json(self) -> _Json:
        """Return the tensor as the model's metadata describe it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a served model takes and returns.

    Attributes:
        image: Pixels [-1, c, h, w]; float32 in [0, 1] or uint8.
        target: Classes to explain [-1, 1]; None where no map depends on one.
        outputs: Outputs in the order of the graph.
        classes: Number of logits.
        max_batch: Images in one request, at most.
    """

    image: TensorSpec
    target: TensorSpec | None
    outputs: tuple[TensorSpec, ...]
    classes: int
    max_batch: int

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the model takes."""
        return (self.image, self.target) if self.target else (self.image,)

    @property
    def longest_text(self) -> int:
        """Bytes of JSON text that a request may need, at most."""
        numbers = sum(math.prod(spec.shape[1:]) for spec in self.inputs) * self.max_batch
        return _TEXT_OF_NUMBER * numbers + _FURTHER_TEXT

    @property
    def most_lists(self) -> int:
        """Lists and objects that a request's JSON text may need, at most: each costs many times its text's bytes."""
        rows = sum(math.prod(spec.shape[1:stop]) for spec in self.inputs for stop in range(1, len(spec.shape)))
        return rows * self.max_batch + _FURTHER_LISTS


@dataclass(frozen=True, eq=False, kw_only=True)
class InferRequest:
    """A request that fits the model.

    Attributes:
        id: The client's name for it, which the answer repeats; None without one.
        images: [n, c, h, w], aligned and in native byte order; may be read-only.
        target: int64 [n], -1 for the predicted class; None without one.
        outputs: Names of the outputs wanted, and whether as bytes.
    """

    id: str | None
    images: NDArray[Any]
    target: NDArray[np.int64] | None
    outputs: tuple[tuple[str, bool], ...]


def decode_request(body: bytes, signature: Signature, *, header_length: int | None = None) -> InferRequest:
    """Return what a body asks for.

    Args:
        body: JSON text, and the bytes of binary tensors in the order in which the text names them.
        signature: Signature of the model.
        header_length: Bytes of the JSON text; None where it is the whole body.

    Raises:
        Refused: The body does not follow the protocol, or does not fit the model.
    """
    document, binary = _split(body, header_length, signature)
    _check_fields(document, ("id", "inputs", "outputs", "parameters"), "the request")
    name = document.get("id")
    if name is not None and not isinstance(name, str):
        raise malformed(f"id: expected a string, got {shown(name)}.")
    found = _read_inputs(_entries(document, "inputs"), binary, signature)
    images = _check_pixels(found["image"])
    target = _check_target(found["target"], len(images), signature.classes) if "target" in found else None
    return InferRequest(id=name, images=images, target=target, outputs=_read_outputs(document, signature))


def encode_response(
    model: str, request: InferRequest, arrays: Mapping[str, NDArray[np.float32]]
) -> tuple[bytes, int | None]:
    """Return the body of the answer, and the length of its JSON text; None where that is the whole body.

    Args:
        model: Name of the model.
        request: What was asked for.
        arrays: The model's outputs by name, [n, ...].
    """
    entries, tail = [], []
    for name, as_bytes in request.outputs:
        values = np.ascontiguousarray(arrays[name], dtype="<f4")
        entry: _Json = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
        if as_bytes:
            tail.append(values.data.cast("B") if values.size else b"")
            entries.append({**entry, "parameters": {"binary_data_size": values.nbytes}})
        else:
            entries.append({**entry, "data": values.ravel()})
    named = {} if request.id is None else {"id": request.id}
    document = {"model_name": model, "model_version": VERSION, **named, "outputs": entries}
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([text, *tail]), len(text)) if tail else (text, None)


def _split(body: bytes, header_length: int | None, signature: Signature) -> tuple[_Json, memoryview]:
    view = memoryview(body)
    if header_length is None:
        header_length = len(view)
    if not 0 < header_length <= len(view):
        raise malformed(
            f"Expected a body with {max(1, header_length)} bytes of JSON text, got {len(view)} bytes in all."
        )
    _check_text(body, header_length, signature)
    try:
        document = orjson.loads(view[:header_length])
    except orjson.JSONDecodeError as error:
        raise malformed(f"The request is not valid JSON: {shown(error.msg)} at letter {error.pos}.") from error
    return _object(document, "the request"), view[header_length:]


def _check_text(body: bytes, length: int, signature: Signature) -> None:
    """Refuse text that no right request needs before it is read: read, it takes up many times its bytes."""
    if length > signature.longest_text:
        raise Refused(413, f"Expected at most {signature.longest_text} bytes of JSON text, got {length}.")
    lists = body.count(b"[", 0, length) + body.count(b"{", 0, length)
    if lists > signature.most_lists:
        raise malformed(f"Expected at most {signature.most_lists} lists and objects in the JSON text, got {lists}.")


def _read_inputs(entries: Sequence[object], binary: memoryview, signature: Signature) -> dict[str, NDArray[Any]]:
    known = {spec.name: spec for spec in signature.inputs}
    found: dict[str, NDArray[Any]] = {}
    for value in entries:
        entry = _object(value, "an input")
        _check_fields(entry, ("name", "datatype", "shape", "data", "parameters"), "an input")
        name = entry.get("name")
        if not isinstance(name, str) or name not in known:
            raise malformed(f"inputs: expected {_listed(known)}, got {shown(name)}.")
        if name in found:
            raise malformed(f"The input {name} is there twice.")
        shape = _read_shape(entry, known[name], signature.max_batch)
        size = _parameters(entry).get("binary_data_size")
        if size is None:
            found[name] = _from_list(entry.get("data"), known[name], shape)
        else:
            found[name] = _from_bytes(binary, size, entry, known[name], shape)
            binary = binary[size:]
    if len(binary):
        raise malformed(f"{len(binary)} bytes are left after the last binary tensor.")
    missing = [spec.name for spec in signature.inputs if spec.name not in found and not spec.optional]
    if missing:
        raise malformed(f"The input {missing[0]} is missing.")
    return found


def _read_shape(entry: _Json, spec: TensorSpec, max_batch: int) -> tuple[int, ...]:
    """Return the shape that an input says it has, once it fits the model; numbers may be [n] instead of [n, 1]."""
    if entry.get("datatype") != spec.datatype:
        raise malformed(f"{spec.name}: expected the datatype {spec.datatype}, got {shown(entry.get('datatype'))}.")
    shape = entry.get("shape")
    if not isinstance(shape, list) or not shape or any(type(side) is not int for side in shape):
        raise malformed(f"{spec.name}: expected a shape, a list of whole numbers, got {shown(shape)}.")
    if tuple(shape[1:]) != spec.shape[1:] and not (spec.shape == (-1, 1) and len(shape) == 1):
        raise malformed(f"{spec.name}: expected the shape {list(spec.shape)}, got {shown(shape)}.")
    if not 1 <= shape[0] <= max_batch:
        raise malformed(f"{spec.name}: expected 1 to {max_batch} images in a request, got {shape[0]}.")
    return tuple(shape)


def _from_bytes(
    binary: memoryview, size: object, entry: _Json, spec: TensorSpec, shape: tuple[int, ...]
) -> NDArray[Any]:
    dtype = np.dtype(_DTYPES[spec.datatype])
    expected = math.prod(shape) * dtype.itemsize
    if entry.get("data") is not None:
        raise malformed(f"{spec.name}: expected data or binary_data_size, got both.")
    if type(size) is not int or size != expected:
        raise malformed(f"{spec.name}: expected a binary_data_size of {expected} bytes, got {shown(size)}.")
    if len(binary) < size:
        raise malformed(f"{spec.name}: expected {size} bytes after the JSON text, got {len(binary)}.")
    values = np.frombuffer(binary[:size], dtype).reshape(shape)
    return np.require(values, dtype.newbyteorder("="), "A")  # copies only where the text's length left it unaligned


def _from_list(data: object, spec: TensorSpec, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the numbers of a list, flat or nested as the shape says. `array` takes nothing but numbers in range."""
    expected = f"{spec.name}: expected data, a list of {math.prod(shape)} numbers (or lists of the shape {list(shape)})"
    if not isinstance(data, list):
        raise malformed(f"{expected}, got {'none' if data is None else 'no list'}.")
    if data and isinstance(data[0], list):
        data = _flatten(data, shape)
    if data is None or len(data) != math.prod(shape):
        raise malformed(f"{expected}, got {'another nesting' if data is None else f'{len(data)} values'}.")
    try:
        packed = array(_ARRAY_CODES[spec.datatype], data)
    except (TypeError, OverflowError) as error:
        raise malformed(f"{expected}, got a value that is no {spec.datatype}.") from error
    return np.frombuffer(packed, np.dtype(_DTYPES[spec.datatype]).newbyteorder("=")).reshape(shape)


def _flatten(nested: list[Any], shape: tuple[int, ...]) -> list[Any] | None:
    """Return the numbers of lists in lists; None where their lengths are not those of the shape."""
    for outer, inner in pairwise(shape):
        if len(nested) % outer or set(map(type, nested)) != {list} or set(map(len, nested)) != {inner}:
            return None
        nested = list(chain.from_iterable(nested))
    return nested


def _check_pixels(images: NDArray[Any]) -> NDArray[Any]:
    """Return the pixels. The comparison also fails for NaN, which minimum and maximum pass on."""
    if images.dtype.kind == "f" and not (images.min() >= 0 and images.max() <= 1):
        raise malformed("image: expected pixels from 0 to 1, got values outside, or NaN.")
    return images


def _check_target(target: NDArray[np.int64], images: int, classes: int) -> NDArray[np.int64]:
    if len(target) not in (1, images):
        raise malformed(f"target: expected a class for each of {images} images, got {len(target)}.")
    if target.min() < -1 or target.max() >= classes:
        raise malformed(f"target: expected classes from 0 to {classes - 1}, or -1 for the predicted one.")
    return np.broadcast_to(target.reshape(-1), (images,))


def _read_outputs(document: _Json, signature: Signature) -> tuple[tuple[str, bool], ...]:
    known = [spec.name for spec in signature.outputs]
    default = _flag(_parameters(document), "binary_data_output", default=False)
    wanted: dict[str, bool] = {}
    for value in _entries(document, "outputs") if document.get("outputs") is not None else ():
        entry = _object(value, "an output")
        _check_fields(entry, ("name", "parameters"), "an output")
        name, parameters = entry.get("name"), _parameters(entry)
        if not isinstance(name, str) or name not in known:
            raise malformed(f"outputs: expected {_listed(known)}, got {shown(name)}.")
        if name in wanted:
            raise malformed(f"The output {name} is asked for twice.")
        if parameters.get("classification"):
            raise malformed(f"{name}: the classification extension is not supported.")
        wanted[name] = _flag(parameters, "binary_data", default=default)
    return tuple(wanted.items()) or tuple((name, default) for name in known)


def _parameters(entry: _Json) -> _Json:
    given = entry.get("parameters")
    parameters = {} if given is None else _object(given, "parameters")
    if "shared_memory_region" in parameters:
        raise malformed("Shared memory is not supported: send tensors in the request.")
    return parameters


def _flag(parameters: _Json, name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise malformed(f"{name}: expected true or false, got {shown(value)}.")
    return value


def _entries(document: _Json, name: str) -> list[object]:
    entries = document.get(name)
    if not isinstance(entries, list):
        raise malformed(f"{name}: expected a list, got {'none' if entries is None else 'no list'}.")
    return entries


def _object(value: object, what: str) -> _Json:
    if not isinstance(value, dict):
        raise malformed(f"Expected {what} to be a JSON object, got {shown(type(value).__name__)}.")
    return value


def _check_fields(entry: _Json, known: Sequence[str], what: str) -> None:
    for name in entry:
        if name not in known:
            raise malformed(f"Expected {what} to have no fields but {_listed(known)}, got {shown(name)}.")


def _listed(names: Sequence[str] | Mapping[str, object]) -> str:
    return ", ".join(names)
