"""Outputs that belong to one run at a time, and the remains of killed runs beside them.

Beside an output NAME stand, while something writes it, `.NAME.keyed-xai-lock`, which the operating system frees when
the process dies, and `.NAME.keyed-xai-draft`, what is not finished. Where a folder cannot be exchanged in one step,
`.NAME.keyed-xai-old` is for a moment the whole folder that is being replaced. Whoever claims the output next removes
them, or puts the old folder back where there is no other.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from keyed_xai.errors import ArtifactError

_MARK = ".keyed-xai-"
_PATIENCE = 2.0  # seconds; to write a file takes less, a run takes longer


@contextmanager
def claimed(output: Path, *, patience: float | None = None) -> Iterator[Path]:
    """Hold an output, and give the free path of its draft.

    The folder it lies in is made if need be, and removed again if nothing was written. A thread may claim what it holds
    already: then the outer claim counts.

    Args:
        output: The file or folder to write.
        patience: How long to wait for another run, seconds; long enough for one that writes a file, if absent.

    Raises:
        ArtifactError: Another run holds it, the path has no name, or its folder cannot be made or written to.
    """
    draft = beside(output, "draft")
    lock = FileLock(os.path.abspath(beside(output, "lock")), is_singleton=True)
    made = [folder for folder in output.parents if not folder.exists()]
    with _saying_why(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE if patience is None else patience)
    try:
        with _saying_why(output):
            _clear(output)
        yield draft
    finally:
        with suppress(OSError):  # a file that stays locks nobody out
            if lock.lock_counter == 1:
                Path(lock.lock_file).unlink()  # while it is held: whoever waits for it opens another
        lock.release()
        with suppress(OSError):  # the first that is not empty
            for folder in made:
                folder.rmdir()


def prepare_folder(folder: Path) -> None:
    """Make a folder that is going to be filled, and remove what killed runs left in it.

    Raises:
        ArtifactError: It cannot be made.
    """
    with _saying_why(folder):
        folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove what killed runs left in a folder, and leave living ones alone; does nothing where there is no folder."""
    for lock in list(folder.glob(f".*{_MARK}lock")):
        with suppress(ArtifactError), claimed(_output_of(lock), patience=0.0):
            pass


def put_back(output: Path) -> None:
    """Have a folder its name again if a run was killed while it replaced it.

    Raises:
        ArtifactError: That is so, and it cannot be renamed, or another run is replacing it right now.
    """
    if output.name and not output.exists() and beside(output, "old").exists():
        with claimed(output):
            pass


def beside(output: Path, kind: str) -> Path:
    """Return where an output's "lock", "draft" or "old" is.

    Raises:
        ArtifactError: The output's path has no name of its own, as "." and "..".
    """
    if output.name in ("", ".."):
        raise ArtifactError(f"{output} is no name of a file or folder to write: choose another.")
    return output.with_name(f".{output.name}{_MARK}{kind}")


def _output_of(lock: Path) -> Path:
    return lock.with_name(lock.name.removeprefix(".").removesuffix(f"{_MARK}lock"))


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries; does nothing where folders cannot be opened (Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _saying_why(output: Path) -> Iterator[None]:
    """Turn what the operating system says while an output is claimed into an ArtifactError."""
    try:
        yield
    except Timeout as error:
        raise ArtifactError(
            f"Another run is writing {output}. Wait until it has ended, stop it, or choose another name."
        ) from error
    except OSError as error:
        raise ArtifactError(f"Cannot write {output}: {error.strerror or error}.") from error


def _clear(output: Path) -> None:
    """Remove what a killed run left; an old folder is whole as long as it has that name."""
    draft, old = beside(output, "draft"), beside(output, "old")
    remove(draft)
    if os.path.lexists(old):
        old.rename(draft if os.path.lexists(output) else output)
        remove(draft)
