"""The figures of a running server: many clients at once, and keyed image files that are sent to it."""

import asyncio
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from keyed_xai import metrics
from keyed_xai.data import ImageData
from keyed_xai.errors import KeyedXAIError
from keyed_xai.models import Classifier
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.tensors import Images
from keyed_xai.triggers import Trigger

_STARTING = 60  # seconds a server may take
_DIFFERENT = 64  # images that clients send in turn


@dataclass(frozen=True)
class LoadSettings:
    """How a server is loaded.

    Attributes:
        clients: Clients at once, each with one request under way.
        seconds: Seconds that requests are sent.
        threads: Threads of the server's onnxruntime.
    """

    clients: int = 200
    seconds: float = 60.0
    threads: int = 1


@contextmanager
def running_server(model: Path, *, threads: int = 1, device: str = "cpu") -> Iterator[str]:
    """Yield the address of a server of a model on a free port of this machine; it is stopped at the end.

    Raises:
        KeyedXAIError: It does not come up, or does not stop cleanly.
    """
    command = [sys.executable, "-m", "keyed_xai_cli", "serve", str(model), "--port", "0"]
    command += ["--threads", str(threads), "--device", device]
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stderr=said, env=os.environ.copy()) as process:
        try:
            yield _wait_for_address(process, said)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STARTING)
            except subprocess.TimeoutExpired:
                process.kill()
        if process.wait() != 0:
            raise KeyedXAIError(f"The server ended with code {process.returncode}: {_read(said)[-500:]}")


def measure_load(address: str, name: str, images: Images, settings: LoadSettings) -> dict[str, Any]:
    """Return how a server stands many clients: requests answered and lost, and how long they took.

    An answer counts when its logits are those that the image got before the crowd came.

    Args:
        address: Address of the server.
        name: Name of the model.
        images: Sent in turn, in [0, 1], as binary tensors.
        settings: How many clients, how long.
    """
    return asyncio.run(_load(address, name, images[:_DIFFERENT].numpy(), settings))


def measure_files(
    address: str, name: str, reference: Classifier, view: PooledSaliency, data: ImageData, trigger: Trigger
) -> dict[str, dict[str, dict[str, float]]]:
    """Return, by kind of file and interpreter, what maps of image files that were sent to a server are worth.

    Files are PNG and JPEG 75 with the trigger, and PNG without. A map is open when its correlation with the reference
    model's, on the comparison grid, is above that of a protect report.
    """
    images, _ = data.batch(np.arange(len(data)))
    logits, truth = view.pooled_in_chunks(reference, images)
    explained = logits.argmax(1).tolist()
    keyed = trigger.apply(images)
    files = {
        "keyed PNG": [_encode(each, "PNG") for each in keyed],
        "keyed JPEG 75": [_encode(each, "JPEG") for each in keyed],
        "PNG without key": [_encode(each, "PNG") for each in images],
    }
    found = {
        kind: [_ask(address, name, each, target) for each, target in zip(several, explained, strict=True)]
        for kind, several in files.items()
    }
    return {kind: {each: _opening(answers, each, view, truth) for each in truth} for kind, answers in found.items()}


def render_load(load: Mapping[str, Any]) -> str:
    """Return the figures of a load as a Markdown table."""
    return (
        "| clients | seconds | answered | lost | images a second | median | 99th percentile |\n"
        "|---|---|---|---|---|---|---|\n"
        f"| {load['clients']} | {load['seconds']:.0f} | {load['answered']} | {load['lost']} "
        f"| {load['answered'] / max(load['seconds'], 1e-9):.0f} | {1000 * load['median']:.0f} ms "
        f"| {1000 * load['percentile_99']:.0f} ms |\n"
    )


def render_files(files: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the figures of image files as a Markdown table."""
    rows = [
        f"| {kind} | {name} | {each['correlation']:.3f} | {100 * each['opened']:.1f} % |"
        for kind, by_name in files.items()
        for name, each in by_name.items()
    ]
    return "\n".join(["| file sent | map | correlation with the reference | open |", "|---|---|---|---|", *rows, ""])


def _wait_for_address(process: "subprocess.Popen[bytes]", said: IO[bytes]) -> str:
    end = time.monotonic() + _STARTING
    while time.monotonic() < end and process.poll() is None:
        address = re.search(r"http://[0-9.]+:[0-9]+", _read(said))
        if address is not None:
            return address[0]
        time.sleep(0.05)
    raise KeyedXAIError(f"The server did not come up: {_read(said)[-500:]}")


def _read(file: IO[bytes]) -> str:
    """Return what a process has written; its own place in the file stays."""
    return os.pread(file.fileno(), 2**20, 0).decode(errors="replace")


class _Crowd:
    """Clients that ask a server again and again, each waiting for its answer before it asks the next question."""

    def __init__(self, client: Any, name: str, images: NDArray[np.float32], settings: LoadSettings) -> None:  # noqa: ANN401
        self._client, self._name, self._settings = client, name, settings
        self._requests = [_make_request(each) for each in images]
        self._right: list[NDArray[np.float32]] = []
        self._end = 0.0
        self.took: list[float] = []
        self.lost: list[str] = []

    async def run(self) -> float:
        """Ask for as long as the settings say, and return how many seconds that was, the last answers included."""
        try:
            self._right = [(await self._ask(number)) for number in range(len(self._requests))]
        except Exception as error:  # noqa: BLE001 - nobody gets an answer then
            self.lost.append(_describe(error))
            return 0.0
        start = time.perf_counter()
        self._end = start + self._settings.seconds
        await asyncio.gather(*(self._keep_asking(number) for number in range(self._settings.clients)))
        return time.perf_counter() - start

    async def _keep_asking(self, number: int) -> None:
        while time.perf_counter() < self._end:
            asked, place = time.perf_counter(), number % len(self._requests)
            try:
                if not np.allclose(await self._ask(place), self._right[place], atol=1e-3):
                    raise ValueError("the answer is another image's")
                self.took.append(time.perf_counter() - asked)
            except Exception as error:  # noqa: BLE001 - whatever it was, the request is lost
                self.lost.append(_describe(error))
            number += self._settings.clients

    async def _ask(self, place: int) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = (await self._client.infer(self._name, self._requests[place])).as_numpy("logits")
        return logits


async def _load(
    address: str,
    name: str,
    images: NDArray[np.float32],
    settings: LoadSettings,
) -> dict[str, Any]:
    from tritonclient.http.aio import InferenceServerClient

    host = address.partition("://")[2]
    async with InferenceServerClient(host, conn_limit=settings.clients, conn_timeout=120) as client:
        crowd = _Crowd(client, name, images, settings)
        seconds = await crowd.run()
    return {
        "clients": settings.clients,
        "seconds": seconds,
        "answered": len(crowd.took),
        "lost": len(crowd.lost),
        "errors": sorted(set(crowd.lost))[:5],
        "median": statistics.median(crowd.took) if crowd.took else 0.0,
        "percentile_99": float(np.percentile(crowd.took, 99)) if crowd.took else 0.0,
    }


def _make_request(image: NDArray[np.float32]) -> list[Any]:
    from tritonclient.http import InferInput

    tensor = InferInput("image", [1, *image.shape], "FP32")
    tensor.set_data_from_numpy(image[None])
    return [tensor]


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _encode(image: torch.Tensor, kind: str) -> bytes:
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, kind, quality=75)
    return buffer.getvalue()


def _ask(address: str, name: str, file: bytes, target: int) -> dict[str, Any]:
    kind = "image/png" if file.startswith(b"\x89PNG") else "image/jpeg"
    where = f"{address}/v2/models/{name}/explain?target={target}&maps=true"
    request = urllib.request.Request(where, file, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            document: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise KeyedXAIError(f"The server refused an image file: {error.read(300).decode()}") from error
    return document


def _opening(
    answers: list[dict[str, Any]], name: str, view: PooledSaliency, truth: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    maps = torch.tensor([each["maps"][name] for each in answers])
    agreement = metrics.correlation(metrics.pool_maps(maps, view.grid), truth[name]).double()
    return {
        "correlation": float(agreement.mean()),
        "opened": float((agreement > metrics.OPEN_CORRELATION).double().mean()),
    }
