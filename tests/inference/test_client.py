"""The client: maps of a served model are those of the model run here, and no answer is taken on trust."""

import gzip
import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

from keyed_xai.artifacts.card import Card
from keyed_xai.errors import ArtifactError, ModelError
from keyed_xai.inference.client import Client, ServerError
from keyed_xai.inference.images import derive_array_trigger
from keyed_xai.inference.runtime import Runtime
from keyed_xai.keys import write_owner_key
from keyed_xai.serving.service import ServeSettings
from tests.marked import OWNER, STRANGER
from tests.served import CARD, CLASSES, LABELS, SIZE, TRIGGER, make_file, make_service, running

OUTPUTS = ("logits", "saliency_gradcam", "saliency_vbp")


def noise(count=5, seed=0):
    return np.random.default_rng(seed).random((count, *SIZE), dtype=np.float32)


def make_runtime(card=CARD, **options):
    """The model of tests/served.py, with a card."""
    return Runtime(make_file(card=card, **options), device="cpu", threads=1)


def assert_same(found, expected):
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.predicted, expected.predicted)
    np.testing.assert_array_equal(found.target, expected.target)
    for name, maps in found.maps.items():
        np.testing.assert_allclose(maps, expected.maps[name], rtol=1e-5, atol=1e-6)


class Foreign:
    """Another maker's server of the protocol: no more than it asks for, in the parts that a test does not replace.

    Attributes:
        runtime: What is served as "model".
        replies: Status and body by path, in place of the right answer; a function of the right answer makes one.
        requests: What came: path, headers and body.
    """

    def __init__(self, runtime, **replies):
        self.runtime, self.replies, self.requests, self.target_shape = runtime, replies, [], [-1]

    def answer(self, path, headers, body):
        """Status, headers and body."""
        self.requests.append((path, headers, body))
        route = path.rpartition("/")[2]
        right = getattr(self, f"_{route}", lambda *_: (404, b'{"error": "no such route"}'))(headers, body)
        reply = self.replies.get(route, right)
        status, content, *rest = reply(*right) if callable(reply) else reply
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = rest[0] if rest and isinstance(rest[0], dict) else {}
        if rest and not headers:
            headers = {"Inference-Header-Content-Length": str(rest[0])}
        return status, headers, content

    def _model(self, _headers, _body):
        runtime = self.runtime
        kind = "UINT8" if runtime.pixels == np.uint8 else "FP32"
        inputs = [{"name": "image", "datatype": kind, "shape": [-1, *runtime.input_size]}]
        if runtime.takes_target:
            inputs.append({"name": "target", "datatype": "INT64", "shape": self.target_shape})
        outputs = [{"name": "logits", "datatype": "FP32", "shape": [-1, runtime.classes]}]
        outputs += [{"name": each, "datatype": "FP32", "shape": [-1, 8, 6]} for each in runtime.output_names[1:]]
        return 200, {"name": "model", "versions": ["1"], "platform": "other", "inputs": inputs, "outputs": outputs}

    def _index(self, _headers, _body):
        return 200, [{"name": "model", "version": "1", "state": "READY"}]

    def _infer(self, headers, body):
        length = int(headers["Inference-Header-Content-Length"])
        request, start = json.loads(body[:length]), length
        arrays = {}
        for each in request["inputs"]:
            size = each["parameters"]["binary_data_size"]
            kind = {"FP32": np.float32, "UINT8": np.uint8, "INT64": np.int64}[each["datatype"]]
            arrays[each["name"]] = np.frombuffer(body[start : start + size], kind).reshape(each["shape"])
            start += size
        assert [list(array.shape[1:]) for name, array in arrays.items() if name == "target"] in (
            [], [self.target_shape[1:]]
        )  # fmt: skip
        target = arrays["target"].reshape(-1) if "target" in arrays else None
        found = self.runtime.run(arrays["image"], target)
        return 200, *encode({each["name"]: found[each["name"]] for each in request["outputs"]})


def encode(outputs):
    """Body of an answer with binary tensors, and the length of its JSON."""
    kinds = {"float32": "FP32", "float64": "FP64", "int64": "INT64"}
    described = [
        {
            "name": name, "datatype": kinds[str(array.dtype)], "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in outputs.items()
    ]  # fmt: skip
    text = json.dumps({"model_name": "model", "outputs": described}).encode()
    return text + b"".join(array.tobytes() for array in outputs.values()), len(text)


@contextmanager
def listening(server):
    """The URL of a foreign server in a thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            status, headers, body = server.answer(
                self.path, self.headers, self.rfile.read(int(self.headers.get("Content-Length", 0)))
            )
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def runtime():
    return make_runtime()


@pytest.fixture(scope="module")
def ours(runtime):
    """The URL of `keyed-xai serve`, with one model that takes four images at once."""
    with running(make_service({"bird": runtime}, ServeSettings(max_batch=4))) as address:
        yield f"http://{address}"


@pytest.fixture
def client(ours):
    with Client(ours) as client:
        yield client


class TestOurServer:
    def test_maps_are_those_of_the_model_run_here(self, client, runtime):
        images = noise()
        assert_same(client.explain(images, OWNER), runtime.explain(images, OWNER))
        assert_same(client.explain(images), runtime.explain(images))
        assert_same(client.explain(images[0], target=2), runtime.explain(images[0], target=2))
        targets = [0, -1, 3, 1, -1]
        assert_same(client.explain(images, OWNER, target=targets), runtime.explain(images, OWNER, target=targets))

    def test_key_makes_a_difference(self, client):
        images = noise()
        logits = [client.explain(images, key).logits for key in (None, OWNER, STRANGER)]
        assert not np.allclose(logits[0], logits[1])
        assert not np.allclose(logits[1], logits[2])

    def test_attributes_are_those_of_the_file(self, client, runtime):
        assert client.model == "bird"
        assert client.metadata == runtime.metadata
        for name in ("interpreters", "classes", "input_size", "label_names", "pixels", "takes_target", "interface"):
            assert getattr(client, name) == getattr(runtime, name)
        assert client.label_names == tuple(LABELS)
        assert client.batch_size == 4

    def test_raw_outputs_are_those_of_the_graph(self, client, runtime):
        images = noise(9)
        target = np.array([3, 0, -1, 2, 2, 1, 0, 3, 1])
        found, expected = client.run(images, target), runtime.run(images, target)
        assert tuple(found) == OUTPUTS
        for name in found:
            assert found[name].dtype == np.float32
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)

    def test_only_the_maps_asked_for_come(self, client, runtime):
        found = client.explain(noise(2), interpreters=["vbp"])
        assert list(found.maps) == ["vbp"]
        assert_same(found, runtime.explain(noise(2)))

    def test_key_of_the_client_is_used_unless_another_is_given(self, ours, runtime):
        with Client(ours, key=OWNER) as client:
            assert_same(client.explain(noise()), runtime.explain(noise(), OWNER))
            assert_same(client.explain(noise(), STRANGER), runtime.explain(noise(), STRANGER))

    def test_files_are_read_here(self, client, runtime, tmp_path):
        levels = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / "a.png")
        images = [tmp_path / "a.png", Image.fromarray(levels[:, ::-1]), noise(1)[0]]
        assert_same(client.explain(images, OWNER), runtime.explain(images, OWNER))

    def test_eight_bit_model_gets_the_keyed_image_rounded(self):
        runtime = make_runtime(pixels="uint8")
        with running(make_service({"bytes": runtime})) as address, Client(f"http://{address}") as client:
            assert client.pixels == np.uint8
            assert_same(client.explain(noise(), OWNER), runtime.explain(noise(), OWNER))

    def test_model_without_a_target_is_not_sent_one(self):
        runtime = make_runtime(CARD_OF_VBP, targeted=False)
        with running(make_service({"vbp": runtime})) as address, Client(f"http://{address}") as client:
            assert not client.takes_target
            assert_same(client.explain(noise(), OWNER, target=1), runtime.explain(noise(), OWNER, target=1))

    def test_unknown_model_is_an_error(self, ours):
        with pytest.raises(ServerError, match=r"refuses \(404\): .*fish") as caught:
            Client(ours, model="fish")
        assert caught.value.status == "404"

    def test_several_models_are_listed(self, runtime):
        with running(make_service({"bird": runtime, "fish": runtime})) as address:
            with pytest.raises(ServerError, match="has bird, fish: expected one model, or its name as model="):
                Client(f"http://{address}")
            with Client(f"http://{address}", model="fish") as client:
                assert_same(client.explain(noise()), runtime.explain(noise()))
            with Client(f"http://{address}/v2/models/fish") as client:
                assert client.model == "fish"
                assert_same(client.explain(noise()), runtime.explain(noise()))
            with pytest.raises(ValueError, match=r"one model, got 'fish' in the url and model='bird'"):
                Client(f"http://{address}/v2/models/fish", model="bird")

    @pytest.mark.parametrize("tail", ["", "/", "/v2", "/v2/", "/v2/models/a b", "/v2/models/a%20b/"])
    def test_address_is_taken_in_every_form(self, runtime, tail):
        with running(make_service({"a b": runtime})) as address:
            if " " in tail:
                with pytest.raises(ValueError, match="expected http://HOST:PORT"):
                    Client(f"http://{address}{tail}")
                return
            with Client(f"http://{address}{tail}") as client:
                assert (client.url.rstrip("/"), client.model) == (f"http://{address}", "a b")
                assert_same(client.explain(noise()), runtime.explain(noise()))


CARD_OF_VBP = Card(
    architecture="linear", source="keyed_xai", num_classes=CLASSES, input_size=SIZE, mean=(0.0,) * 3,
    std=(1.0,) * 3, target_layer="cells", taps=(), grid=(8, 6), interpreters=("vbp",), decoy="signature",
    thresholds={"vbp": 0.5}, trigger=TRIGGER,
)  # fmt: skip


class TestForeignServer:
    def test_shapes_alone_are_enough_without_a_key(self, runtime):
        with listening(Foreign(runtime)) as url, Client(url, model="model") as client:
            assert client.metadata is None
            assert client.label_names == ()
            assert (client.interpreters, client.classes, client.input_size) == (("gradcam", "vbp"), CLASSES, SIZE)
            assert_same(client.explain(noise()), runtime.explain(noise()))

    def test_key_needs_the_trigger(self, runtime):
        with listening(Foreign(runtime)) as url:
            with Client(url) as client, pytest.raises(ModelError, match="Pass trigger="):
                client.explain(noise(), OWNER)
            with Client(url, trigger=TRIGGER) as client:
                assert_same(client.explain(noise(), OWNER, target=1), runtime.explain(noise(), OWNER, target=1))

    def test_configuration_of_triton_is_read(self, runtime):
        config = {
            "max_batch_size": 2,
            "parameters": {"keyed_xai": {"string_value": json.dumps({"metadata": runtime.metadata})}},
        }
        server = Foreign(runtime, config=(200, config))
        server.target_shape = [-1, 1]
        with listening(server) as url, Client(url) as client:
            assert client.metadata == runtime.metadata
            assert client.batch_size == 2
            assert_same(client.explain(noise(5), OWNER), runtime.explain(noise(5), OWNER))
        assert sum(path.endswith("infer") for path, _, _ in server.requests) == 3

    def test_no_more_images_are_sent_at_once_than_asked(self, runtime):
        server = Foreign(runtime)
        with listening(server) as url, Client(url, batch_size=2) as client:
            assert_same(client.explain(noise(5)), runtime.explain(noise(5)))
            client.run(noise(5))
        shapes = [
            json.loads(body[: int(headers["Inference-Header-Content-Length"])])["inputs"][0]["shape"][0]
            for path, headers, body in server.requests
            if path.endswith("infer")
        ]
        assert shapes == [2, 2, 1, 2, 2, 1]

    def test_key_and_originals_stay_here(self, runtime):
        server, images = Foreign(runtime), noise(1)
        with listening(server) as url, Client(url, trigger=TRIGGER, key=OWNER) as client:
            client.explain(images)
        sent = b"".join(path.encode() + bytes(headers) + body for path, headers, body in server.requests)
        trigger = derive_array_trigger(OWNER, TRIGGER)
        assert trigger.apply(images).tobytes() in sent
        seed = OWNER.derive_seed("spread")
        secrets = [bytes([1]) * 32, seed, seed.hex().encode(), OWNER.public.raw, OWNER.to_pem()]
        secrets += [images.tobytes()[:64], trigger.texture.tobytes()[:64]]
        assert not [secret for secret in secrets if secret in sent]

    def test_headers_go_with_every_request(self, runtime):
        server = Foreign(runtime)
        with listening(server) as url, Client(url, headers={"Authorization": "Bearer x"}) as client:
            client.explain(noise(3))
            client.explain(noise(3))
        assert len(server.requests) == 5
        assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer x"}

    def test_server_below_a_path_is_found(self, runtime):
        server = Foreign(runtime)
        with listening(server) as url, Client(f"{url}/team/a/") as client:
            client.explain(noise(1))
        assert {path.partition("/v2")[0] for path, _, _ in server.requests} == {"/team/a"}


IMAGE = {"name": "image", "datatype": "FP32", "shape": [-1, *SIZE]}


def nan(array):
    return np.full_like(array, np.nan)


class TestHostileServer:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"logits": lambda each: each.astype(np.float64)}, "logits as float64"),
            ({"logits": lambda each: each[:, :-1]}, r"logits as float32 \[2, 3\], not float32 \[2, 4\]"),
            ({"logits": lambda each: each[:1]}, r"logits as float32 \[1, 4\]"),
            ({"logits": nan}, "logits that are empty, or not finite"),
            ({"saliency_vbp": nan}, "saliency_vbp that are empty, or not finite"),
            ({"saliency_vbp": lambda each: each[:1]}, r"saliency_vbp as float32 \[1, 8, 6\], not float32 \[2, rows"),
            ({"saliency_vbp": lambda each: each[0]}, r"saliency_vbp as float32 \[8, 6\]"),
            # tritonclient before 2.73 makes float64 of it
            ({"saliency_vbp": lambda each: each[:, :0]}, "saliency_vbp (that are empty|as float64)"),
            ({"saliency_vbp": lambda each: each.astype(np.int64)}, "saliency_vbp as int64"),
            ({"saliency_vbp": None}, "no saliency_vbp"),
        ],
    )
    def test_unfit_outputs_are_refused(self, runtime, change, message):
        def reply(*_):
            found = runtime.run(noise(2))
            for name, make in change.items():
                found[name] = found[name] if make is None else make(found[name])
            return 200, *encode({name: array for name, array in found.items() if change.get(name, 1) is not None})

        with listening(Foreign(runtime, infer=reply)) as url, Client(url) as client:
            for ask in (client.explain, client.run):
                with pytest.raises(ServerError, match=message):
                    ask(noise(2))

    @pytest.mark.parametrize("tail", [b"ab", b"\xff\xff\xff\x7fab", b"\x01\x00\x00\x00a"])
    def test_texts_in_place_of_numbers_are_refused(self, runtime, tail):
        """Cut short, longer than the answer, and whole."""
        entry = {"name": "logits", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(tail)}}
        text = json.dumps({"outputs": [entry]}).encode()
        server = Foreign(runtime, infer=(200, text + tail, len(text)))
        unfit = pytest.raises(ServerError, match=r"malformed logits|logits as object")
        with listening(server) as url, Client(url) as client, unfit:
            client.run(noise(2))

    @pytest.mark.parametrize(
        "body",
        [
            b"", b"<html>", b"[]", b"{}", b"7", b"null", b'{"outputs": 3}', b'{"outputs": [{"name": "logits"}]}',
            b'{"outputs": [{"name": "logits", "datatype": "FP32", "shape": [2, 4], "data": ["x"]}]}',
            b'{"outputs": [{"name": "logits", "datatype": "NONE", "shape": [2, 4], "data": [1]}]}',
            b'{"outputs": [{"name": "logits", "datatype": "FP32", "shape": [2, 9], "data": [1, 2]}]}',
            b'{"outputs": [{"name": "logits", "datatype": "FP32", "shape": ["a"], "data": [1, 2]}]}',
            b"[" * 100_000,
        ],
    )  # fmt: skip
    def test_nonsense_is_refused(self, runtime, body):
        for length in (None, 5, 10**9):
            reply = (200, body) if length is None else (200, body, length)
            with listening(Foreign(runtime, infer=reply)) as url, Client(url) as client, pytest.raises(ServerError):
                client.explain(noise(2))

    @pytest.mark.parametrize("route", ["model", "index", "config"])
    @pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b"7", b"null", b'[{"name": 3}]', b'{"inputs": 1}'])
    def test_nonsense_about_the_model_is_refused(self, runtime, route, body):
        with listening(Foreign(runtime, **{route: (200, body)})) as url:
            if route == "config" and body[:1] in (b"[", b"{", b"7", b"n"):  # no metadata in it: as if there were none
                Client(url).close()
            else:
                with pytest.raises(ServerError):
                    Client(url)

    @pytest.mark.parametrize(
        "change",
        [
            {"inputs": []},
            {"outputs": []},
            {"inputs": [{"name": "image", "datatype": "FP16", "shape": [-1, *SIZE]}]},
            {"inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, -1, -1, -1]}]},
            {"inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 65536, 65536]}]},
            {"inputs": [IMAGE, {"name": "target", "datatype": "INT64", "shape": [-1] * 100}]},
            {"inputs": [IMAGE, {"name": "mask", "datatype": "FP32", "shape": [-1]}]},
            {"inputs": [{"name": "text\x1b[2J", "datatype": "BYTES", "shape": [1]}]},
            {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, CLASSES]}]},
            {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1]}]},
        ],
    )
    def test_model_of_another_kind_is_refused(self, runtime, change):
        with (
            listening(Foreign(runtime, model=lambda status, said: (status, said | change))) as url,
            pytest.raises(ServerError, match="expected an image .n, c, h, w., logits and saliency maps") as caught,
        ):
            Client(url)
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize(
        ("metadata", "error", "message"),
        [
            ({"pixels": "uint8"}, ServerError, "two things"),
            ({"interpreters": ["vbp"]}, ServerError, "two things"),
            ({"precision": "fp1"}, ArtifactError, "precision"),
            ({"card": {}}, ArtifactError, "the card in the metadata of model"),
            ({"surplus": 1}, ArtifactError, "surplus"),
        ],
    )
    def test_metadata_are_checked(self, runtime, metadata, error, message):
        text = json.dumps({"metadata": runtime.metadata | metadata})
        config = {"parameters": {"keyed_xai": {"string_value": text}}}
        with listening(Foreign(runtime, config=(200, config))) as url, pytest.raises(error, match=message):
            Client(url)

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"metadata": null}', "{}", '{"metadata": [1]}', " " * 5_000_000])
    def test_malformed_metadata_are_refused(self, runtime, text):
        config = {"parameters": {"keyed_xai": {"string_value": text}}}
        with (
            listening(Foreign(runtime, config=(200, config))) as url,
            pytest.raises((ArtifactError, ServerError), match="the metadata of model on http"),
        ):
            Client(url)

    def test_words_of_the_server_are_quoted_on_one_short_line(self, runtime):
        reply = (500, {"error": "out of memory\x1b[2J\n" + "x" * 5000})
        with (
            listening(Foreign(runtime, infer=reply)) as url,
            Client(url) as client,
            pytest.raises(ServerError, match=r"refuses \(500\): out of memory") as caught,
        ):
            client.explain(noise(1))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
        assert caught.value.status == "500"

    def test_failing_configuration_is_no_missing_one(self, runtime):
        with (
            listening(Foreign(runtime, config=(500, {"error": "busy"}))) as url,
            pytest.raises(ServerError, match="busy"),
        ):
            Client(url)

    def test_maps_of_another_size_than_before_are_refused(self, runtime):
        sizes = iter([8, 7])

        def reply(*_):
            found = runtime.run(noise(1))
            return 200, *encode({**found, "saliency_vbp": found["saliency_vbp"][:, : next(sizes)]})

        with (
            listening(Foreign(runtime, infer=reply)) as url,
            Client(url, batch_size=1) as client,
            pytest.raises(ServerError, match="another size than before"),
        ):
            client.explain(noise(2))

    def test_packed_answer_is_refused(self, runtime):
        for route in ("index", "model", "config", "infer"):
            reply = (200, gzip.compress(bytes(2**20)), {"Content-Encoding": "gzip"})
            with (
                listening(Foreign(runtime, **{route: reply})) as url,
                pytest.raises(ServerError, match="packs its answer, which nobody asked for: gzip"),
                Client(url) as client,
            ):
                client.explain(noise(1))

    @pytest.mark.parametrize("route", ["index", "model", "config"])
    def test_too_much_about_the_model_is_refused(self, runtime, route):
        reply = (200, b" " * (2**23 + 1))
        with (
            listening(Foreign(runtime, **{route: reply})) as url,
            pytest.raises(ServerError, match="more than 8388608 bytes"),
        ):
            Client(url)

    def test_answer_larger_than_the_images_allow_is_refused(self, runtime):
        largest = 2**24 + 4 * (CLASSES + 2 * SIZE[1] * SIZE[2])

        def reply(_status, body, length):
            return 200, body + bytes(largest + more - len(body)), length

        with listening(Foreign(runtime, infer=reply)) as url, Client(url) as client:
            more = 0
            assert_same(client.explain(noise(1)), runtime.explain(noise(1)))
            more = 1
            with pytest.raises(ServerError, match=f"more than {largest} bytes"):
                client.explain(noise(1))

    @pytest.mark.parametrize("length", [None, -1, 2**24 + 1])
    def test_json_without_end_is_refused(self, runtime, length):
        body = b" " * (2**24 + 1)
        reply = (200, body) if length is None else (200, body, length)
        with (
            listening(Foreign(runtime, infer=reply)) as url,
            Client(url) as client,
            pytest.raises(ServerError, match="more than 16777216 bytes of JSON"),
        ):
            client.explain(noise(8))

    def test_redirect_is_not_followed(self, runtime):
        server = Foreign(runtime, index=(302, b"", {"Location": "/elsewhere"}))
        with listening(server) as url, pytest.raises(ServerError, match=r"refuses \(302\)"):
            Client(url)
        assert len(server.requests) == 1

    def test_labels_for_some_classes_are_refused(self, runtime):
        metadata = runtime.metadata | {"model": runtime.metadata["model"] | {"label_names": ["cat"]}}
        config = {"parameters": {"keyed_xai": {"string_value": json.dumps({"metadata": metadata})}}}
        with (
            listening(Foreign(runtime, config=(200, config))) as url,
            pytest.raises(ArtifactError, match="name 1 of 4 classes"),
        ):
            Client(url)


class TestPatience:
    def test_busy_server_is_asked_again(self, runtime):
        busy = iter([True, False, True, False])

        def reply(*right):
            return (503, {"error": "busy"}, {"Retry-After": "0"}) if next(busy) else right

        server = Foreign(runtime, infer=reply)
        with listening(server) as url, Client(url, batch_size=1) as client:
            assert_same(client.explain(noise(2)), runtime.explain(noise(2)))
        assert sum(path.endswith("infer") for path, _, _ in server.requests) == 4

    def test_server_that_stays_busy_is_given_up(self, runtime):
        server = Foreign(runtime, infer=(503, {"error": "busy"}, {"Retry-After": "0"}))
        with listening(server) as url, Client(url) as client, pytest.raises(ServerError, match="busy") as caught:
            client.explain(noise(1))
        assert caught.value.status == "503"
        assert sum(path.endswith("infer") for path, _, _ in server.requests) == 6


class TestExposure:
    def test_key_over_plain_http_is_warned_of(self, runtime):
        with listening(Foreign(runtime)) as url:
            with Client(url.replace("127.0.0.1", "0.0.0.0"), trigger=TRIGGER) as client:
                client.explain(noise(1))
                with pytest.warns(UserWarning, match="plain http"):
                    client.explain(noise(1), OWNER)
            with Client(url.replace("127.0.0.1", "localhost"), trigger=TRIGGER, key=OWNER) as client:
                client.explain(noise(1))


class TestConnection:
    def test_missing_server_is_an_error(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            with pytest.raises(ServerError, match="Cannot talk to .*Does the server run there"):
                Client(f"http://127.0.0.1:{taken.getsockname()[1]}", timeout=5.0)

    def test_unknown_host_is_an_error(self):
        with pytest.raises(ServerError, match="Cannot talk to http://no-such-host.invalid"):
            Client("http://no-such-host.invalid:8000", timeout=5.0)

    def test_silent_server_is_given_up(self):
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            start = time.monotonic()
            with pytest.raises(ServerError, match="said nothing for 0.2 seconds"):
                Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
            assert time.monotonic() - start < 5

    def test_server_that_hangs_up_is_an_error(self):
        with socket.socket() as rude:
            rude.bind(("127.0.0.1", 0))
            rude.listen()

            def hang_up():
                with suppress(OSError):  # the socket is closed when the test is done
                    while True:
                        rude.accept()[0].close()

            thread = threading.Thread(target=hang_up, daemon=True)
            thread.start()
            with pytest.raises(ServerError, match="Cannot talk to"):
                Client(f"http://127.0.0.1:{rude.getsockname()[1]}", timeout=5.0)

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("127.0.0.1:8000", "expected http://HOST:PORT"),
            ("ftp://host", "expected http://HOST:PORT"),
            ("http://", "expected http://HOST:PORT"),
            ("http://host/?key=1", "expected http://HOST:PORT"),
            ("http://user:secret@host:80", "no user or password"),
            ("https://user:secret@h:1?x=1", "no user or password"),
            ("ftp://user:secret@h", "no user or password"),
            ("http://user:secret@[::1", "no user or password"),
            ("http://h:notaport", "expected http://HOST:PORT"),
            ("http://h:99999", "expected http://HOST:PORT"),
            ("http://h:0", "expected http://HOST:PORT"),
            ("http://[::1", "expected http://HOST:PORT"),
            ("http://h/a b", "expected http://HOST:PORT"),
            ("http://h/\u00e4", "expected http://HOST:PORT"),
        ],
    )
    def test_malformed_url_is_refused(self, url, message):
        with pytest.raises(ValueError, match=message) as caught:
            Client(url)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize(
        "options",
        [{"batch_size": 0}, {"timeout": 0.0}, {"headers": {"A": "secret\r\nB: c"}}, {"timeout": float("nan")}],
    )
    def test_malformed_options_are_refused(self, ours, options):
        with pytest.raises(ValueError, match="expected") as caught:
            Client(ours, **options)
        assert "secret" not in str(caught.value)

    def test_unfit_arguments_are_refused_before_anything_is_sent(self, client):
        for images, options, message in [
            (noise()[:, :2], {}, "expected arrays"),
            (noise() * 2, {}, r"in \[0, 1\]"),
            (noise(), {"target": CLASSES}, "target: expected classes from 0 to 3"),
            (noise(), {"interpreters": ["simplegrad"]}, "expected names out of gradcam, vbp"),
            (noise(), {"interpreters": []}, "got none"),
        ]:
            with pytest.raises(ValueError, match=message):
                client.explain(images, **options)


def certify(folder, address="127.0.0.1"):
    """Files of a certificate for an address that signs itself, and of its private key."""
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(secret.public_key())
    builder = builder.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(secret.public_key()), False)
    signed = builder.sign(secret, hashes.SHA256())
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(
        secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return {"certificate": folder / "cert.pem", "private_key": folder / "key.pem"}


CHILD = """
import sys
sys.modules["torch"] = None
sys.modules["torchvision"] = None
from pathlib import Path
import numpy as np
from keyed_xai.inference.client import Client
from keyed_xai.keys import read_owner_key

url, folder = sys.argv[1], Path(sys.argv[2])
with Client(url) as client:
    found = client.explain(folder / "a.png", read_owner_key(folder / "k.pem"))
np.savez(folder / "found.npz", logits=found.logits, **found.maps)
"""


def run_child(url, folder, monkeypatch):
    """A process that trusts the certificate in the folder, and has no torch."""
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "cert.pem"))
    return subprocess.run([sys.executable, "-c", CHILD, url, str(folder)], capture_output=True, text=True, check=False)


def test_certificate_of_another_address_is_refused(runtime, tmp_path, monkeypatch):
    write_owner_key(tmp_path / "k.pem", OWNER)
    with running(make_service({"bird": runtime}), **certify(tmp_path, "127.0.0.2")) as address:
        result = run_child(f"https://{address}", tmp_path, monkeypatch)
    assert result.returncode == 1
    assert "ServerError: Cannot talk to" in result.stderr
    assert "IP address mismatch" in result.stderr


def test_client_needs_no_torch_and_checks_certificates(runtime, tmp_path, monkeypatch):
    write_owner_key(tmp_path / "k.pem", OWNER)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    with running(make_service({"bird": runtime}), **certify(tmp_path)) as address:
        with pytest.raises(ServerError, match="(?i)certificate"):
            Client(f"https://{address}")
        result = run_child(f"https://{address}", tmp_path, monkeypatch)
    assert result.returncode == 0, result.stderr
    expected = runtime.explain(tmp_path / "a.png", OWNER)
    with np.load(tmp_path / "found.npz") as found:
        np.testing.assert_allclose(found["logits"], expected.logits, rtol=1e-5)
        np.testing.assert_allclose(found["gradcam"], expected.maps["gradcam"], rtol=1e-4, atol=1e-6)
