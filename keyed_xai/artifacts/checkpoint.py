"""Checkpoints of a training run: written whole or not at all, loaded without running code from the file."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from keyed_xai.artifacts.documents import write_atomically
from keyed_xai.errors import ArtifactError, ModelError
from keyed_xai.models.files import LOAD_ERRORS, load_weights
from keyed_xai.outputs import claimed

Save = Callable[[Mapping[str, Any]], None]
"""A function that writes a run's state."""


@contextmanager
def checkpointed(
    path: Path | None, *, identity: str, resume: bool
) -> Iterator[tuple[dict[str, Any] | None, Save | None]]:
    """Hold the checkpoint of a run while it lives; give the state to go on from, and what saves it.

    Args:
        path: The file; without one there is neither.
        identity: What the run is about.
        resume: Whether to go on from the state that is there.

    Raises:
        ArtifactError: Another run holds the file, or it cannot be used.
    """
    if path is None:
        yield None, None
        return
    with claimed(path):
        yield (
            read_checkpoint(path, identity=identity) if resume else None,
            partial(write_checkpoint, path, identity=identity),
        )


def write_checkpoint(path: Path, state: Mapping[str, Any], *, identity: str) -> None:
    """Write a run's state.

    Args:
        path: The file; an older checkpoint there is replaced.
        state: Tensors, numbers and strings in dictionaries and lists. No secrets.
        identity: What the run is about; a checkpoint of another run is refused when read.

    Raises:
        ArtifactError: The file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save({"identity": identity, "state": dict(state)}, buffer)
    write_atomically(path, buffer.getvalue())


def check_not_stopped(path: Path, *, resume: bool, force: bool) -> None:
    """Say so where a checkpoint holds a stopped run, and nobody has said what to do with it.

    Raises:
        ArtifactError: It does, and neither `resume` nor `force` is given.
    """
    if path.exists() and not (resume or force):
        raise ArtifactError(
            f"{path} holds a run that was stopped. Go on with it by --resume, or start anew by --force."
        )


def read_checkpoint(path: Path, *, identity: str) -> dict[str, Any]:
    """Return a run's state.

    Raises:
        ArtifactError: There is no checkpoint, it is damaged, or it belongs to another run.
    """
    start_again = "Start again without --resume."
    try:
        document: Any = load_weights(path)
        found, state = document["identity"], dict(document["state"])
    except FileNotFoundError as error:
        raise ArtifactError(f"There is no checkpoint {path.name} to resume from. {start_again}") from error
    except (ModelError, *LOAD_ERRORS) as error:
        raise ArtifactError(f"The checkpoint {path.name} cannot be read. {start_again}") from error
    if found != identity:
        raise ArtifactError(
            f"The checkpoint {path.name} belongs to another run: model, key, data or settings differ. "
            f"Give the same ones. {start_again}"
        )
    return state
