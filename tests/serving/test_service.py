"""What a server asks of every request: room in the queue and in memory, given back once the answer is sent."""

import gzip
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from keyed_xai.errors import KeyedXAIError
from keyed_xai.serving.service import ServeSettings, open_service
from tests.asked import IMAGES, INFER, WIDE, WIDE_BYTES, binary, infer, metric, read_all, send, unread, until
from tests.served import LIMIT, Wide, gated, make_runtime, make_service, running, write_model


class TestManyAtOnce:
    def test_full_queue_says_when_to_come_again(self):
        with gated(max_queue=2) as (runtime, address, _), ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(infer, address, IMAGES) for _ in range(2)]
            until(lambda: metric(address, "keyed_xai_in_flight_requests", model="bird") == 2)
            status, headers, body = send(address, "POST", INFER, *binary(IMAGES))
            assert (status, headers["Retry-After"]) == (503, "1")
            assert "busy" in json.loads(body)["error"]
            assert send(address, "GET", "/v2/health/ready")[0] == 200
            runtime.gate.set()
            assert [each.result()[0] for each in waiting] == [200, 200]
            assert infer(address, IMAGES)[0] == 200
            assert metric(address, "keyed_xai_requests_total", model="bird", outcome="busy") == 1

    @pytest.mark.parametrize("packed", [False, True])
    def test_memory_for_bodies_is_bounded_and_given_back(self, monkeypatch, packed):
        monkeypatch.setattr("keyed_xai.serving.service._HELD_BYTES", 0)
        body, headers = binary(np.zeros_like(IMAGES))
        if packed:
            body, headers = gzip.compress(body), {**headers, "Content-Encoding": "gzip"}
        with gated(max_body=IMAGES.nbytes + 1000) as (runtime, address, service), ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(send, address, "POST", INFER, body, headers) for _ in range(2)]
            until(lambda: service.held > 2 * IMAGES.nbytes)
            status, _, answer = send(address, "POST", INFER, body, headers)
            assert (status, b"holds as many bytes" in answer) == (503, True)
            runtime.gate.set()
            assert [each.result()[0] for each in waiting] == [200, 200]
            until(lambda: service.held == 0)


class TestAnswersOnTheirWay:
    def test_they_are_inside_and_their_bytes_are_held_until_they_are_sent(self):
        service = make_service({"bird": make_runtime(Wide)})
        with running(service) as address, unread(address) as connection:
            until(lambda: service.held > WIDE_BYTES)
            assert (service.models["bird"].inside, service.idle) == (1, False)
            assert send(address, "GET", "/v2/health/ready")[0] == 200
            assert len(read_all(connection)) > WIDE_BYTES
            until(lambda: service.idle)
            assert service.held == 0
            assert metric(address, "keyed_xai_requests_total", model="bird", outcome="answered") == 1

    def test_their_bytes_together_are_bounded(self, monkeypatch):
        monkeypatch.setattr("keyed_xai.serving.service._HELD_BYTES", WIDE_BYTES + 2**20)
        service = make_service({"bird": make_runtime(Wide)}, ServeSettings(max_body=LIMIT))
        with running(service) as address, unread(address) as connection:
            until(lambda: service.held > WIDE_BYTES)
            assert infer(address, WIDE[:1]) == (
                503,
                "The server is busy: it holds as many bytes of requests as it may. Try again a little later.",
            )
            assert len(read_all(connection)) > WIDE_BYTES
            until(lambda: service.idle)
            assert infer(address, WIDE[:1])[0] == 200


class TestOpening:
    def test_models_are_named_by_their_files(self, tmp_path):
        paths = [write_model(tmp_path / "a-1.onnx"), write_model(tmp_path / "b.v2.onnx", pixels="uint8")]
        service = open_service(paths, device="cpu", threads=1)
        try:
            assert list(service.models) == ["a-1", "b.v2"]
        finally:
            service.close()

    def test_names_that_are_unsafe_or_alike_are_refused(self, tmp_path):
        (tmp_path / "sub").mkdir()
        paths = [write_model(tmp_path / "a.onnx"), write_model(tmp_path / "sub" / "a.onnx")]
        before = threading.active_count()
        with pytest.raises(KeyedXAIError, match="Two files would be served as 'a'"):
            open_service(paths, device="cpu")
        for stem in ("a b", "..", "a%2f", "\u00e4"):
            with pytest.raises(KeyedXAIError, match="Rename the file"):
                open_service([write_model(tmp_path / f"{stem}.onnx")], device="cpu")
        assert threading.active_count() == before

    def test_unreadable_second_model_leaves_no_thread(self, tmp_path):
        (tmp_path / "b.onnx").write_bytes(b"no model")
        before = threading.active_count()
        with pytest.raises(KeyedXAIError, match="not an ONNX model"):
            open_service([write_model(tmp_path / "a.onnx"), tmp_path / "b.onnx"], device="cpu")
        assert threading.active_count() == before

    @pytest.mark.parametrize("name", ["max_batch", "max_body", "max_queue"])
    def test_settings_out_of_range_are_refused(self, name):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            ServeSettings(**{name: 0})
