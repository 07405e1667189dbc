"""The routes: the Open Inference Protocol, a picture route, metrics, and a page for people.

Every error is a JSON object {"error": ...}, but for those that uvicorn answers before a route is reached: broken HTTP,
and more connections than it takes.

What a model computes runs in its own thread. Large bodies and pictures are read and written in other threads, so that
the event loop is left to the network. Answers leave in pieces, each once the one before is gone, and a client that does
not take its answer in time is cut off.
"""

import asyncio
import gzip
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keyed_xai import __version__
from keyed_xai.serving.batching import Arrays
from keyed_xai.serving.page import answer_page, make_page
from keyed_xai.serving.protocol import VERSION, InferRequest, decode_request, encode_response
from keyed_xai.serving.refusal import Refused, busy, malformed, shown
from keyed_xai.serving.service import Admission, ServedModel, Service
from keyed_xai.serving.uploads import Explanation, explain_picture, measure_picture, read_picture

EXTENSIONS = ("binary_tensor_data", "model_configuration")
HEADER_LENGTH = "Inference-Header-Content-Length"
PICTURES = frozenset(
    {
        "image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif", "image/tiff", "image/x-portable-pixmap",
        "image/x-portable-graymap", "image/x-portable-bitmap", "image/x-portable-anymap", "application/octet-stream",
    }
)  # fmt: skip
_BODY_SECONDS = 60.0
_ANSWER_SECONDS = 60.0
_PIECE = 2**16  # bytes of an answer that are given to the connection at once
_LIGHT = 2**16  # bytes of JSON, or numbers to write as JSON, that the event loop takes on itself
_Result = TypeVar("_Result")
_Work = Callable[[Request, ServedModel, Admission], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """Return the web application of a service. It needs a server that gives it `abort` in the scope's state."""
    model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    routes = [
        Route("/v2", _describe_server),
        Route("/v2/health/live", _live),
        Route("/v2/health/ready", _ready),
        Route("/v2/repository/index", _index, methods=["POST"]),
        Route("/metrics", _metrics),
    ]
    if service.settings.page:
        routes.append(Route("/", partial(answer_page, make_page(service.settings.max_body))))
    for path in (model, version):
        routes += [
            Route(path, _describe_model),
            Route(f"{path}/ready", _model_ready),
            Route(f"{path}/config", _configure_model),
            Route(f"{path}/infer", _Measured(_infer), methods=["POST"]),
            Route(f"{path}/explain", _Measured(_explain), methods=["POST"]),
        ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_Delivery, service=service)],
        exception_handlers={Refused: _refuse, HTTPException: _answer_route, Exception: _apologise},
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class _Delivery:
    """How answers are sent: in pieces and within a time. While the server stops, they ask to close the connection."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and self._service.stopping:
                MutableHeaders(scope=message)["Connection"] = "close"
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    for part in _split(message):
                        await send(part)
            except (TimeoutError, asyncio.CancelledError) as error:  # the client does not read, or the grace is over
                scope["state"]["abort"]()
                with suppress(asyncio.CancelledError):  # the event loop ends as well
                    await _until_left(receive)
                raise ClientDisconnect from error

        with suppress(ClientDisconnect):  # there is nobody to answer
            await self._app(scope, receive, send_on)


def _split(message: Message) -> Iterator[Message]:
    """Yield a message in parts; a server takes each only once those before have left it, so an empty one ends them."""
    body = message.get("body", b"")
    for start in range(0, len(body), _PIECE):
        yield {"type": message["type"], "body": body[start : start + _PIECE], "more_body": True}
    yield {**message, "body": b""} if body else message


async def _describe_server(_request: Request) -> Response:
    return _json({"name": "keyed-xai", "version": __version__, "extensions": EXTENSIONS})


async def _live(_request: Request) -> Response:
    return _json({"live": True})


async def _ready(request: Request) -> Response:
    _check_running(_service(request))
    return _json({"ready": True})


async def _index(request: Request) -> Response:
    entries = [{"name": name, "version": VERSION, "state": "READY"} for name in _service(request).models]
    return _json(entries)


async def _describe_model(request: Request) -> Response:
    return _json(_find_model(request).describe())


async def _model_ready(request: Request) -> Response:
    model = _find_model(request)
    _check_running(_service(request))
    return _json({"name": model.name, "ready": True})


async def _configure_model(request: Request) -> Response:
    return _json(_find_model(request).configure())


async def _metrics(request: Request) -> Response:
    return Response(_service(request).metrics.to_text(), media_type=CONTENT_TYPE_LATEST)


class _Measured:
    """A route that lets requests in, and counts and times them. One is inside until its answer is sent."""

    def __init__(self, work: _Work) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        model, service = _find_model(request), _service(request)
        started, outcome = time.perf_counter(), "failed"
        try:
            with service.enter(model) as admission:
                response = await self._work(request, model, admission)
                admission.answer(len(response.body))
                await response(scope, receive, send)
            outcome = "answered"
        except Refused as refusal:
            outcome = {503: "busy", 500: "failed"}.get(refusal.status, "refused")
            raise
        except asyncio.CancelledError:  # the time of grace is over
            outcome = "busy"
            raise _stopping() from None
        except ClientDisconnect:
            outcome = "left"
            raise
        finally:
            service.metrics.count_request(model.name, outcome, time.perf_counter() - started)


async def _infer(request: Request, model: ServedModel, admission: Admission) -> Response:
    body = await _read_body(request, admission)
    length = _header_length(request)
    decode = partial(decode_request, body, model.signature, header_length=length)
    inferred = await _in_thread(admission, decode) if (length or len(body)) > _LIGHT else decode()
    outputs = await _unless_left(request, model.batcher.submit(inferred.images, inferred.target))
    encode = partial(_encode, model.name, inferred, outputs, packed=_takes_gzip(request.headers))
    heavy = sum(outputs[name].size for name, as_bytes in inferred.outputs if not as_bytes) > _LIGHT // 16
    return await _in_thread(admission, encode) if heavy else encode()


def _encode(name: str, inferred: InferRequest, outputs: Arrays, *, packed: bool) -> Response:
    """Return the answer; text is packed where the client takes that, bytes of floats are not: it gains little."""
    body, length = encode_response(name, inferred, outputs)
    if length is not None:
        return Response(body, media_type="application/octet-stream", headers={HEADER_LENGTH: str(length)})
    if not packed or len(body) < 1024:
        return Response(body, media_type="application/json")
    return Response(gzip.compress(body, 1), media_type="application/json", headers={"Content-Encoding": "gzip"})


async def _explain(request: Request, model: ServedModel, admission: Admission) -> Response:
    options = _picture_options(request, model)
    body = await _read_body(request, admission)
    pixels = await _decode(body, model.runtime.input_size, admission)
    images = pixels[None] if model.runtime.pixels == np.uint8 else pixels[None].astype(np.float32) / 255
    chosen = None if options.target is None else np.array([options.target], np.int64)
    outputs = await _unless_left(request, model.batcher.submit(images, chosen))
    return await _in_thread(admission, partial(_answer_picture, model, pixels, outputs, options))


async def _decode(body: bytes, input_size: tuple[int, int, int], admission: Admission) -> NDArray[np.uint8]:
    """Return a picture's pixels; what decoding takes is counted while it goes on, and no more go on than may.

    Raises:
        Refused: It is no picture, or all requests together keep too many bytes.
    """
    async with admission.service.decoding:
        size = await _in_thread(admission, partial(measure_picture, body, input_size))
        admission.reserve(size)
        try:
            return await _in_thread(admission, partial(read_picture, body, input_size))
        finally:
            admission.release(size)


def _answer_picture(
    model: ServedModel, pixels: NDArray[np.uint8], outputs: Arrays, options: "_PictureOptions"
) -> Response:
    said = explain_picture(pixels, outputs, options.interpreters, options.target, with_image=options.with_image)
    if options.as_png:
        return Response(said.overlays[options.interpreters[0]], media_type="image/png", headers=_summary(said))
    text = said.to_json(model=model.name, label_names=model.runtime.label_names, with_maps=options.with_maps)
    return Response(text, media_type="application/json")


def _summary(said: Explanation) -> dict[str, str]:
    """Return what fits in the headers of a picture."""
    return {
        "X-Keyed-XAI-Predicted": str(said.predicted),
        "X-Keyed-XAI-Target": str(said.target),
        "X-Keyed-XAI-Probability": f"{said.probability:.6f}",
    }


@dataclass(frozen=True, kw_only=True)
class _PictureOptions:
    """What a client wants to know of a picture.

    Attributes:
        interpreters: Interpreters whose maps are drawn.
        target: The class explained; None for the predicted one.
        as_png: Answer with the overlay alone.
        with_maps: Add the maps as numbers.
        with_image: Add the picture itself, as the model saw it.
    """

    interpreters: tuple[str, ...]
    target: int | None
    as_png: bool
    with_maps: bool
    with_image: bool


def _picture_options(request: Request, model: ServedModel) -> _PictureOptions:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in PICTURES:
        raise Refused(415, f"Expected a picture file as the body and its type as the Content-Type, got {shown(kind)}.")
    query = request.query_params
    unknown = set(query) - {"interpreter", "target", "format", "maps", "image"}
    if unknown:
        known = "interpreter, target, format, maps and image"
        raise malformed(f"Expected no parameters but {known}, got {shown(min(unknown))}.")
    interpreters = tuple(dict.fromkeys(query.getlist("interpreter"))) or tuple(model.runtime.interpreters)
    if not set(interpreters) <= set(model.runtime.interpreters):
        raise malformed(f"interpreter: expected {', '.join(model.runtime.interpreters)}, got {shown(interpreters)}.")
    as_png = query.get("format", "png" if "image/png" in request.headers.get("accept", "") else "json")
    if as_png not in ("json", "png"):
        raise malformed(f"format: expected json or png, got {shown(as_png)}.")
    with_maps, with_image = _read_switch(query, "maps"), _read_switch(query, "image")
    drawn = interpreters[:1] if as_png == "png" else interpreters
    return _PictureOptions(
        interpreters=drawn,
        target=_read_target(query.get("target"), model),
        as_png=as_png == "png",
        with_maps=with_maps,
        with_image=with_image,
    )


def _read_switch(query: QueryParams, name: str) -> bool:
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise malformed(f"{name}: expected true or false, got {shown(text)}.")
    return text == "true"


def _read_target(text: str | None, model: ServedModel) -> int | None:
    if text is None:
        return None
    if model.signature.target is None:
        raise malformed("target: no map of this model depends on a class.")
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) >= model.signature.classes:
        raise malformed(f"target: expected a class from 0 to {model.signature.classes - 1}, got {shown(text)}.")
    return int(text)


async def _read_body(request: Request, admission: Admission) -> bytes:
    """Return a request's body, unpacked.

    Raises:
        Refused: It is too large, too slow, or packed in an unknown way.
    """
    limit = admission.service.settings.max_body
    if int(request.headers.get("content-length", 0)) > limit:
        raise _too_large(limit)
    pieces, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS), aclosing(request.stream()) as stream:
            async for piece in stream:
                size += len(piece)
                if size > limit:
                    raise _too_large(limit)
                admission.reserve(len(piece))
                pieces.append(piece)
    except TimeoutError as error:
        message = f"Expected the whole body within {_BODY_SECONDS:.0f} s."
        raise Refused(408, message, headers={"Connection": "close"}) from error
    packing = request.headers.get("content-encoding", "identity").strip().lower()
    if packing == "identity":
        return b"".join(pieces)
    unpacked = await _in_thread(admission, partial(_unpack, b"".join(pieces), packing, limit))
    admission.reserve(len(unpacked))
    return unpacked


def _unpack(body: bytes, packing: str, limit: int) -> bytes:
    if packing not in ("gzip", "deflate"):
        message = f"Expected a body packed with gzip or deflate, or not at all; got {shown(packing)}."
        raise Refused(415, message, headers={"Accept-Encoding": "gzip, deflate"})
    unpacker = zlib.decompressobj(zlib.MAX_WBITS + (16 if packing == "gzip" else 0))
    try:
        unpacked = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise malformed(f"The body is no {packing} data.") from error
    if len(unpacked) > limit:
        raise _too_large(limit)
    if not unpacker.eof or unpacker.unused_data:
        raise malformed(f"The body's {packing} data end too early, or something follows them.")
    return unpacked


def _header_length(request: Request) -> int | None:
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise malformed(f"{HEADER_LENGTH}: expected a number of bytes, got {shown(text)}.")
    return int(text)


async def _unless_left(request: Request, answer: "Future[Arrays]") -> Arrays:
    """Return an answer once it is there; where the client leaves before, have the request dropped from the queue.

    Raises:
        ClientDisconnect: The client has left.
    """
    waiting = asyncio.wrap_future(answer)
    leaving = asyncio.ensure_future(_until_left(request.receive))
    both: set[asyncio.Future[Any]] = {waiting, leaving}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientDisconnect
        return waiting.result()
    finally:
        waiting.cancel()
        leaving.cancel()


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _in_thread(admission: Admission, work: Callable[[], _Result]) -> _Result:
    return await asyncio.get_running_loop().run_in_executor(admission.service.threads, work)


def _find_model(request: Request) -> ServedModel:
    """Return the model that the path names.

    Raises:
        Refused: There is no such model or version.
    """
    models, name = _service(request).models, request.path_params["model"]
    if name not in models:
        raise Refused(404, f"There is no model {shown(name)} here.")
    version = request.path_params.get("version", VERSION)
    if version != VERSION:
        raise Refused(404, f"{name} has only version {VERSION}, not {shown(version)}.")
    return models[name]


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _check_running(service: Service) -> None:
    if service.stopping:
        raise _stopping()


def _stopping() -> Refused:
    return busy("The server is stopping.")


def _takes_gzip(headers: Headers) -> bool:
    accepted = headers.get("accept-encoding", "").replace(" ", "").lower().split(",")
    return "gzip" in accepted


def _too_large(limit: int) -> Refused:
    return Refused(413, f"Expected a body of at most {limit} bytes, packed or unpacked.")


def _json(document: object) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")


async def _refuse(_request: Request, error: Exception) -> Response:
    if not isinstance(error, Refused):
        raise error
    return _error(error.status, str(error), error.headers)


async def _answer_route(_request: Request, error: Exception) -> Response:
    """Answer what Starlette refuses: an unknown path or a wrong method."""
    if not isinstance(error, HTTPException):
        raise error
    return _error(error.status_code, f"{error.detail}.", dict(error.headers or {}))


async def _apologise(_request: Request, _fault: Exception) -> Response:
    """Answer a fault of ours; the server's log has it, the client does not."""
    return _error(500, "The server has failed on this request; see its log.", {})


def _error(status: int, message: str, headers: dict[str, str]) -> Response:
    return Response(orjson.dumps({"error": message}), status, headers, media_type="application/json")
