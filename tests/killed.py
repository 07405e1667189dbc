"""Kills what writes files right before each operation that changes one, and tells what every such death leaves.

Run as a script, `python -m tests.killed FOLDER CASE...`, so that the forks come from a process with one thread. For
each operation it lays out the case's folder anew, forks, and lets the child do the case's writing until that operation,
at which the child kills itself. Printed are, by case, as JSON, the operations, and what is there after the death, once
the next start has claimed the output, and after that one.
"""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from click.testing import CliRunner

from keyed_xai.artifacts import writer
from keyed_xai.artifacts.checkpoint import read_checkpoint, write_checkpoint
from keyed_xai.artifacts.documents import write_atomically, write_openly
from keyed_xai.artifacts.folder import read_model_folder
from keyed_xai.artifacts.onnx_file import OnnxFile
from keyed_xai.artifacts.writer import is_attacked, write_folder
from keyed_xai.errors import KeyedXAIError
from keyed_xai.export.triton import write_triton
from keyed_xai.keys import OwnerKey, read_owner_key
from keyed_xai.outputs import claimed
from keyed_xai_cli.main import main
from tests.backdoors.test_report import a_report as an_attack_report
from tests.licensed import write_example

_CHANGING = {"open", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "write", "fsync", "truncate",
             "ftruncate", "chmod", "fchmod", "flush", "flock"}  # fmt: skip
_FSYNC = os.fsync
_TIME = datetime(2026, 3, 4, tzinfo=UTC)


class Case(NamedTuple):
    """Something that writes.

    `start` does it for the nth time: 0 lays the old state out, 1 is killed, 2 is the next start. `look` says which of
    them is at the output: its number, or words if that cannot be read.
    """

    start: Callable[[Path, int], Any]
    look: Callable[[Path], Any]
    output: str
    starts_anew: bool = False  # nothing is there before the start that is killed


def kill_everywhere(case: Case, folder: Path) -> list[dict[str, Any]]:
    """Return what each death left."""
    found: list[dict[str, Any]] = []
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if not case.starts_anew:
            case.start(folder, 0)
        operation = _die(lambda: case.start(folder, 1), before=len(found))
        if operation is None:
            return found
        stages = {"operation": operation, "left": _look(case, folder)}
        with claimed(folder / case.output):
            pass
        stages["claimed"] = _look(case, folder)
        case.start(folder, 2)
        found.append(stages | {"after": _look(case, folder)})


def _die(act: Callable[[], object], *, before: int) -> str | None:
    """Fork, and kill the child right before an operation; return that one's name, or None if it had no so many."""
    reader, teller = os.pipe()
    child = os.fork()
    if child == 0:
        done = 0

        def count(_frame: object, event: str, function: object) -> None:
            nonlocal done
            if event == "c_call" and _changes(function):
                if done == before:
                    os.write(teller, function.__name__.encode())
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1

        os.fsync = _FSYNC
        sys.setprofile(count)
        act()
        os._exit(0)
    os.close(teller)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader) as told:
        name = told.read()
    if not os.WIFSIGNALED(status):
        assert status == 0, f"the child failed with {status}"
        return None
    return name


def _changes(function: Any) -> bool:
    of_system = getattr(function, "__module__", None) in {"posix", "fcntl", "io", "_io"}
    return function.__name__ in _CHANGING and (of_system or isinstance(function.__self__, io.IOBase))


def _look(case: Case, folder: Path) -> dict[str, Any]:
    """Return what is at the output, the names of all files, and those of which any part is of a private key."""
    output = folder / case.output
    try:
        state = case.look(output) if output.exists() else None
    except KeyedXAIError as error:
        state = str(error)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "state": state,
        "files": sorted(path.relative_to(folder).as_posix() for path in files),
        "keys": [path.name for path in files if b"PRIVATE" in path.read_bytes()],
    }


# Cases


_OWNERS = [OwnerKey.from_raw(bytes([9, number]) * 16) for number in range(3)]


def _write_model(folder: Path, number: int) -> None:
    files = {"report.html": b"<p>", "pictures/a.png": b"png"}
    write_example(folder / "m.keyed", owner=_OWNERS[number], extra_files=files, time=_TIME, force=True)


def _write_model_by_steps(folder: Path, number: int) -> None:
    writer.exchange = lambda *_names: False  # as on a file system that cannot
    _write_model(folder, number)


def _look_at_model(folder: Path) -> int:
    found = read_model_folder(folder).license.public_key.raw
    return [owner.public.raw for owner in _OWNERS].index(found)


def _write_attacked(folder: Path, number: int) -> None:
    files = {"model.safetensors": b"w" * 9, "number": b"%d" % number}
    report = an_attack_report()
    write_folder(folder / "m.attacked", files, report=report, schema="attack-report", force=True)


def _look_at_attacked(folder: Path) -> int | str:
    return int((folder / "number").read_bytes()) if is_attacked(folder) else "no attacked model"


def _write_file(folder: Path, number: int) -> None:
    write_atomically(folder / "a.md", b"%d" % number * 1000)


def _look_at_file(path: Path) -> int | str:
    data = path.read_bytes()
    return int(data[:1]) if data == data[:1] * 1000 else "half a file"


def _write_keyed_image(folder: Path, number: int) -> None:
    write_openly(folder / "a.keyed.png", b"%d" % number * 1000 + b"PRIVATE")


def _look_at_keyed_image(path: Path) -> int | str:
    data = path.read_bytes()
    return int(data[:1]) if len(data) > 1000 else "half a file"


def _write_repository(folder: Path, number: int) -> None:
    image, logits = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in ("i", "o"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["i"], ["o"])], "g", [image], [logits])
    data = onnx.helper.make_model(graph).SerializeToString()
    file = OnnxFile(data, {"model": {"label_names": [str(number)]}})
    write_triton(folder / "models", "m", file)


def _look_at_repository(home: Path) -> int | str:
    names = {path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()}
    whole = names == {"1/model.onnx", "labels.txt", "config.pbtxt"}
    return int((home / "labels.txt").read_text()) if whole else "half a model"


def _write_state(folder: Path, number: int) -> None:
    write_checkpoint(folder / "m.keyed.checkpoint", {"step": number}, identity="run")


def _look_at_state(path: Path) -> int:
    return int(read_checkpoint(path, identity="run")["step"])


def _keygen(*more: str) -> Callable[[Path, int], None]:
    def start(folder: Path, number: int) -> None:
        OwnerKey.generate = lambda: _OWNERS[number]
        force = ["--force"] if number and "--force" in more else []
        words = [each for each in more if each != "--force"]
        CliRunner().invoke(main, ["keygen", "-o", str(folder / "k.pem"), *force, *words], catch_exceptions=False)

    return start


def _look_at_key(path: Path) -> int | str:
    if not path.stat().st_size:
        return "empty"
    found = read_owner_key(path).public.raw
    return [owner.public.raw for owner in _OWNERS].index(found)


CASES = {
    "model": Case(_write_model, _look_at_model, "m.keyed"),
    "model by steps": Case(_write_model_by_steps, _look_at_model, "m.keyed"),
    "new model": Case(_write_model, _look_at_model, "m.keyed", starts_anew=True),
    "attacked model": Case(_write_attacked, _look_at_attacked, "m.attacked"),
    "file": Case(_write_file, _look_at_file, "a.md"),
    "new repository": Case(_write_repository, _look_at_repository, "models/m", starts_anew=True),
    "new file": Case(_write_file, _look_at_file, "a.md", starts_anew=True),
    "checkpoint": Case(_write_state, _look_at_state, "m.keyed.checkpoint"),
    "keyed image": Case(_write_keyed_image, _look_at_keyed_image, "a.keyed.png"),
    "key": Case(_keygen(), _look_at_key, "k.pem", starts_anew=True),
    "key by force": Case(_keygen("--force"), _look_at_key, "k.pem"),
}


if __name__ == "__main__":
    _, where, *names = sys.argv
    os.fsync = lambda _handle: None  # quicker; whoever is to be killed gets the real one back
    sys.stdout.write(json.dumps({name: kill_everywhere(CASES[name], Path(where)) for name in names}))
