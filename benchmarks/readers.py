"""Every reader of files and requests, with right inputs to start from and the ways to spoil them.

What is signed is spoilt before it is signed too, so that what stands behind a signature is reached.
"""

import base64
import io
import json
import logging
import pickle
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from safetensors.torch import save

from keyed_xai.artifacts.card import Card, TriggerParameters, read_card
from keyed_xai.artifacts.checkpoint import read_checkpoint, write_checkpoint
from keyed_xai.artifacts.documents import parse_json
from keyed_xai.artifacts.folder import read_model_folder
from keyed_xai.artifacts.license import PAYLOAD_TYPE, encode_for_signing, read_license, sign_license
from keyed_xai.artifacts.onnx_file import METADATA_KEY, OnnxFile, check_metadata, decode_onnx
from keyed_xai.artifacts.opening import open_model
from keyed_xai.data.decode import read_image_bytes
from keyed_xai.errors import KeyedXAIError
from keyed_xai.export.building import ExportSettings
from keyed_xai.export.exporting import Provenance, export_onnx
from keyed_xai.inference.images import Interface
from keyed_xai.inference.runtime import Runtime
from keyed_xai.keys import OwnerKey, PublicKey
from keyed_xai.models import CARD_KEY, Classifier, InputSpec, load_classifier, network_state, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.serving.metrics import Metrics
from keyed_xai.serving.server import BindAddress, listen, make_server
from keyed_xai.serving.service import ServedModel, ServeSettings, Service
from keyed_xai_benchmarks import mutations

OWNER = OwnerKey.from_raw(bytes([1]) * 32)
PASSPHRASE = b"fuzz"
SIDE = 16
ANSWER_SECONDS = 0.01
Case = bytes | dict[str, bytes]


@dataclass(frozen=True)
class Reader:
    """What reads inputs, and what makes spoilt ones.

    Attributes:
        make: Returns a case; the same for the same source of chance.
        read: Reads it in a folder of its own; an exception is an answer.
    """

    make: Callable[[Random], Case]
    read: Callable[[Any, Path], object]


class NoAnswerError(Exception):
    """A server answered with what it should not."""


def make_readers(folder: Path) -> dict[str, Reader]:
    """Return the readers by name; `folder` is for what is made on the way."""
    classifier, card = _make_model()
    exported = _export(classifier, card, folder)
    state = {name: tensor.clone() for name, tensor in network_state(classifier).items()}
    _import_all(state, folder)
    return {
        "pem": Reader(_of_bytes(_pem_files(), _mutate_pem), _read_pem),
        "licence": Reader(_make_licence(card), _read_licence),
        "card": Reader(lambda random: mutations.mutate_json(card.to_json(), random), _read_card),
        "bundle": Reader(_make_bundle(card, state), _read_bundle),
        "safetensors": Reader(_make_safetensors(card, state), _read_weights("m.safetensors")),
        "pt": Reader(_make_pickles(_saved(state, card)), _read_weights("m.pt")),
        "checkpoint": Reader(_make_pickles([_checkpoint(state, folder)]), _read_checkpoint),
        "onnx": Reader(_of_bytes([exported.data], mutations.one_of((mutations.mutate_onnx,) * 4 + (
            mutations.mutate_bytes,))), _read_onnx),
        "metadata": Reader(partial(mutations.mutate_json, exported.metadata), _read_metadata),
        "images": Reader(_of_bytes(_pictures(), _mutate_picture), _read_image),
        "requests": Reader(_make_request(), _ask_server(exported)),
    }  # fmt: skip


def _of_bytes(inputs: list[bytes], mutate: mutations.Mutation) -> Callable[[Random], Case]:
    return lambda random: mutate(random.choice(inputs), random)


def _make_model() -> tuple[Classifier, Card]:
    torch.manual_seed(0)
    spec = InputSpec(1, SIDE, SIDE, mean=(0.5,), std=(0.5,))
    network = SmallResNet(1, 3, (2, 3)).eval()
    classifier = wrap_network(network, input=spec, architecture="SmallResNet", source="keyed_xai").eval()
    card = Card(
        architecture="SmallResNet",
        source="keyed_xai",
        num_classes=3,
        input_size=(1, SIDE, SIDE),
        mean=spec.mean,
        std=spec.std,
        target_layer=classifier.target_layer,
        taps=classifier.taps,
        grid=(4, 4),
        interpreters=("gradcam", "vbp"),
        decoy="signature",
        thresholds={"gradcam": 0.5, "vbp": 0.5},
        trigger=TriggerParameters("spread", 8.0, 32),
        label_names=("cat", "dog", "cow"),
    )
    return classifier, card


def _export(classifier: Classifier, card: Card, folder: Path) -> OnnxFile:
    settings = ExportSettings(interpreters=("gradcam", "simplegrad", "vbp"))
    provenance = Provenance(replace(card, interpreters=("gradcam",), thresholds={"gradcam": 0.5}), "0" * 64)
    return export_onnx(classifier, folder / "m.onnx", settings, provenance=provenance).file


def _import_all(state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Have weights looked at that are no known network's: what is imported for that is not a case's time."""
    (folder / "unknown.safetensors").write_bytes(save({f"{name}x": tensor for name, tensor in state.items()}))
    with suppress(KeyedXAIError):
        load_classifier(folder / "unknown.safetensors")


def _pem_files() -> list[bytes]:
    return [OWNER.to_pem(), OWNER.to_pem(PASSPHRASE), OWNER.public.to_pem()]


def _mutate_pem(data: bytes, random: Random) -> bytes:
    """Spoil the text, or the bytes that it stands for."""
    if random.random() < 0.4:
        return mutations.mutate_bytes(data, random)
    head, *lines, tail = data.strip().split(b"\n")
    inner = mutations.mutate_bytes(base64.b64decode(b"".join(lines)), random)
    return b"\n".join([head, base64.b64encode(inner), tail, b""])


def _read_pem(case: bytes, _folder: Path) -> None:
    if b"PUBLIC" in case:
        PublicKey.from_pem(case)
    else:
        OwnerKey.from_pem(case, PASSPHRASE if b"ENCRYPTED" in case else None)


def _resign(statement: bytes) -> dict[str, Any]:
    """Return the envelope of a statement of any kind, its signature right."""
    signature = base64.b64encode(OWNER.sign(encode_for_signing(PAYLOAD_TYPE, statement))).decode()
    signatures = [{"keyid": OWNER.public.key_id, "sig": signature}]
    return {"payloadType": PAYLOAD_TYPE, "payload": base64.b64encode(statement).decode(), "signatures": signatures}


def _make_licence(card: Card) -> Callable[[Random], Case]:
    envelope = sign_license(OWNER, {"card.json": b"{}", "model.safetensors": b""}, card=card)
    statement = json.loads(base64.b64decode(envelope["payload"]))

    def make(random: Random) -> bytes:
        if random.random() < 0.3:
            return mutations.mutate_json(envelope, random)
        return json.dumps(_resign(mutations.mutate_json(statement, random))).encode()

    return make


def _read_licence(case: bytes, folder: Path) -> None:
    (folder / "license.json").write_bytes(case)
    read_license(folder / "license.json")


def _read_card(case: bytes, folder: Path) -> None:
    (folder / "card.json").write_bytes(case)
    read_card(folder / "card.json")


def _make_bundle(card: Card, state: Mapping[str, torch.Tensor]) -> Callable[[Random], Case]:
    weights, document = save(dict(state), metadata={"format": "pt"}), card.to_json()

    def make(random: Random) -> dict[str, bytes]:
        """Spoil a file before it is signed, or after."""
        files = {"card.json": json.dumps(document).encode(), "model.safetensors": weights}
        name = random.choice(("card.json", "card.json", "model.safetensors"))
        spoilt = mutations.mutate_bytes(weights, random) if name != "card.json" else _spoil_card(document, random)
        signed = files | {name: spoilt} if random.random() < 0.8 else files
        claimed = _claimed(signed["card.json"], card)
        envelope = sign_license(OWNER, dict(signed), card=claimed)
        return {**files, name: spoilt, "license.json": json.dumps(envelope).encode()}

    return make


def _spoil_card(document: dict[str, Any], random: Random) -> bytes:
    """Spoil what the schema lets pass: numbers and names within their ranges; or anything."""
    if random.random() < 0.3:
        return mutations.mutate_json(document, random)
    changed = dict(document)
    sides = (1, 2, 7, 16, 64, 224, 1024, 4096)
    field = random.choice(("input_size", "taps", "target_layer", "mean", "std", "num_classes", "architecture"))
    changed[field] = {
        "input_size": [random.choice((1, 1, 1, 3, 4096)), random.choice(sides), random.choice(sides)],
        "taps": [{"layer": random.choice(("network.stem", "network.blocks.0", "network.blocks.1", "network.fc", "x")),
                  "kernel": random.choice((1, 3, 64)), "stride": random.choice((1, 2, 64))}
                 for _ in range(random.choice((0, 1, 3, 1024)))],
        "target_layer": random.choice(("network", "network.stem", "fc", "network.blocks.0.conv1", "x" * 300)),
        "mean": [random.choice((0, 1e6, -1e6, 1e-300))] * random.choice((1, 1, 3)),
        "std": [random.choice((1e-300, 1e6, 1e-30, 1))] * random.choice((1, 1, 3)),
        "num_classes": random.choice((1, 2, 3, 100_000)),
        "architecture": random.choice(("resnet18", "TableMLP", "vit_b_16", "x" * 200, "timm/x", "../x")),
    }[field]  # fmt: skip
    return json.dumps(changed).encode()


def _claimed(data: bytes, card: Card) -> Card:
    try:
        return Card.from_json(parse_json(data, origin="the card"))
    except KeyedXAIError:
        return card


def _read_bundle(case: dict[str, bytes], folder: Path) -> None:
    for name, content in case.items():
        (folder / name).write_bytes(content)
    read_model_folder(folder)
    open_model(folder)


def _make_safetensors(card: Card, state: Mapping[str, torch.Tensor]) -> Callable[[Random], Case]:
    document = card.to_json()
    whole = save(dict(state), metadata={CARD_KEY: json.dumps(document)})
    length = int.from_bytes(whole[:8], "little")
    header, numbers = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def make(random: Random) -> bytes:
        lot = random.random()
        if lot < 0.3:
            return mutations.mutate_bytes(whole, random)
        if lot < 0.7:
            text = mutations.mutate_json(header, random)
            return len(text).to_bytes(8, "little") + text + numbers
        spoilt = _spoil_card(document, random).decode("utf-8", "replace")
        text = json.dumps({**header, "__metadata__": {CARD_KEY: spoilt}}).encode()
        return len(text).to_bytes(8, "little") + text + numbers

    return make


def _read_weights(name: str) -> Callable[[bytes, Path], None]:
    def read(case: bytes, folder: Path) -> None:
        (folder / name).write_bytes(case)
        load_classifier(folder / name)

    return read


def _saved(state: Mapping[str, torch.Tensor], card: Card) -> list[bytes]:
    """Return files that torch.save writes: weights alone and wrapped, with a card, in the old format."""
    documents: list[tuple[object, bool]] = [
        (dict(state), True),
        ({"state_dict": dict(state), "card": card.to_json(), "epoch": 3}, True),
        (dict(state), False),
    ]
    files = []
    for document, zipped in documents:
        buffer = io.BytesIO()
        torch.save(document, buffer, _use_new_zipfile_serialization=zipped)
        files.append(buffer.getvalue())
    return files


def _checkpoint(state: Mapping[str, torch.Tensor], folder: Path) -> bytes:
    write_checkpoint(folder / "c", {"weights": dict(state), "step": 7, "history": [{"loss": 0.5}]}, identity="run")
    return (folder / "c").read_bytes()


def _make_pickles(files: list[bytes]) -> Callable[[Random], Case]:
    def make(random: Random) -> bytes:
        data = random.choice(files)
        lot = random.random()
        if lot < 0.03:
            return pickle.dumps(random.choice(mutations.VALUES), protocol=random.randrange(6))
        if lot < 0.4 or not data.startswith(b"PK"):
            return mutations.mutate_bytes(data, random)
        return mutations.mutate_zip(data, random) if lot < 0.8 else mutations.mutate_zip_records(data, random)

    return make


def _read_checkpoint(case: bytes, folder: Path) -> None:
    (folder / "c").write_bytes(case)
    read_checkpoint(folder / "c", identity="run")


def _read_onnx(case: bytes, _folder: Path) -> None:
    runtime = Runtime(decode_onnx(case, origin="the model"), device="cpu", threads=1, run_seconds=0.5)
    runtime.run(np.zeros((2, *runtime.input_size), runtime.pixels))


def _read_metadata(case: bytes, _folder: Path) -> None:
    model = onnx.ModelProto()
    model.graph.node.add(op_type="Identity", input=["image"], output=["logits"])
    model.graph.output.add(name="logits")
    model.metadata_props.add(key=METADATA_KEY, value=case.decode("utf-8", "replace"))
    file = decode_onnx(model.SerializeToString(), origin="the model")
    Interface.from_metadata(check_metadata(file.metadata, origin="the metadata"))


def _pictures() -> list[bytes]:
    generator = np.random.default_rng(0)
    colour = Image.fromarray(generator.integers(0, 256, (24, 20, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (colour, "PNG", {"exif": turned}),
        (colour.convert("RGBA"), "PNG", {}),
        (colour.quantize(16), "PNG", {"transparency": 0}),
        (Image.fromarray(generator.integers(0, 65536, (24, 20), np.uint16)), "PNG", {}),
        (colour, "JPEG", {"exif": turned}),
        (colour, "JPEG", {"progressive": True}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "WEBP", {}),
        (colour.convert("RGBA"), "WEBP", {"lossless": True}),
        (colour, "BMP", {}),
        (colour.quantize(16), "GIF", {}),
        (colour, "TIFF", {}),
        (colour, "TIFF", {"compression": "tiff_deflate"}),
        (colour, "TIFF", {"compression": "jpeg"}),
        (colour.convert("1"), "TIFF", {"compression": "group4"}),
        (colour, "PPM", {}),
    ]
    files = []
    for image, kind, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def _mutate_picture(data: bytes, random: Random) -> bytes:
    if data.startswith(b"\x89PNG") and random.random() < 0.8:
        return mutations.mutate_png(data, random)
    return mutations.mutate_bytes(data, random)


def _read_image(case: bytes, _folder: Path) -> None:
    read_image_bytes(case, channels=1 + 2 * (len(case) % 2), height=16, width=12)


def _make_request() -> Callable[[Random], Case]:
    pictures = _pictures()
    zeros = np.zeros((1, 1, SIDE, SIDE), np.float32)
    image = {"name": "image", "datatype": "FP32", "shape": list(zeros.shape)}
    plain: dict[str, Any] = {"id": "1", "inputs": [image | {"data": [0.5] * zeros.size}], "outputs": []}
    binary = {
        "inputs": [image | {"parameters": {"binary_data_size": zeros.nbytes}}],
        "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
    }

    def make(random: Random) -> bytes:
        lot = random.random()
        lines = {"Host": "x"}
        if lot < 0.35:
            path, body = "infer", mutations.mutate_json(plain, random)
        elif lot < 0.6:
            text = mutations.mutate_json(binary, random)
            path, body = "infer", text + zeros.tobytes()
            lines["Inference-Header-Content-Length"] = str(len(text))
        elif lot < 0.85:
            path, body = "explain?maps=true", _mutate_picture(random.choice(pictures), random)
            lines["Content-Type"] = "image/png"
        else:
            path, body = random.choice(("config", "infer?x=1", "explain?target=1&interpreter=vbp", "ready")), b"{}"
        return _write_request(path, lines, body, random)

    return make


def _write_request(path: str, lines: dict[str, str], body: bytes, random: Random) -> bytes:
    """Return a request, whole or in pieces, packed or not, its head spoilt at times."""
    if random.random() < 0.1:
        pieces = [body[start : start + 50] for start in range(0, len(body), 50)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        lines["Transfer-Encoding"] = "chunked"
    if "Transfer-Encoding" not in lines or random.random() < 0.2:
        lines["Content-Length"] = str(len(body))
    if random.random() < 0.1:
        lines[random.choice(("Content-Encoding", "Expect", "Upgrade", "Connection", "X" * 20_000))] = random.choice(
            ("gzip", "deflate", "100-continue", "websocket", "close", "upgrade", "\xff", "")
        )
    method = "GET" if path in ("config", "ready") else "POST"
    head = f"{method} /v2/models/m/{path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n"
    spoilt = mutations.mutate_bytes(head.encode("latin-1"), random) if random.random() < 0.4 else head.encode("latin-1")
    return spoilt + body


class _Faults(logging.Handler):
    """Keeps what the server logs of faults of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage()[:300] + (f" {record.exc_info[1]!r:.300}" if record.exc_info else ""))


def _ask_server(exported: OnnxFile) -> Callable[[bytes, Path], None]:
    """Return what sends a request to a server, which runs in a thread from the first one on."""
    running: dict[str, Any] = {}

    def ask(case: bytes, _folder: Path) -> None:
        if not running:
            running.update(_start_server(exported))
        faults: list[str] = running["faults"].messages
        answer = _exchange(running["port"], case)
        if faults:
            fault = faults.pop()
            faults.clear()
            raise NoAnswerError(fault)
        status = answer[9:12]
        if answer and (not answer.startswith(b"HTTP/1.1 ") or (status[:1] == b"5" and status != b"503")):
            raise NoAnswerError(repr(answer[:100]))
        if status[:1] != b"2":
            raise KeyedXAIError(repr(answer[:100]))

    return ask


def _start_server(exported: OnnxFile) -> dict[str, Any]:
    settings, metrics = ServeSettings(), Metrics()
    runtime = Runtime(exported, device="cpu", threads=1)
    service = Service(settings=settings, models={"m": ServedModel("m", runtime, settings, metrics)}, metrics=metrics)
    bind = BindAddress(port=0)
    server, listener, faults = make_server(service, bind), listen(bind), _Faults()
    logging.getLogger().addHandler(faults)
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    return {"port": listener.getsockname()[1], "faults": faults}


def _exchange(port: int, request: bytes) -> bytes:
    """Return the first bytes of the answer; none where the server hangs up without one, or waits for more."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, suppress(ConnectionError):
        connection.sendall(request)
        connection.settimeout(ANSWER_SECONDS)
        with suppress(TimeoutError):
            return connection.recv(200)
        connection.settimeout(30)
        with suppress(OSError):  # it may have hung up by now
            connection.shutdown(socket.SHUT_WR)
        return connection.recv(200)
    return b""
