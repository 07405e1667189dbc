"""The server process: it listens, and stops without losing a request.

Told to stop (SIGTERM, SIGINT, Ctrl+C), it is no longer ready and refuses new requests, but finishes those it has within
the time of grace, their answers sent. Told twice, it stops at once.

Limits: a request's head, its body and its answer each have a time limit, and a body in pieces a limit to their number.
A request that says its length in two ways is refused: what stands before the server may have believed the other one.
Past the most connections every request is refused. Memory that large requests took goes back to the system.
"""

import asyncio
import ctypes
import logging
import socket
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from keyed_xai.errors import KeyedXAIError
from keyed_xai.serving.app import make_app
from keyed_xai.serving.service import Service

_BACKLOG = 2048  # connections that wait to be accepted
_KEEP_ALIVE = 75  # seconds; longer than the 60 after which common proxies drop idle connections themselves
_SPARE = 256  # connections beyond those that requests may need, for probes and idle clients
_HEAD_SECONDS = 60.0
_FREE_PIECES = 1024
_LEAST_PIECE = 4096  # bytes, of the pieces of a body beyond the free ones, on average
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of malloc.h
_LARGE_BLOCK = 2**20  # bytes
_FAREWELL = 3  # seconds for answers still on their way once the time of grace is over


@dataclass(frozen=True, kw_only=True)
class BindAddress:
    """Where a server listens.

    Attributes:
        host: Name or address.
        port: 0 for any that is free.
        certificate: PEM file, for HTTPS; None for plain HTTP.
        private_key: PEM file of the certificate's key; None if it is in the same file.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    private_key: Path | None = None


class _Connection(h11.Connection):
    """Requests read from a connection's bytes; refused where they are ambiguous, or cost more time than they hold."""

    _bytes = _pieces = 0

    def next_event(self) -> Any:  # noqa: ANN401 - h11's own: an event, or one of two classes that mark its lack
        """Return what comes next.

        Raises:
            RemoteProtocolError: The request is malformed or refused; the client gets a 400.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._bytes = self._pieces = 0
            names = {name for name, _ in event.headers}
            if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
                raise h11.RemoteProtocolError("Expected Content-Length, or Transfer-Encoding in HTTP/1.1; got both.")
        if isinstance(event, h11.Data):
            self._bytes, self._pieces = self._bytes + len(event.data), self._pieces + event.chunk_end
            if self._pieces > _FREE_PIECES + self._bytes // _LEAST_PIECE:
                raise h11.RemoteProtocolError("Expected a body in fewer pieces.")
        return event


class _Protocol(H11Protocol):
    """A connection that counts an answer as sent once no byte of it is left here, and lets the application cut it."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.conn = _Connection(h11.SERVER)
        self._time_head()
        transport.set_write_buffer_limits(1, 0)  # 0 would halt TLS for good: it compares with "at least"
        self.app_state = {**self.app_state, "abort": transport.abort}

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_head()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request; where its answer is on its way already, end the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # so that the application, which has begun, does not answer a second time
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def _time_head(self) -> None:
        """Let the connection end once its head takes too long; between requests `timeout_keep_alive` does that."""
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(_HEAD_SECONDS, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class Server(uvicorn.Server):
    """A uvicorn server that first lets a service finish.

    Source: uvicorn closes its door before its requests are done, and ends by the signal that it got; this one answers
    until they are, and returns.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        """Serve a service's application."""
        super().__init__(config)
        self._service = service
        self._deadline = float("inf")

    def stop(self) -> None:
        """Refuse new requests, finish those inside within the time of grace, then stop. From any thread."""
        if not self._service.stopping:
            self._deadline = time.monotonic() + self._service.settings.grace
            self._service.stopping = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Stop; at once when told for the second time."""
        self.should_exit = self.force_exit = self._service.stopping
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to close the door; called ten times a second."""
        if await super().on_tick(counter):
            return True
        if not self._service.stopping:
            return False
        self._service.flush()
        return self._service.idle or time.monotonic() >= self._deadline


def make_server(service: Service, bind: BindAddress, *, access_log: bool = False) -> Server:
    """Return a server that is not running yet.

    Raises:
        KeyedXAIError: The certificate cannot be used.
    """
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs as errors what malformed pictures of clients have
    if access_log:
        _log_access()
    config = uvicorn.Config(
        make_app(service),
        http=_Protocol,
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=access_log,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        limit_concurrency=_SPARE + 4 * service.settings.max_queue * len(service.models),
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_FAREWELL,
        ssl_certfile=bind.certificate,
        ssl_keyfile=bind.private_key,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise KeyedXAIError(f"The certificate cannot be used: {error.strerror or error}.") from error
    return Server(config, service)


def listen(bind: BindAddress) -> socket.socket:
    """Return a socket that takes connections.

    Raises:
        KeyedXAIError: The address is unknown or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            bind.host, bind.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":  # there it would let two servers share a port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise KeyedXAIError(f"Cannot listen on {bind.host}, port {bind.port}: {error.strerror}.") from error
    return listener


def serve(service: Service, bind: BindAddress, *, on_ready: Callable[[str], None], access_log: bool = False) -> None:
    """Serve until a signal says stop, then close the service.

    Args:
        service: What is served.
        bind: Address to listen on.
        on_ready: Called with the URL once connections are taken.
        access_log: Write a line for each request to standard error.

    Raises:
        KeyedXAIError: The certificate or the address cannot be used.
    """
    _return_memory_early()
    try:
        server = make_server(service, bind, access_log=access_log)
        with listen(bind) as listener, server.capture_signals():  # so that none comes too early
            on_ready(_url(bind, listener))
            server.run(sockets=[listener])
    finally:
        service.close()


def _return_memory_early() -> None:
    """Have large blocks of memory go back to the system once they are free. Does nothing where libc is not glibc.

    Source: mallopt(3). Without it, glibc takes the size of the largest block ever freed for the usual one, and keeps as
    much.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            libc.mallopt(parameter, _LARGE_BLOCK)


def _url(bind: BindAddress, listener: socket.socket) -> str:
    scheme = "https" if bind.certificate else "http"
    host = f"[{bind.host}]" if ":" in bind.host else bind.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def _log_access() -> None:
    logger = logging.getLogger("uvicorn.access")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler())
