"""The server process: broken or slow HTTP, the connections it takes, HTTPS, and how it stops."""

import http.client
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from keyed_xai.errors import KeyedXAIError
from keyed_xai.serving import server as server_module
from keyed_xai.serving.server import BindAddress, listen, make_server
from keyed_xai.serving.service import ServeSettings
from tests.asked import IMAGES, INFER, WIDE_BYTES, binary, infer, read_all, send, unread, until
from tests.served import Gated, Wide, gated, make_runtime, make_service, running


def ask_live(connection):
    """The body of the answer, over a connection that stays open."""
    connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer.read()


@contextmanager
def stopping(grace):
    """The run of a server that is told to stop while a client has not read its answer, and that client's connection."""
    service = make_service({"bird": make_runtime(Wide)}, ServeSettings(grace=grace))
    server = make_server(service, BindAddress(port=0))
    with listen(BindAddress(port=0)) as listener, ThreadPoolExecutor(1) as pool:
        serving = pool.submit(server.run, [listener])
        with unread(f"127.0.0.1:{listener.getsockname()[1]}") as connection:
            until(lambda: service.held > WIDE_BYTES)
            server.stop()
            yield serving, connection
        serving.result(10)
        service.close()


class TestWrongRequests:
    @pytest.mark.parametrize(
        "head",
        [
            "HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked",
            "HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3",
            "HTTP/1.0\r\nTransfer-Encoding: chunked",
        ],
    )
    def test_length_said_in_two_ways_is_refused(self, address, head):
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"POST {INFER} {head}\r\n\r\n".encode() + b"3\r\nabc\r\n0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")

    def test_body_in_very_many_pieces_is_refused(self, address):
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            connection.sendall(b"1\r\nx\r\n" * 1025)  # and the last one never comes
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")

    def test_malformed_body_is_answered_once(self, address, caplog):
        host, _, port = address.partition(":")
        for path in (INFER, "/nowhere"):  # the application waits for the body, or has answered without it
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
                connection.sendall(head.encode() + b"no number\r\n")
                read_all(connection)
        assert send(address, "GET", "/v2/health/live")[0] == 200
        assert "Exception in ASGI application" not in caplog.text

    def test_slow_head_is_not_waited_for(self, monkeypatch):
        monkeypatch.setattr(server_module, "_HEAD_SECONDS", 0.2)
        with running(make_service({"bird": make_runtime()})) as address, ExitStack() as stack:
            host, _, port = address.partition(":")
            silent, half, idle = (
                stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(3)
            )
            half.sendall(b"GET /v2 HTTP/1.1\r\nHo")
            assert ask_live(idle) == b'{"live":true}'
            for connection in (silent, half):
                with suppress(ConnectionResetError):
                    assert connection.recv(100) == b""
            assert ask_live(idle) == b'{"live":true}'  # between requests it may wait

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(some.binary(max_size=200))
    def test_random_bytes_on_the_wire_never_break_the_server(self, address, data):
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(data + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1000)
        assert not answer or answer.startswith(b"HTTP/1.1 4")
        assert send(address, "GET", "/v2/health/live")[0] == 200


def test_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(server_module, "_SPARE", 0)
    with running(make_service({"bird": make_runtime()}, ServeSettings(max_queue=1))) as address, ExitStack() as stack:
        host, _, port = address.partition(":")
        assert send(address, "GET", "/v2/health/live")[0] == 200
        for _ in range(4):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            connection.sendall(b"GET /v2")  # half a head
        until(lambda: send(address, "GET", "/v2/health/live")[0] == 503)
        stack.close()
        until(lambda: send(address, "GET", "/v2/health/live")[0] == 200)


class TestStopping:
    def test_what_is_inside_is_finished_and_the_rest_refused(self):
        with gated(grace=20.0) as (runtime, address, service), ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(infer, address, IMAGES) for _ in range(2)]
            until(lambda: service.models["bird"].inside == 2)
            service.stopping = True
            assert send(address, "GET", "/v2/health/live")[0] == 200
            for path in ("/v2/health/ready", "/v2/models/bird/ready"):
                status, headers, _ = send(address, "GET", path)
                assert (status, headers["Connection"]) == (503, "close")
            assert infer(address, IMAGES) == (503, "The server is stopping.")
            runtime.gate.set()
            assert [each.result()[0] for each in waiting] == [200, 200]

    def test_requests_that_outlast_the_grace_are_told(self, monkeypatch):
        monkeypatch.setattr(server_module, "_FAREWELL", 0)
        runtime = make_runtime(Gated)
        service = make_service({"bird": runtime}, ServeSettings(grace=0.1))
        runtime.gate.clear()
        server = make_server(service, BindAddress(port=0))
        with listen(BindAddress(port=0)) as listener, ThreadPoolExecutor(4) as pool:
            serving = pool.submit(server.run, [listener])
            address = f"127.0.0.1:{listener.getsockname()[1]}"
            waiting = [pool.submit(infer, address, IMAGES) for _ in range(2)]
            until(lambda: service.models["bird"].inside == 2)
            server.stop()
            assert [each.result() for each in waiting] == [(503, "The server is stopping.")] * 2
            serving.result(10)
            runtime.gate.set()
            service.close()

    def test_telling_it_twice_does_not_wait(self):
        runtime = make_runtime(Gated)
        service = make_service({"bird": runtime}, ServeSettings(grace=100.0))
        runtime.gate.clear()
        server = make_server(service, BindAddress(port=0))
        with listen(BindAddress(port=0)) as listener, ThreadPoolExecutor(4) as pool:
            serving = pool.submit(server.run, [listener])
            waiting = pool.submit(infer, f"127.0.0.1:{listener.getsockname()[1]}", IMAGES)
            until(lambda: service.models["bird"].inside == 1)
            server.handle_exit(15, None)
            with pytest.raises(TimeoutError):
                serving.result(0.3)
            server.handle_exit(15, None)
            serving.result(10)
            assert waiting.result()[0] == 503
            runtime.gate.set()
            service.close()


class TestAnswersOnTheirWay:
    def test_they_outlive_a_stop_within_the_grace(self, monkeypatch):
        monkeypatch.setattr(server_module, "_FAREWELL", 0)
        with stopping(20.0) as (serving, connection):
            with pytest.raises(TimeoutError):
                serving.result(1)
            assert len(read_all(connection)) > WIDE_BYTES

    def test_those_that_outlast_the_grace_are_cut_off(self, monkeypatch, caplog):
        monkeypatch.setattr(server_module, "_FAREWELL", 0)
        with stopping(0.2) as (serving, connection):
            serving.result(10)
            assert len(read_all(connection)) < WIDE_BYTES
        assert "Traceback" not in caplog.text


class TestOpening:
    def test_ports_in_use_and_unknown_hosts_are_named(self):
        with listen(BindAddress(port=0)) as listener:
            port = listener.getsockname()[1]
            with pytest.raises(KeyedXAIError, match=f"Cannot listen on 127.0.0.1, port {port}: Address already in use"):
                listen(BindAddress(port=port))
        with pytest.raises(KeyedXAIError, match="Cannot listen on no.such.host.invalid"):
            listen(BindAddress(host="no.such.host.invalid", port=0))


class TestHttps:
    def test_it_answers_over_tls(self, certificate):
        service = make_service({"bird": make_runtime()})
        with running(service, certificate=certificate[0], private_key=certificate[1]) as address:
            context = ssl.create_default_context(cafile=str(certificate[0]))
            connection = http.client.HTTPSConnection(address, timeout=10, context=context)
            connection.request("POST", INFER, *binary(IMAGES))
            answer = connection.getresponse()
            assert answer.status == 200
            answer.read()
            connection.close()

    def test_unusable_certificate_is_named(self, tmp_path):
        (tmp_path / "c.pem").write_text("no certificate")
        service = make_service({})
        try:
            with pytest.raises(KeyedXAIError, match="certificate cannot be used"):
                make_server(service, BindAddress(certificate=tmp_path / "c.pem"))
        finally:
            service.close()
