"""HTTP to hostile servers: no answer takes more bytes or time than it was given."""

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from keyed_xai.inference.transport import Connection, ServerError, is_exposed, split_model_url, split_url

FINE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 503 Busy\r\nRetry-After: %s\r\nContent-Length: 4\r\n\r\nbusy"
PLAIN = b"HTTP/1.1 200 OK\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@contextmanager
def speaking(*visits):
    """The port of a server that takes as many connections; each is a list of answers, None hangs up without one."""
    stop = threading.Event()

    def serve():
        try:
            for answers in visits:
                with listener.accept()[0] as peer:
                    for answer in answers:
                        if not peer.recv(2**16) or answer is None:
                            break
                        for piece in [answer] if isinstance(answer, bytes) else answer:
                            peer.sendall(piece)
                            if stop.is_set():
                                return
        except OSError:
            pass  # the client hung up, or was never going to call

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            stop.set()
            thread.join(10)
    assert not thread.is_alive()


@contextmanager
def connected(port, timeout=10.0):
    connection = Connection(f"http://127.0.0.1:{port}", timeout, {})
    try:
        yield connection
    finally:
        connection.close()


def drip(start, piece=b"x"):
    """A beginning, and then a little now and then, without end."""
    yield start
    while True:
        time.sleep(0.05)
        yield piece


def flood(start, piece):
    yield start
    while True:
        yield piece


class TestLimits:
    def test_answer_of_the_largest_size_is_read(self):
        with speaking([FINE]) as port, connected(port) as connection:
            answer = connection.ask("/", limit=2)
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"ok", "2")

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n" + bytes(101),
            b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n" + bytes(2**15),
            flood(PLAIN, bytes(2**14)),
            flood(CHUNKED, b"4000\r\n" + bytes(2**14) + b"\r\n"),
        ],
    )
    def test_larger_answer_is_refused(self, answer):
        with (
            speaking([answer]) as port,
            connected(port) as connection,
            pytest.raises(ServerError, match="more than 100 bytes"),
        ):
            connection.ask("/", limit=100)

    @pytest.mark.parametrize(
        "start", [b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nA: ", PLAIN, CHUNKED + b"100000\r\n", CHUNKED], ids=repr
    )
    def test_dripping_server_is_given_up(self, start):
        with speaking([drip(start, b"0" if start == CHUNKED else b"x")]) as port, connected(port, 0.5) as connection:
            begin = time.monotonic()
            with pytest.raises(ServerError, match="did not finish its answer in 0.5 seconds"):
                connection.ask("/", limit=10**6)
            assert 0.4 < time.monotonic() - begin < 3

    def test_server_that_does_not_read_is_given_up(self):
        with socket.create_server(("127.0.0.1", 0)) as listener, connected(listener.getsockname()[1], 0.5) as deaf:
            begin = time.monotonic()
            with pytest.raises(ServerError, match="said nothing for 0.5 seconds"):
                deaf.ask("/", limit=10, body=bytes(2**25))
            assert 0.4 < time.monotonic() - begin < 3

    @pytest.mark.parametrize("body", [b"Content-Length: 9\r\n\r\nok", b"Transfer-Encoding: chunked\r\n\r\n9\r\nok"])
    def test_half_an_answer_is_refused(self, body):
        with (
            speaking([b"HTTP/1.1 200 OK\r\n" + body]) as port,
            connected(port) as connection,
            pytest.raises(ServerError, match="Cannot talk to"),
        ):
            connection.ask("/", limit=100)

    def test_packed_answer_is_refused(self):
        answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: x\x1b[2J\r\nContent-Length: 2\r\n\r\nok"
        with (
            speaking([answer]) as port,
            connected(port) as connection,
            pytest.raises(ServerError, match="packs its answer") as caught,
        ):
            connection.ask("/", limit=100)
        assert str(caught.value).isprintable()


class TestPatience:
    def test_requests_share_a_connection(self):
        with speaking([FINE, FINE, FINE]) as port, connected(port) as connection:
            assert [connection.ask("/", limit=9).body for _ in range(3)] == [b"ok"] * 3

    def test_connection_closed_while_idle_is_opened_again(self):
        with speaking([FINE], [FINE, None], [FINE]) as port, connected(port) as connection:
            for _ in range(3):
                assert connection.ask("/", limit=9, body=b"x").body == b"ok"
                time.sleep(0.05)

    def test_new_connection_that_is_closed_is_an_error(self):
        with speaking([FINE], [None], [FINE]) as port, connected(port) as connection:
            connection.ask("/", limit=9)
            time.sleep(0.05)
            with pytest.raises(ServerError, match="Cannot talk to"):
                connection.ask("/", limit=9)
            assert connection.ask("/", limit=9).body == b"ok"

    def test_busy_server_is_asked_again_when_it_says(self):
        with speaking([BUSY % b"1", BUSY % b"0", FINE]) as port, connected(port) as connection:
            begin = time.monotonic()
            assert connection.ask("/", limit=9).body == b"ok"
            assert 1 <= time.monotonic() - begin < 5

    @pytest.mark.parametrize("after", [b"11", b"99999999", b"soon", b"-1"])
    def test_wait_beyond_the_time_is_a_refusal(self, after):
        with speaking([BUSY % after, FINE]) as port, connected(port) as connection:
            begin = time.monotonic()
            assert connection.ask("/", limit=9).status == 503
            assert time.monotonic() - begin < 3


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "exposed"),
        [
            ("http://127.0.0.1:8000", False), ("http://127.9.9.9", False), ("http://[::1]:1/a", False),
            ("http://localhost", False), ("http://LOCALHOST", False), ("https://models.example", False),
            ("http://models.example", True), ("http://10.0.0.1", True), ("http://[fe80::1]", True),
            ("http://localhost.example", True), ("http://127.0.0.1.example", True),
        ],
    )  # fmt: skip
    def test_plain_http_off_this_machine_is_exposed(self, url, exposed):
        assert is_exposed(url) is exposed

    def test_password_is_never_quoted(self):
        for url in ("https://user:hunter2@h:1?x=1", "user:hunter2@h", "http://user:hunter2@[", "http://u:hunter2@h:x"):
            with pytest.raises(ValueError, match="no user or password") as caught:
                split_url(url)
            assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://h/api/v2/models/m", ("https://h/api", "m")),
        ("https://h/v2/models/v2/models/m", ("https://h/v2/models", "m")),
        ("https://h/v2/models", ("https://h", None)),
        ("https://h/v2/models/m/infer", ("https://h/v2/models/m/infer", None)),
        ("https://h/v22", ("https://h/v22", None)),
        ("https://h/v2//", ("https://h", None)),
    ],
)
def test_model_is_taken_from_the_end_of_an_address(url, expected):
    assert split_model_url(url) == expected
