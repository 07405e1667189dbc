"""HTTP to a server that may be hostile: every answer is bounded in bytes and in time.

Nothing is unpacked and no redirect is followed. A busy server (503 with Retry-After) is asked again a few times, and
a connection that the server closed between two requests is opened anew, both within the time of the request.
"""

import io
import re
import ssl
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from ipaddress import ip_address
from socket import socket
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import certifi

from keyed_xai.artifacts.documents import printable
from keyed_xai.errors import KeyedXAIError

_RETRIES = 5  # of a request that a busy server turned away
_LONGEST_WAIT = 86400.0  # seconds; sockets take no more than some weeks
_PIECE = 2**14  # bytes; what one record of TLS holds
_LONGEST_QUOTE = 300
_PROTOCOL_PATH = re.compile(r"/v2(?:/models(?:/(?P<model>[^/]+))?)?/*$")


class ServerError(KeyedXAIError):
    """A server cannot be reached, refuses a request, or answers with something unexpected.

    Attributes:
        status: The HTTP status, such as "404"; "" if there was no answer.
    """

    def __init__(self, message: str, status: str = "") -> None:
        """Take a message and a status."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """What a server sent back.

    Attributes:
        status: The HTTP status.
        headers: Their names in small letters.
        body: Content, as it was sent.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def wait(self) -> float | None:
        """Seconds after which a busy server wants to be asked again; None if it is not busy, or does not say."""
        said = self.headers.get("retry-after", "").strip()
        fits = self.status == 503 and said.isascii() and said.isdigit() and len(said) < 6
        return float(said) if fits else None


class Connection:
    """A connection to a server, kept open between requests. For one thread.

    Attributes:
        url: Address as the user wrote it.
        timeout: Seconds for one request with its answer.
    """

    def __init__(self, url: str, timeout: float, headers: Mapping[str, str]) -> None:
        """Take where the server is; the first request connects.

        Raises:
            ValueError: The URL or a header is malformed.
        """
        parts = split_url(url)
        if any(not (text.isascii() and text.isprintable()) for pair in headers.items() for text in pair):
            raise ValueError("headers: expected names and values in ASCII, without control characters")
        self.url, self.timeout = url, timeout
        self._headers, self._path = dict(headers), parts.path.rstrip("/")
        self._http = _open(parts)
        self._socket: _TimedSocket | None = None
        weakref.finalize(self, self._http.close)

    def close(self) -> None:
        """Hang up; a further request connects anew."""
        self._http.close()
        self._socket = None

    def ask(
        self, path: str, *, limit: int, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Return the answer to a GET or, with a body, a POST.

        Args:
            path: Below the URL, such as "/v2".
            limit: Bytes of the answer's body, at most.
            body: Content to send.
            headers: Further headers.

        Raises:
            ServerError: There is no answer within the time, or one that is too large or packed.
        """
        ends = time.monotonic() + self.timeout
        request = _Request(path=self._path + path, body=body, headers={**self._headers, **(headers or {})}, limit=limit)
        try:
            return self._ask_patiently(request, ends)
        except TimeoutError as error:
            said = "did not finish its answer in" if self._socket and self._socket.heard else "said nothing for"
            self.close()
            raise ServerError(f"{self.url} {said} {self.timeout:g} seconds. Pass a longer timeout.") from error
        except (OSError, HTTPException, ValueError) as error:
            self.close()
            raise ServerError(f"Cannot talk to {self.url}: {quote(str(error))}. Does the server run there?") from error
        except ServerError:
            self.close()
            raise

    def _ask_patiently(self, request: "_Request", ends: float) -> Answer:
        """Return the answer, of a busy server the one to a later try."""
        answer = self._ask_once(request, ends)
        for _ in range(_RETRIES):
            wait = answer.wait
            if wait is None or time.monotonic() + wait >= ends:
                break
            time.sleep(wait)
            answer = self._ask_once(request, ends)
        return answer

    def _ask_once(self, request: "_Request", ends: float) -> Answer:
        """Return the answer; where an old connection turns out to be closed, over a new one."""
        old = self._socket is not None and self._http.sock is not None
        try:
            response = self._send(request, ends)
        except (ConnectionError, ssl.SSLEOFError):
            self.close()
            if not old:
                raise
            response = self._send(request, ends)
        with response:
            return self._read(response, request.limit)

    def _send(self, request: "_Request", ends: float) -> HTTPResponse:
        """Return the answer's head."""
        if self._http.sock is None or self._socket is None:
            self._http.timeout = _left(ends)
            self._http.connect()
            self._socket = _TimedSocket(self._http.sock, ends)
            self._http.sock = self._socket
        self._socket.ends, self._socket.heard = ends, False
        method = "GET" if request.body is None else "POST"
        self._http.request(method, request.path, request.body, request.headers)
        return self._http.getresponse()

    def _read(self, response: HTTPResponse, limit: int) -> Answer:
        """Return an answer whole.

        Raises:
            ServerError: It is too large or packed.
        """
        headers = {name.lower(): value for name, value in response.getheaders()}
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ServerError(
                f"{self.url} packs its answer, which nobody asked for: {quote(headers['content-encoding'])}."
            )
        body = bytearray()
        while piece := response.read(_PIECE):
            body += piece
            if len(body) > limit:
                raise ServerError(f"{self.url} answers with more than {limit} bytes, the most that is read here.")
        if response.length:
            raise IncompleteRead(b"", response.length)
        return Answer(response.status, headers, bytes(body))


def split_url(url: str) -> SplitResult:
    """Return the parts of a server's URL.

    Raises:
        ValueError: It is no such URL; a password in it is not quoted.
    """
    if "@" in url:
        raise ValueError("url: expected no user or password in it; pass headers={'Authorization': ...}")
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets and ports
        fits = False
    if not fits or parts.query or parts.fragment or not parts.path.isascii() or " " in url or not url.isprintable():
        raise ValueError(f"url: expected http://HOST:PORT or https://HOST:PORT, perhaps with a path, got {url!r}")
    return parts


def split_model_url(url: str) -> tuple[str, str | None]:
    """Return a server's URL and the model's name in it, None without one.

    Taken are http://HOST:PORT, the same with /v2 as servers print it, and with /v2/models/NAME; below a path, perhaps.

    Raises:
        ValueError: It is no URL of a server.
    """
    path = split_url(url).path
    found = _PROTOCOL_PATH.search(path)
    if found is None:
        return url, None
    name = unquote(found["model"], errors="strict") if found["model"] else None
    return url[: len(url) - len(path) + found.start()], name


def is_exposed(url: str) -> bool:
    """Return whether what is sent to a URL can be read on the way: plain http that leaves this machine."""
    parts = split_url(url)
    host = parts.hostname or ""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost" or host.endswith(".localhost")
    return parts.scheme == "http" and not local


def quote(text: str) -> str:
    """Return a server's words, on one line and not too many."""
    shown = printable(" ".join(text[: 4 * _LONGEST_QUOTE].split()))
    return shown if len(shown) <= _LONGEST_QUOTE else shown[:_LONGEST_QUOTE] + "..."


@dataclass(frozen=True, kw_only=True)
class _Request:
    path: str
    body: bytes | None
    headers: Mapping[str, str]
    limit: int


class _TimedSocket:
    """What http.client needs of a socket, with one time limit over all that is sent and received.

    Attributes:
        ends: When to give up, on the clock of `time.monotonic`.
        heard: Whether anything was received.
    """

    def __init__(self, wrapped: socket, ends: float) -> None:
        self._wrapped, self.ends, self.heard = wrapped, ends, False

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            self.limit_time()
            self._wrapped.sendall(view[start : start + _PIECE])

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self, self._wrapped.makefile("rb", buffering=0)))

    def limit_time(self) -> None:
        """Let the next call of the socket take what is left.

        Raises:
            TimeoutError: Nothing is.
        """
        self._wrapped.settimeout(_left(self.ends))

    def close(self) -> None:
        self._wrapped.close()


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: _TimedSocket, raw: io.RawIOBase) -> None:
        super().__init__()
        self._timed, self._raw = timed, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 - any buffer
        self._timed.limit_time()
        count = self._raw.readinto(buffer)
        self._timed.heard = self._timed.heard or bool(count)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _open(parts: SplitResult) -> HTTPConnection:
    host = parts.hostname or ""
    if parts.scheme == "http":
        return HTTPConnection(host, parts.port or 80)
    authorities = ssl.get_default_verify_paths().cafile or certifi.where()
    return HTTPSConnection(host, parts.port or 443, context=ssl.create_default_context(cafile=authorities))


def _left(ends: float) -> float:
    """Return the seconds left.

    Raises:
        TimeoutError: None are.
    """
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError("out of time")
    return min(left, _LONGEST_WAIT)
