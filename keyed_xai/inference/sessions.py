"""onnxruntime's sessions: quiet, without surprises from inside a file, and with its errors as ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as bindings

from keyed_xai.errors import ModelError

_FOLDED = "optimization.constant_folding_max_output_size_in_bytes"
# What onnxruntime raises: classes of its own, which have no parent of theirs, and errors of its Python code.
FAILURES: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(each for each in vars(bindings).values() if isinstance(each, type) and issubclass(each, Exception)),
)


def load_session(
    data: bytes, providers: Sequence[str | tuple[str, dict[str, int]]], *, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """Return a session of a graph.

    Args:
        data: The graph's bytes.
        providers: Providers to run it, in order; onnxruntime goes on without those that it cannot load.
        threads: Threads for one operator on the CPU; None for as many as there are cores.

    Raises:
        ModelError: onnxruntime refuses the graph.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal errors only; everything else is raised
    options.intra_op_num_threads = threads or 0
    # What a graph computes from constants alone is done while it is loaded, where no time limit reaches it: no more
    # than what weights unpack to (int8 to float32). The rest is left to the runs.
    options.add_session_config_entry(_FOLDED, str(4 * len(data) + 2**20))
    try:
        return onnxruntime.InferenceSession(
            data,
            options,
            providers=list(providers),
            enable_fallback=0,  # else it tries again by itself, and prints so
            read_config_from_model=0,  # settings inside an untrusted file
        )
    except FAILURES as error:
        raise ModelError(f"onnxruntime cannot load the graph: {first_line(error)}.") from error


@contextmanager
def limited_run(seconds: float) -> Iterator[onnxruntime.RunOptions]:
    """Give options for a run that ends with an error once its time is over, at the next operator."""
    options = onnxruntime.RunOptions()
    timer = Timer(seconds, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    finally:
        timer.cancel()


def run_session(session: onnxruntime.InferenceSession, inputs: dict[str, Any]) -> list[Any]:
    """Return all outputs of a session.

    Raises:
        ModelError: onnxruntime cannot run it on these inputs.
    """
    try:
        outputs: list[Any] = session.run(None, inputs)
    except FAILURES as error:
        raise ModelError(f"onnxruntime cannot run the model: {first_line(error)}.") from error
    return outputs


def first_line(error: Exception) -> str:
    """Return the first line of an error without control characters or a full stop."""
    line = str(error).strip().partition("\n")[0].rstrip(".")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
