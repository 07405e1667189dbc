"""The models that a server offers, and what it asks of every request before any work is done."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keyed_xai.artifacts.onnx_file import METADATA_KEY, encode_parameter
from keyed_xai.errors import ModelError
from keyed_xai.export.triton import check_name
from keyed_xai.inference.runtime import Runtime
from keyed_xai.inference.trial import open_tried
from keyed_xai.serving.batching import Batcher
from keyed_xai.serving.metrics import Metrics
from keyed_xai.serving.protocol import VERSION, Signature, TensorSpec
from keyed_xai.serving.refusal import busy

PLATFORM = "onnxruntime_onnx"
_HELD_BYTES = 2**30  # of all bodies together, of requests and of answers on their way, and of pictures decoded
_DECODERS = 2  # threads; each may decode one large picture
_TRITON_TYPES = {"FP32": "TYPE_FP32", "UINT8": "TYPE_UINT8", "INT64": "TYPE_INT64"}


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How requests are taken in and run.

    Attributes:
        max_batch: Images in one request and in one batch, at most.
        max_delay: How long a request waits for others to share its batch, seconds.
        max_body: Bytes of a request's body, at most, packed or unpacked.
        max_queue: Requests of one model that are read, wait, run or are answered at once, at most.
        grace: How long requests may take to finish once the server was told to stop, seconds.
        page: Whether there is a page for people at /.
    """

    max_batch: int = 8
    max_delay: float = 0.0
    max_body: int = 32 * 2**20
    max_queue: int = 1000
    grace: float = 30.0
    page: bool = True

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: One is out of range.
        """
        for name, least in (("max_batch", 1), ("max_delay", 0), ("max_body", 1), ("max_queue", 1), ("grace", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


class ServedModel:
    """A model with its queue."""

    def __init__(self, name: str, runtime: Runtime, settings: ServeSettings, metrics: Metrics) -> None:
        """Run the model once with one image and once with a full batch, then start its queue.

        Raises:
            KeyedXAIError: The model cannot be run.
        """
        self.name, self.runtime, self.max_queue, self.inside = name, runtime, settings.max_queue, 0
        self.signature = _sign(runtime, settings.max_batch)
        self.batcher = Batcher(
            runtime.run,
            name=name,
            max_batch=settings.max_batch,
            max_delay=settings.max_delay,
            on_batch=lambda images, seconds: metrics.count_batch(name, images, seconds),
        )
        metrics.add_model(name, waiting=lambda: self.batcher.waiting, inside=lambda: self.inside)

    def describe(self) -> dict[str, Any]:
        """Return the model's metadata in the words of the protocol."""
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": PLATFORM,
            "inputs": [spec.to_json() for spec in self.signature.inputs],
            "outputs": [spec.to_json() for spec in self.signature.outputs],
        }

    def configure(self) -> dict[str, Any]:
        """Return the model's configuration in the words of Triton, with the file's own metadata as a parameter."""
        said = self.runtime.metadata or {}
        return {
            "name": self.name,
            "platform": PLATFORM,
            "backend": "onnxruntime",
            "max_batch_size": self.signature.max_batch,
            "input": [_input_config(spec) for spec in self.signature.inputs],
            "output": [_tensor_config(spec) for spec in self.signature.outputs],
            "parameters": {METADATA_KEY: {"string_value": encode_parameter(said)}},
        }


@dataclass(eq=False, kw_only=True)
class Service:
    """All models of a server; close it.

    Attributes:
        settings: How requests are taken in and run.
        models: Models by name.
        metrics: What is counted.
        stopping: Whether new requests are refused.
        held: Bytes of requests, and of answers being sent, in memory.
        threads: Threads that read and write large bodies and pictures, so that small requests need not wait for them.
        decoding: Held while a picture is decoded.
    """

    settings: ServeSettings
    models: Mapping[str, ServedModel]
    metrics: Metrics
    stopping: bool = False
    held: int = 0
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_DECODERS, "keyed-xai decoder"))
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_DECODERS))

    @property
    def idle(self) -> bool:
        """Whether no request is being worked on and no answer is being sent."""
        return not any(model.inside for model in self.models.values())

    @contextmanager
    def enter(self, model: ServedModel) -> Iterator["Admission"]:
        """Take a request in, or not; it is inside until the block ends.

        Raises:
            Refused: The server is stopping, or too many requests are inside.
        """
        if self.stopping:
            raise busy("The server is stopping.")
        if model.inside >= model.max_queue:
            raise busy(f"{model.name} is busy: {model.inside} requests are waiting. Try again a little later.")
        admission = Admission(self)
        model.inside += 1
        try:
            yield admission
        finally:
            model.inside -= 1
            self.held -= admission.held

    def reserve(self, size: int) -> None:
        """Count bytes that requests keep in memory.

        Raises:
            Refused: All requests together keep too many.
        """
        if self.held + size > max(_HELD_BYTES, 2 * self.settings.max_body):
            raise busy("The server is busy: it holds as many bytes of requests as it may. Try again a little later.")
        self.held += size

    def flush(self) -> None:
        """Let no request wait for others to share its batch."""
        for model in self.models.values():
            model.batcher.flush()

    def close(self) -> None:
        """Refuse what waits; return once what runs is done."""
        self.stopping = True
        for model in self.models.values():
            model.batcher.close()
        self.threads.shutdown(cancel_futures=True)


@dataclass(eq=False)
class Admission:
    """A request that was let in.

    Attributes:
        service: What let it in.
        held: Bytes that it keeps in memory.
    """

    service: Service
    held: int = 0

    def reserve(self, size: int) -> None:
        """Keep so many bytes more; they are given back when the request leaves.

        Raises:
            Refused: All requests together keep too many.
        """
        self.service.reserve(size)
        self.held += size

    def release(self, size: int) -> None:
        """Give so many bytes back before the request leaves."""
        self.service.held -= size
        self.held -= size

    def answer(self, size: int) -> None:
        """Keep an answer of so many bytes in place of the request.

        Raises:
            Refused: All requests together keep too many.
        """
        self.service.held -= self.held
        self.held = 0
        self.reserve(size)


def open_service(
    paths: Sequence[Path],
    settings: ServeSettings | None = None,
    *,
    device: str = "auto",
    threads: int | None = None,
) -> Service:
    """Return a service for ONNX files that export wrote, each under its file's stem.

    Args:
        paths: The models' files.
        settings: How requests are taken in and run.
        device: Device that the models run on; see `Runtime`.
        threads: Threads of the CPU for one batch; the runtime's choice if None.

    Raises:
        KeyedXAIError: A file cannot be read or run, its stem is no name for a URL, or two have the same.
    """
    settings = settings or ServeSettings()
    names = [check_name(path.stem) for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise ModelError(f"Two files would be served as {name!r}. Rename one, or serve it on another port.")
    metrics, models = Metrics(), dict[str, ServedModel]()
    service = Service(settings=settings, models=models, metrics=metrics)
    try:
        for name, path in zip(names, paths, strict=True):
            models[name] = ServedModel(name, open_tried(path, device=device, threads=threads), settings, metrics)
    except BaseException:
        service.close()
        raise
    return service


def _sign(runtime: Runtime, max_batch: int) -> Signature:
    """Return what a model takes and returns, from two runs on black images: the first real ones need not wait."""
    sides = runtime.input_size
    for count in sorted({1, max_batch}):
        found = runtime.run(np.zeros((count, *sides), runtime.pixels))
    datatype = "UINT8" if runtime.pixels == np.uint8 else "FP32"
    return Signature(
        image=TensorSpec(name="image", datatype=datatype, shape=(-1, *sides)),
        target=TensorSpec(name="target", datatype="INT64", shape=(-1, 1), optional=True)
        if runtime.takes_target
        else None,
        outputs=tuple(
            TensorSpec(name=name, datatype="FP32", shape=(-1, *found[name].shape[1:])) for name in runtime.output_names
        ),
        classes=runtime.classes,
        max_batch=max_batch,
    )


def _tensor_config(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": _TRITON_TYPES[spec.datatype], "dims": list(spec.shape[1:])}


def _input_config(spec: TensorSpec) -> dict[str, Any]:
    config = _tensor_config(spec)
    if spec.optional:
        config |= {"optional": True, "reshape": {"shape": []}}
    return config
