"""A graph of a stranger is loaded and run once in a process of its own, which alone it may bring down or fill.

onnxruntime ends the process on some malformed graphs (`docs/hostile-input.md` counts them) instead of raising.
"""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from keyed_xai.artifacts.documents import printable
from keyed_xai.artifacts.onnx_file import decode_onnx, read_onnx
from keyed_xai.errors import KeyedXAIError, ModelError
from keyed_xai.inference.runtime import Runtime
from keyed_xai.memory import limit_memory

SECONDS = 300.0
_MEMORY = 4 * 2**30  # bytes, beyond what the process has and eight times the file
_LONGEST = 2000
_REFUSED = 1


def open_tried(path: Path, *, device: str = "auto", threads: int | None = None) -> Runtime:
    """Return the model in a file of a stranger, ready to run, once it has been tried; see `Runtime`.

    Raises:
        ArtifactError: The file cannot be read, or was not made by export.
        ModelError: onnxruntime refuses the graph or ends on it, or the device asked for cannot be used.
    """
    file = read_onnx(path)
    try_graph(file.data)
    return Runtime(file, device=device, threads=threads)


def try_graph(data: bytes, *, seconds: float = SECONDS) -> None:
    """Load a graph and run it on a black image in another process, on the CPU.

    Args:
        data: An exported model, as read from its file.
        seconds: Seconds for all of it.

    Raises:
        ModelError: It ends the process, needs more memory or time than a model of its size may, or cannot be run.
    """
    command = [sys.executable, "-P", "-m", __name__]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"The model was stopped: expected a first run within {seconds:g} s.") from error
    if done.returncode == _REFUSED and done.stdout:
        raise ModelError(printable(done.stdout.decode("utf-8", "replace")[:_LONGEST]))
    if done.returncode:
        raise ModelError(
            f"onnxruntime ends on this graph ({_cause(done.returncode)}): it is malformed, or wants more memory than a "
            "model of its size may. Ask for a file that keyed-xai export wrote."
        )


def _cause(code: int) -> str:
    known = {-each.value: each.name for each in signal.Signals}
    return known.get(code, f"exit code {code}")


def _main() -> int:
    """Try what comes on standard input; return 1, with words on standard output, if it cannot be run."""
    data = sys.stdin.buffer.read()
    limit_memory(_MEMORY + 8 * len(data))
    try:
        runtime = Runtime(decode_onnx(data, origin="the model"), device="cpu", threads=1)
        runtime.run(np.zeros((1, *runtime.input_size), runtime.pixels))
    except KeyedXAIError as error:
        sys.stdout.write(str(error))
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main())
