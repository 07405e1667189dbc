"""The routes: clients of the protocol unchanged, wrong requests, many at once, and answers that nobody reads."""

import gzip
import http.client
import io
import json
import logging
import socket
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from PIL import Image
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from keyed_xai import __version__
from keyed_xai.artifacts.documents import validate
from tests.asked import IMAGES, INFER, WIDE_BYTES, binary, infer, metric, read_all, send, unread, until
from tests.served import CLASSES, LIMIT, SIZE, Wide, by_hand, gated, make_runtime, make_service, running


@pytest.fixture
def client(address):
    with triton.InferenceServerClient(address) as client:
        yield client


def triton_input(name, values, kind, **options):
    tensor = triton.InferInput(name, list(values.shape), kind)
    tensor.set_data_from_numpy(values, **options)
    return tensor


class TestTritonClient:
    def test_health_and_what_the_server_says_about_itself(self, client):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("bird")
        assert client.is_model_ready("bird", "1")
        assert not client.is_model_ready("bird", "2")
        assert not client.is_model_ready("cat")
        about = client.get_server_metadata()
        assert (about["name"], about["version"]) == ("keyed-xai", __version__)
        assert "binary_tensor_data" in about["extensions"]
        assert client.get_model_repository_index() == [
            {"name": name, "version": "1", "state": "READY"} for name in ("bird", "eight.bits", "vbp")
        ]

    def test_metadata_describe_the_graph(self, client):
        found = client.get_model_metadata("bird", "1")
        assert found["inputs"] == [
            {"name": "image", "datatype": "FP32", "shape": [-1, *SIZE]},
            {"name": "target", "datatype": "INT64", "shape": [-1, 1]},
        ]
        assert found["outputs"] == [
            {"name": "logits", "datatype": "FP32", "shape": [-1, CLASSES]},
            {"name": "saliency_gradcam", "datatype": "FP32", "shape": [-1, 8, 6]},
            {"name": "saliency_vbp", "datatype": "FP32", "shape": [-1, 8, 6]},
        ]
        assert found["versions"] == ["1"]
        assert client.get_model_metadata("eight.bits")["inputs"][0]["datatype"] == "UINT8"
        assert [each["name"] for each in client.get_model_metadata("vbp")["inputs"]] == ["image"]

    def test_configuration_holds_the_file_s_metadata(self, client, runtime):
        config = client.get_model_config("bird")
        assert (config["name"], config["platform"], config["max_batch_size"]) == ("bird", "onnxruntime_onnx", 8)
        image, target = config["input"]
        assert image == {"name": "image", "data_type": "TYPE_FP32", "dims": list(SIZE)}
        assert target["optional"]
        metadata = json.loads(config["parameters"]["keyed_xai"]["string_value"])["metadata"]
        validate(metadata, "onnx-metadata", origin="it")
        assert metadata == runtime.metadata

    @pytest.mark.parametrize("target", [None, [3, -1]])
    @pytest.mark.parametrize("as_bytes", [True, False])
    def test_results_are_those_of_the_runtime(self, client, runtime, as_bytes, target):
        inputs = [triton_input("image", IMAGES, "FP32", binary_data=as_bytes)]
        if target:
            inputs.append(triton_input("target", np.array(target)[:, None], "INT64", binary_data=as_bytes))
        outputs = [triton.InferRequestedOutput(name, binary_data=as_bytes) for name in runtime.output_names]
        found = client.infer("bird", inputs, outputs=outputs, request_id="mine")
        assert found.get_response()["id"] == "mine"
        assert found.get_response()["model_name"] == "bird"
        expected = runtime.run(IMAGES, None if target is None else np.array(target))
        for name, values in by_hand(IMAGES, target).items():
            np.testing.assert_array_equal(found.as_numpy(name), expected[name])
            np.testing.assert_allclose(found.as_numpy(name), values, atol=1e-5)

    def test_eight_bit_pixels_and_models_without_targets(self, client):
        pixels = np.round(255 * IMAGES).astype(np.uint8)
        found = client.infer("eight.bits", [triton_input("image", pixels, "UINT8")])
        expected = by_hand(pixels / 255)
        for name, values in expected.items():
            np.testing.assert_allclose(found.as_numpy(name), values, atol=1e-5)
        found = client.infer("vbp", [triton_input("image", IMAGES, "FP32")], model_version="1")
        np.testing.assert_allclose(found.as_numpy("saliency_vbp"), by_hand(IMAGES)["saliency_vbp"], atol=1e-5)

    def test_only_the_outputs_asked_for_come(self, client):
        outputs = [
            triton.InferRequestedOutput("saliency_vbp"),
            triton.InferRequestedOutput("logits", binary_data=False),
        ]
        found = client.infer("bird", [triton_input("image", IMAGES, "FP32")], outputs=outputs)
        assert [each["name"] for each in found.get_response()["outputs"]] == ["saliency_vbp", "logits"]
        assert found.as_numpy("saliency_gradcam") is None
        for name in ("saliency_vbp", "logits"):
            np.testing.assert_allclose(found.as_numpy(name), by_hand(IMAGES)[name], atol=1e-5)

    @pytest.mark.parametrize("packing", ["gzip", "deflate"])
    @pytest.mark.parametrize("as_bytes", [True, False])
    def test_packed_requests_and_answers(self, client, packing, as_bytes):
        found = client.infer(
            "bird",
            [triton_input("image", IMAGES, "FP32", binary_data=as_bytes)],
            outputs=[triton.InferRequestedOutput("saliency_gradcam", binary_data=as_bytes)],
            request_compression_algorithm=packing,
            response_compression_algorithm=packing,
        )
        expected = by_hand(IMAGES)["saliency_gradcam"]
        np.testing.assert_allclose(found.as_numpy("saliency_gradcam"), expected, atol=1e-5)

    def test_asynchronous_requests(self, address):
        with triton.InferenceServerClient(address, concurrency=4) as client:
            waiting = [client.async_infer("bird", [triton_input("image", IMAGES[:1], "FP32")]) for _ in range(8)]
            for each in waiting:
                logits = each.get_result().as_numpy("logits")
                np.testing.assert_allclose(logits, by_hand(IMAGES[:1])["logits"], atol=1e-5)

    def test_errors_reach_the_client_as_sentences(self, client):
        for images, expected in (
            (IMAGES * 2, "expected pixels from 0 to 1"),
            (np.zeros((9, *SIZE), np.float32), "expected 1 to 8 images in a request, got 9"),
            (np.zeros((8 * 16, *SIZE), np.float32), "expected a body of at most 1048576 bytes"),
        ):
            with pytest.raises(InferenceServerException, match=f"(?i){expected}"):
                client.infer("bird", [triton_input("image", images, "FP32")])
        with pytest.raises(InferenceServerException, match="There is no model 'cat' here"):
            client.infer("cat", [triton_input("image", IMAGES, "FP32")])

    def test_nothing_is_loaded_or_unloaded(self, client):
        for act in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="Not Found"):
                act("bird")
        assert client.is_model_ready("bird")


JSON_BODY = orjson.dumps(
    {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, *SIZE], "data": [0.5] * (3 * 32 * 24)}]}
)
SPOILT = some.builds(
    lambda place, bytes_: JSON_BODY[:place] + bytes_ + JSON_BODY[place + 1 :],
    some.integers(0, 80),
    some.binary(max_size=2),
)
WRONG = {
    "unknown path": ("GET", "/v3", None, {}, 404),
    "trailing slash": ("GET", "/v2/", None, {}, 404),
    "unknown model": ("POST", "/v2/models/cat/infer", JSON_BODY, {}, 404),
    "unknown version": ("POST", "/v2/models/bird/versions/2/infer", JSON_BODY, {}, 404),
    "metadata of an unknown model": ("GET", "/v2/models/..%2Fbird", None, {}, 404),
    "configuration of an unknown version": ("GET", "/v2/models/bird/versions/0/config", None, {}, 404),
    "load": ("POST", "/v2/repository/models/bird/load", b"{}", {}, 404),
    "wrong method": ("GET", INFER, None, {}, 405),
    "deleting": ("DELETE", "/v2/models/bird", None, {}, 405),
    "no body": ("POST", INFER, None, {}, 400),
    "no JSON": ("POST", INFER, b"image", {}, 400),
    "header length is text": ("POST", INFER, JSON_BODY, {"Inference-Header-Content-Length": "x"}, 400),
    "header length is negative": ("POST", INFER, JSON_BODY, {"Inference-Header-Content-Length": "-1"}, 400),
    "header length is in other digits": ("POST", INFER, JSON_BODY, {"Inference-Header-Content-Length": "\u00b2"}, 400),
    "header length is past the end": ("POST", INFER, JSON_BODY, {"Inference-Header-Content-Length": "9" * 18}, 400),
    "header length is too short": ("POST", INFER, JSON_BODY, {"Inference-Header-Content-Length": "9"}, 400),
    "no gzip": ("POST", INFER, JSON_BODY, {"Content-Encoding": "gzip"}, 400),
    "gzip that ends early": ("POST", INFER, gzip.compress(JSON_BODY)[:-9], {"Content-Encoding": "gzip"}, 400),
    "gzip with a tail": ("POST", INFER, gzip.compress(JSON_BODY) + b"x", {"Content-Encoding": "gzip"}, 400),
    "gzip as deflate": ("POST", INFER, gzip.compress(JSON_BODY), {"Content-Encoding": "deflate"}, 400),
    "gzip bomb": ("POST", INFER, gzip.compress(bytes(2**28), 9), {"Content-Encoding": "gzip"}, 413),
    "deflate bomb": ("POST", INFER, zlib.compress(bytes(2**28), 9), {"Content-Encoding": "deflate"}, 413),
    "unknown packing": ("POST", INFER, JSON_BODY, {"Content-Encoding": "br"}, 415),
    "too large": ("POST", INFER, bytes(LIMIT + 1), {}, 413),
    "no content type": ("POST", "/v2/models/bird/explain", b"x", {}, 415),
    "a form": ("POST", "/v2/models/bird/explain", b"x", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "no picture": ("POST", "/v2/models/bird/explain", b"x", {"Content-Type": "image/png"}, 400),
    "picture for nobody": ("POST", "/v2/models/cat/explain", b"x", {"Content-Type": "image/png"}, 404),
}  # fmt: skip


class TestWrongRequests:
    @pytest.mark.parametrize("case", WRONG)
    def test_status_and_sentence(self, address, case):
        method, path, body, headers, expected = WRONG[case]
        status, headers, body = send(address, method, path, body, headers)
        assert status == expected, body
        (message,) = json.loads(body).values()
        assert list(json.loads(body)) == ["error"]
        assert message.endswith(".")
        assert "Traceback" not in message
        assert headers["Content-Type"] == "application/json"

    def test_tiff_of_too_many_samples_is_refused_and_not_logged(self, address, caplog):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "TIFF")
        samples = struct.pack("<HHI", 277, 3, 1)  # tag SamplesPerPixel, a short, one of them
        assert samples in buffer.getvalue()
        place = buffer.getvalue().index(samples) + len(samples)
        picture = buffer.getvalue()[:place] + struct.pack("<H", 1027) + buffer.getvalue()[place + 2 :]
        status, _, _ = send(address, "POST", "/v2/models/bird/explain", picture, {"Content-Type": "image/tiff"})
        assert status == 400
        assert not caplog.records

    def test_chunked_body_over_the_limit_is_refused_while_it_comes(self, address):
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(LIMIT // 2**16 + 1):
                connection.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")  # the last chunk was never sent

    def test_announced_body_over_the_limit_is_refused_before_it_comes(self, address):
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {LIMIT + 1}\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")

    def test_body_in_pieces_is_put_together(self, address):
        body, headers = binary(IMAGES)
        pieces = (body[start : start + 1000] for start in range(0, len(body), 1000))
        status, _, _ = send(address, "POST", INFER, pieces, headers, encode_chunked=True)
        assert status == 200

    def test_slow_body_is_not_waited_for(self, monkeypatch):
        monkeypatch.setattr("keyed_xai.serving.app._BODY_SECONDS", 0.1)
        with running(make_service({"bird": make_runtime()})) as address:
            host, _, port = address.partition(":")
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n123".encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 408 ")

    def test_text_answers_are_packed_for_those_who_take_it(self, address):
        inputs = [{"name": "image", "datatype": "FP32", "shape": IMAGES.shape, "data": IMAGES.ravel().tolist()}]
        body = orjson.dumps({"inputs": inputs})
        status, headers, body = send(address, "POST", INFER, body, {"Accept-Encoding": "br, gzip"})
        assert (status, headers["Content-Encoding"]) == (200, "gzip")
        assert json.loads(gzip.decompress(body))["model_name"] == "bird"
        assert "Content-Encoding" not in send(address, "POST", INFER, JSON_BODY)[1]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        body=some.binary(max_size=300) | SPOILT,
        length=some.none() | some.integers(0, 400),
        packing=some.sampled_from(["identity", "gzip", "deflate"]),
        route=some.sampled_from(["infer", "explain"]),
    )  # fmt: skip
    def test_random_requests_never_break_the_server(self, address, body, length, packing, route):
        headers = {"Content-Encoding": packing, "Content-Type": "image/png"}
        if length is not None:
            headers["Inference-Header-Content-Length"] = str(length)
        packed = {"gzip": gzip.compress, "deflate": zlib.compress}.get(packing, bytes)(body)
        for sent in (body, packed):
            status, _, answer = send(address, "POST", f"/v2/models/bird/{route}", sent, headers)
            assert status in (200, 400, 415)
            assert status == 200 or json.loads(answer)["error"]


class TestManyAtOnce:
    def test_everybody_gets_his_own_answer_from_shared_batches(self):
        generator = np.random.default_rng(1)
        jobs = [generator.random((1 + number % 3, *SIZE), dtype=np.float32) for number in range(64)]
        targets = [None if number % 2 else [number % CLASSES] * len(images) for number, images in enumerate(jobs)]
        with gated(max_batch=16) as (runtime, address, _):
            with ThreadPoolExecutor(64) as pool:
                waiting = [pool.submit(infer, address, *job) for job in zip(jobs, targets, strict=True)]
                until(lambda: metric(address, "keyed_xai_in_flight_requests", model="bird") == 64)
                runtime.gate.set()
                found = [each.result() for each in waiting]
                again = list(pool.map(lambda job: infer(address, *job), zip(jobs, targets, strict=True)))
            assert metric(address, "keyed_xai_requests_total", model="bird", outcome="answered") == 128
            assert metric(address, "keyed_xai_images_total", model="bird") == 2 * sum(map(len, jobs))
            assert metric(address, "keyed_xai_batch_images_count", model="bird") < 80
            assert metric(address, "keyed_xai_queue_images", model="bird") == 0
        assert max(runtime.batches) > 13
        for images, target, *answers in zip(jobs, targets, found, again, strict=True):
            for status, outputs in answers:
                assert status == 200
                for name, values in by_hand(images, target).items():
                    np.testing.assert_allclose(outputs[name], values, atol=1e-5)

    def test_two_hundred_connections_at_once_lose_nothing(self, address):
        ready = threading.Barrier(200)
        body, headers = binary(IMAGES[:1])

        def ask():
            connection = http.client.HTTPConnection(address, timeout=30)
            ready.wait()
            statuses = []
            for _ in range(2):
                connection.request("POST", INFER, body, headers)
                answer = connection.getresponse()
                answer.read()
                statuses.append(answer.status)
            connection.close()
            return statuses

        with ThreadPoolExecutor(200) as pool:
            assert [each.result() for each in [pool.submit(ask) for _ in range(200)]] == [[200, 200]] * 200

    def test_requests_of_clients_that_left_do_not_run(self):
        with gated() as (runtime, address, service), ThreadPoolExecutor(2) as pool:
            first = pool.submit(infer, address, IMAGES)
            assert runtime.started.acquire(timeout=10)
            connection = http.client.HTTPConnection(address)
            connection.request("POST", INFER, *binary(np.zeros((5, *SIZE), np.float32)))
            until(lambda: service.models["bird"].batcher.waiting == 5)
            connection.close()
            until(lambda: metric(address, "keyed_xai_requests_total", model="bird", outcome="left") == 1)
            last = pool.submit(infer, address, IMAGES[:1])
            until(lambda: service.models["bird"].inside == 2)
            runtime.gate.set()
            assert (first.result()[0], last.result()[0]) == (200, 200)
            assert runtime.batches == [2, 1]

    def test_failing_request_fails_alone_and_tells_nothing(self, caplog):
        white = IMAGES[:1].copy()
        white[0, 0, 0, 0] = 1
        with gated() as (runtime, address, service), ThreadPoolExecutor(3) as pool:
            first = pool.submit(infer, address, IMAGES)
            assert runtime.started.acquire(timeout=10)
            waiting = [pool.submit(infer, address, images) for images in (white, IMAGES[1:])]
            until(lambda: service.models["bird"].batcher.waiting == 2)
            runtime.gate.set()
            (status, message), (neighbour, _) = [each.result() for each in waiting]
            assert (first.result()[0], status, neighbour) == (200, 500, 200)
            assert metric(address, "keyed_xai_requests_total", model="bird", outcome="failed") == 1
        assert "secret" not in message
        assert "/etc/secret is not there" in caplog.text


class TestAnswersOnTheirWay:
    @pytest.mark.parametrize("secure", [False, True])
    def test_client_that_does_not_read_is_cut_off(self, monkeypatch, caplog, certificate, secure):
        monkeypatch.setattr("keyed_xai.serving.app._ANSWER_SECONDS", 0.3)
        service = make_service({"bird": make_runtime(Wide)})
        bind = {"certificate": certificate[0], "private_key": certificate[1]} if secure else {}
        with running(service, **bind) as address, unread(address, bind.get("certificate")) as connection:
            until(lambda: service.held > WIDE_BYTES)
            until(lambda: service.idle)
            assert service.held == 0
            assert len(read_all(connection)) < WIDE_BYTES
            text = service.metrics.to_text().decode()
            assert 'keyed_xai_requests_total{model="bird",outcome="left"} 1.0' in text
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_logs_are_quiet_and_hold_no_pixels(caplog):
    caplog.set_level(logging.DEBUG)
    with running(make_service({"bird": make_runtime()})) as address:
        assert infer(address, IMAGES)[0] == 200
        assert send(address, "POST", INFER, b'{"inputs": [0.123456789]}')[0] == 400
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "0.123456789" not in caplog.text
