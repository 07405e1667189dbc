"""Every command that writes: where its output may be, who else may be writing it, and what is said when a report fails.

The models here are no models: whatever is refused is refused before one is read.
"""

import errno
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from keyed_xai import outputs as claims
from keyed_xai.artifacts.checkpoint import checkpointed
from keyed_xai.errors import ArtifactError
from keyed_xai.keys import write_owner_key
from keyed_xai.models.networks import SmallResNet
from keyed_xai_cli.main import main
from tests.test_outputs import another_run

QUICK = ["--steps", "2", "--batch-size", "4", "--held-out", "4", "--limit", "20", "--grid", "4", "--device", "cpu"]
COMMANDS = {
    "keygen": ["keygen"],
    "protect": [
        "protect",
        "m.pt",
        "--key-file",
        "k.pem",
        *QUICK,
        "--wrong-keys",
        "2",
        "--without-ownership",
    ],  # fmt: skip
    "attack": ["attack", "m.pt", "--data", "builtin", *QUICK],
    "train": ["train", "--data", "builtin", "--widths", "4", "--limit", "40", "--held-out", "4", "--epochs", "1"],
    "export": ["export", "m.pt", "--interpreter", "gradcam"],
    "audit": ["audit", "m.pt", "--against", "activation-clusters", "--no-controls", "--limit", "20", "--held-out", "4"],
    "demo": ["demo", "--steps", "1", "--wrong-keys", "0"],
}
FOLDERS = {"audit": "audit.json", "demo": "report.html"}
"""Commands that fill a folder, and the file in it that tells others off."""


@pytest.fixture
def place(tmp_path, key, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "_PATIENCE", 0.1)
    (tmp_path / "m.pt").write_bytes(b"no model")
    (tmp_path / "file").touch()
    write_owner_key(tmp_path / "k.pem", key)
    return tmp_path


def run(command, *more):
    return CliRunner().invoke(main, [*COMMANDS[command], *(str(each) for each in more)])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-o", "--json"])
def test_output_that_cannot_be_written_is_refused_before_any_work(place, command, option):
    names = {"-o": "elsewhere", "--json": "j.json"} | {option: "file/below/it"}
    result = run(command, *(each for pair in names.items() for each in pair))
    assert result.exit_code == 1
    assert "Error: Cannot write file/below/it" in result.output
    assert {path.name for path in place.iterdir()} == {"m.pt", "file", "k.pem"}


@pytest.mark.parametrize("command", COMMANDS)
def test_second_run_is_refused_while_the_first_lives(place, command):
    output = place / "a" / "b"
    with another_run(output / FOLDERS[command] if command in FOLDERS else output):
        for more in ([], ["--force"], ["--resume"]):
            result = run(command, "-o", output, *more)
            refused = "No such option" if result.exit_code == 2 and more else "Another run is writing"
            assert refused in result.output


def test_second_run_into_a_repository_is_refused_while_the_first_lives(place):
    with another_run(place / "models" / "b"):
        assert "Another run is writing" in run("export", "-o", "b.onnx", "--triton", place / "models").output


def test_checkpoint_is_held_by_one_run_of_the_library_too(place):
    with another_run(place / "c"), pytest.raises(ArtifactError, match="Another run is writing"):
        checkpointed(place / "c", identity="run", resume=False).__enter__()


@pytest.mark.parametrize("command", ["protect", "attack", "train", "export"])
@pytest.mark.parametrize("output", [".", ".."])
def test_output_without_a_name_ends_in_a_message(place, command, output):
    result = run(command, "-o", output)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("command", ["protect", "attack", "train", "export", "audit"])
def test_folders_are_made_and_a_report_that_fails_does_not_hide_the_result(place, command, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device", "j.json")

    torch.manual_seed(0)
    torch.save(SmallResNet(1, 10, (4, 6, 6)).state_dict(), place / "m.pt")
    monkeypatch.setattr(importlib.import_module(f"keyed_xai_cli.{command}"), "emit_json", full)
    output = place / "a" / "b" / "c"
    result = run(command, "-o", output, "--json", place / "d" / "e" / "j.json")
    assert result.exit_code == 1
    assert result.stderr.endswith(f"Error: No space left on device: j.json. {output} was written all the same.\n")
    assert output.exists()
    assert [path.name for path in output.parent.iterdir()] == ["c"]
    assert not (place / "d").exists()


WITH_LITTLE_SPACE = """
import resource, sys
from keyed_xai_cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
main(sys.argv[1:])
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("report", [["--json", "k.json"], [], ["--json", "-"]], ids=["file", "text", "standard output"])
def test_keygen_on_a_full_disk_says_that_the_key_was_written(place, report):
    command = [sys.executable, "-c", WITH_LITTLE_SPACE, "keygen", "-o", "new.pem", *report]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr.endswith("new.pem was written all the same.\n")
    assert (place / "new.pem").stat().st_size > 100
    assert not (place / "k.json").exists()


def test_folder_of_a_key_and_its_report_are_made(place):
    assert run("keygen", "-o", "a/b/new.pem", "--json", "c/d/k.json").exit_code == 0
    assert json.loads((place / "c" / "d" / "k.json").read_text())["path"] == "a/b/new.pem"
