"""Ways to spoil inputs: bytes of any kind, JSON, zip archives, pickles in them, PNG chunks, and ONNX graphs.

Each takes an input and a source of chance, and returns a spoilt copy of at most `LONGEST` bytes more.
"""

import copy
import io
import json
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import onnx
from google.protobuf.message import Message

LONGEST = 2**18
MOST_PLACES_ADDED = 1000  # in JSON, before it is spoilt once more: copies of copies would fill the memory
EXTREMES = (0, 1, 2, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, "", "x", "\x00", "\x1b[2J", "\ud7ff\U0010ffff", "../../etc/passwd", "a" * 70_000, "1e999", [],
    {}, [[]], {"": {}}, 0, -1, 1, 2, 3, 64, 65, 128, 1024, 4096, 4097, 65_536, 2**31, 2**63, 2**64, 10**30, 10**400,
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain})
Mutation = Callable[[bytes, Random], bytes]


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Return bytes with one to four spoilt places."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        random.choice((_flip, _flip, _overwrite, _overwrite, _cut, _delete, _repeat, _insert))(changed, random)
    return bytes(changed[: len(data) + LONGEST])


def _flip(data: bytearray, random: Random) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _overwrite(data: bytearray, random: Random) -> None:
    """Put a whole number from the edge of a range where one may be."""
    size, order = random.choice((1, 2, 4, 8)), random.choice(("little", "big"))
    place = random.randrange(len(data) + 1)
    value = random.choice(EXTREMES) & (256**size - 1)
    data[place : place + size] = value.to_bytes(size, "little" if order == "little" else "big")


def _cut(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data) + 1) :]


def _span(data: bytearray, random: Random) -> slice:
    start = random.randrange(len(data) + 1)
    return slice(start, start + random.choice((1, 2, 4, 8, 30, 100, 1000)))


def _delete(data: bytearray, random: Random) -> None:
    del data[_span(data, random)]


def _repeat(data: bytearray, random: Random) -> None:
    span = _span(data, random)
    part = data[span]
    data[span] = part * min(random.choice((2, 3, 100, 10_000)), LONGEST // max(1, len(part)))


def _insert(data: bytearray, random: Random) -> None:
    place = random.randrange(len(data) + 1)
    data[place:place] = random.randbytes(random.choice((1, 4, 16)))


def mutate_json(document: Any, random: Random) -> bytes:  # noqa: ANN401 - any JSON
    """Return the JSON text of a document with one to three spoilt places."""
    changed = copy.deepcopy(document)
    most = len(_places(changed)) + MOST_PLACES_ADDED
    for _ in range(random.choice((1, 1, 2, 3))):
        if 0 < len(places := _places(changed)) <= most:
            _spoil(*random.choice(places), random)
    text = json.dumps(changed, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return mutate_bytes(text, random) if random.random() < 0.2 else text


def _places(document: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401
    """Return every container with each of its keys or indices."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        here = waiting.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        found += [(here, key) for key in keys]
        waiting += [here[key] for key in keys]
    return found


def _spoil(here: Any, key: Any, random: Random) -> None:  # noqa: ANN401
    match random.randrange(7):
        case 0:
            del here[key]
        case 1 if isinstance(here, dict):
            here[random.choice((f"{key}x", "", "schema", key.upper()))] = here[key]
        case 2:
            value = here[key]
            here[key] = [value] * random.choice((2, 17, 1025)) if len(str(value)) < 200 else [value, value]
        case 3:
            nested: Any = here[key]
            for _ in range(random.choice((1, 50, 250))):
                nested = [nested] if random.random() < 0.5 else {"a": nested}
            here[key] = nested
        case 4 if isinstance(here[key], list) and here[key]:
            here[key] += here[key][:1] * random.choice((1, 2, 2000))
        case _:
            here[key] = copy.deepcopy(random.choice(VALUES))


def mutate_zip(data: bytes, random: Random) -> bytes:
    """Return an archive with a member spoilt, packed, renamed, doubled or left out, all lengths and sums put right."""
    members = _members(data)
    name = random.choice(list(members))
    packing = zipfile.ZIP_STORED
    match random.randrange(6):
        case 0:
            packing = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
        case 1:
            members[random.choice((f"{name}x", f"../{name}", "archive/data.pkl", name.upper()))] = members.pop(name)
        case 2:
            del members[name]
        case 3:
            pickles = [each for each in members if each.endswith("data.pkl")] or [name]
            members[pickles[0]] = mutate_bytes(members[pickles[0]], random)
        case 4:
            members[name] *= 2
        case _:
            members[name] = mutate_bytes(members[name], random)
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w", packing) as archive:
        for each, content in members.items():
            archive.writestr(each, content)
        if random.random() < 0.1:
            archive.writestr(name, b"twice")
    return buffer.getvalue()


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def mutate_zip_records(data: bytes, random: Random) -> bytes:
    """Return an archive with a number put into one of its records, where sizes and offsets are."""
    changed = bytearray(data)
    marks = (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07")
    places = [place for mark in marks if (place := data.find(mark, random.randrange(len(data)))) >= 0]
    place = random.choice(places or [0]) + random.randrange(4, 46)
    size = random.choice((1, 2, 4, 8))
    changed[place : place + size] = (random.choice(EXTREMES) & (256**size - 1)).to_bytes(size, "little")
    return bytes(changed)


def mutate_png(data: bytes, random: Random) -> bytes:
    """Return a PNG file with a chunk spoilt, doubled or left out, and the sums of all put right."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return mutate_bytes(data, random)
    index = random.randrange(len(chunks))
    kind, content = chunks[index]
    spoilt = (kind, mutate_bytes(content, random))
    chunks[index : index + 1] = random.choice(([spoilt], [spoilt], [(kind, content)] * 2, []))
    packed = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return data[:8] + b"".join(packed)


def mutate_onnx(data: bytes, random: Random) -> bytes:
    """Return an ONNX model with one to three fields of its nodes, tensors or signature spoilt."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        kind = random.choice((_spoil_node, _spoil_node, _spoil_node, _spoil_tensor, _spoil_list, _spoil_signature))
        kind(model, random)
    return bytes(model.SerializeToString())


def _spoil_node(model: onnx.ModelProto, random: Random) -> None:
    node = random.choice(model.graph.node or [onnx.NodeProto()])
    match random.randrange(6):
        case 0:
            node.op_type = random.choice(OPERATORS)
        case 1 if node.input:
            names = [each for other in model.graph.node for each in (*other.input, *other.output)]
            node.input[random.randrange(len(node.input))] = random.choice(names)
        case 2:
            node.domain = random.choice(("", "ai.onnx.ml", "com.microsoft", "x"))
        case 3:
            node.attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g.CopyFrom(onnx.GraphProto(name="g"))
        case _ if node.attribute:
            _spoil_attribute(random.choice(node.attribute), random)


def _spoil_attribute(attribute: onnx.AttributeProto, random: Random) -> None:
    extreme = random.choice((*EXTREMES[:-1], -1, -(2**63)))
    if attribute.ints:
        attribute.ints[random.randrange(len(attribute.ints))] = extreme
    elif attribute.HasField("i"):
        attribute.i = extreme
    elif attribute.HasField("f"):
        attribute.f = random.choice((0.0, -1.0, 1e38, float("nan")))
    else:
        attribute.s = random.choice((b"", b"SAME_UPPER", b"\xff", b"x" * 1000))


def _spoil_tensor(model: onnx.ModelProto, random: Random) -> None:
    tensor = random.choice(model.graph.initializer or [onnx.TensorProto()])
    match random.randrange(5):
        case 0 if tensor.dims:
            tensor.dims[random.randrange(len(tensor.dims))] = random.choice((*EXTREMES[:-1], -1))
        case 1:
            tensor.data_type = random.randrange(25)
        case 2:
            tensor.external_data.add(key="location", value="/etc/passwd")
        case 3:
            tensor.dims.append(random.choice(EXTREMES[:-1]))
        case _:
            tensor.raw_data = mutate_bytes(tensor.raw_data, random)


def _spoil_list(model: onnx.ModelProto, random: Random) -> None:
    """Double, move or leave out a node, a tensor, an input or an output."""
    graph = model.graph
    entries: Any = random.choice((graph.node, graph.initializer, graph.input, graph.output, model.opset_import))
    if entries:
        entry: Message = copy.deepcopy(random.choice(entries))
        if random.random() < 0.5:
            entries.remove(entry)
        if random.random() < 0.6:
            entries.insert(random.randrange(len(entries) + 1), entry)


def _spoil_signature(model: onnx.ModelProto, random: Random) -> None:
    values = [*model.graph.input, *model.graph.output]
    kind = random.choice(values or [onnx.ValueInfoProto()]).type.tensor_type
    if random.random() < 0.3 or not kind.shape.dim:
        kind.elem_type = random.randrange(25)
    else:
        random.choice(kind.shape.dim).dim_value = random.choice((*EXTREMES[:-1], -1))


def one_of(mutations: Sequence[Mutation]) -> Mutation:
    """Return the mutation that makes one of these, each as likely."""
    return lambda data, random: random.choice(mutations)(data, random)
