"""The site builds without a warning, and what README, docs/ and docstrings show runs.

Trainings in examples get the smallest settings that show the example's own way, by options and values named here.
"""

import doctest
import importlib
import inspect
import runpy
import shlex
import subprocess
import sys

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from markdown_it import MarkdownIt
from PIL import Image

import keyed_xai
from keyed_xai import saliency
from keyed_xai.inference.runtime import Runtime
from keyed_xai.keys import write_owner_key
from keyed_xai.models.networks import SmallResNet
from keyed_xai.protection import ProtectSettings
from keyed_xai.training import TrainingSettings
from keyed_xai_cli.main import main
from tests.conftest import KEY, ROOT, draw_statistics
from tests.served import CARD, make_service, running, write_model

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOKENS = [token for page in PAGES for token in MarkdownIt().parse(page.read_text(encoding="utf-8"))]
SHELL = [line for token in TOKENS if token.type == "code_block" for line in token.content.splitlines()]
COMMANDS = [line for line in SHELL if line.startswith("keyed-xai ")]
MENTIONED = [
    child.content
    for token in TOKENS
    for child in token.children or ()
    if child.type == "code_inline" and child.content.startswith("keyed-xai ") and " --" in child.content
]
PROGRAMS = [token.content for token in TOKENS if token.type == "fence" and token.info == "python"]
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((ROOT / "keyed_xai").rglob("*.py"))
}

TRAINED = "--steps 1 --batch-size 4 --held-out 4"
SMALLEST = {
    "protect": f"{TRAINED} --wrong-keys 0",
    "verify": "--count 4 --decoys 9 --no-search",
    "audit": "--against consistency --no-controls --limit 20 --held-out 8 --decoys 9 --resume",
    "export": "--force",
    "train": "--arch SmallResNet --widths 4,6,6 --input-size 32 --epochs 6 --batch-size 8 --optimiser adam "
    "--learning-rate .05",
    "attack": TRAINED,
}
"""What is added to a command that makes something, or put in place of what it says, so that it ends in seconds."""
NOT_SHOWN = {"protect", "verify", "attack"}
"""Commands that show nothing with such settings: exit code 3."""
SMALLER = {"height=224, width=224": "height=64, width=64", "input=spec)": "input=spec, settings=SMALL)"}
SMALL = ProtectSettings(
    wrong_keys=0, flipped_keys=0, held_out_images=2, validation_images=2,
    training=TrainingSettings(steps=1, batch_size=4),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with the models and images that the examples start from."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in ("model.pt", "suspect.pt", "any-model.pt"):
        network = SmallResNet(3, 2, (4, 6, 6))
        draw_statistics(network)
        torch.save(network.state_dict(), name)
    generator = np.random.default_rng(0)
    for name, level in (("dark", 0), ("bright", 160)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = level + generator.integers(0, 90, (40, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{number}.png")
    for name in ("photo.jpg", "other.png"):
        Image.open("photos/dark/0.png").save(name)
    return tmp_path


def test_site_builds_without_a_warning_and_has_every_public_name(tmp_path):
    settings = ROOT / ".site" / "properdocs.yml"
    build = [sys.executable, "-m", "properdocs", "build", "--strict", "-f", settings, "-d", tmp_path / "site"]
    result = subprocess.run(build, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for page in PAGES:
        name = "" if page.name == "README.md" else f"docs/{page.stem}"
        assert (tmp_path / "site" / name / "index.html").is_file()
    root = (tmp_path / "site" / "reference" / "keyed_xai" / "index.html").read_text(encoding="utf-8")
    assert all(f'id="keyed_xai.{name}"' in root for name in keyed_xai.__all__)
    for name in MODULES:
        assert (tmp_path / "site" / "reference" / name.replace(".", "/") / "index.html").is_file()


def test_commands_of_the_pages_run_one_after_the_other(folder):
    assert len(COMMANDS) == sum(page.read_text(encoding="utf-8").count("\n    keyed-xai ") for page in PAGES)
    for line in COMMANDS:
        name, *arguments = words(line)
        if name == "serve":  # it ends when it is told to
            assert read_only(line).exit_code == 0
            continue
        if not {"--list", "--check"} & set(arguments):
            arguments += SMALLEST.get(name, "").split()
        result = CliRunner().invoke(main, [name, *arguments])
        assert result.exit_code == (3 if name in NOT_SHOWN else 0), f"{line}: {result.output}"


@pytest.mark.parametrize("line", MENTIONED)
def test_commands_in_the_text_are_understood(line, folder):
    (folder / "model.keyed").mkdir()
    for name in ("model.keyed/license.json", "W", "FILE"):
        (folder / name).touch()
    result = read_only(line)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("line", ["keyed-xai keygen --no-such-option", "keyed-xai explain", "keyed-xai bench nonsense"])
def test_command_that_is_not_understood_is_noticed(line):
    assert read_only(line).exit_code == 2


def words(line):
    return shlex.split(line, comments=True)[1:]


def read_only(line):
    """Have the commands that a line names read it, and run none of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(click.Command, "invoke", lambda *_: None)
        return CliRunner().invoke(main, words(line))


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs_of_the_pages_run(program, folder):
    assert all(any(said in each for each in PROGRAMS) for said in SMALLER)
    for said, smaller in SMALLER.items():
        program = program.replace(said, smaller)
    if "OwnerKey.generate()" not in program:
        write_owner_key(folder / "k.pem", KEY)
    write_model(folder / "model.onnx", card=CARD)
    with running(make_service({"model": Runtime.open(folder / "model.onnx", device="cpu")})) as address:
        (folder / "example.py").write_text(program.replace("localhost:8000", address))
        runpy.run_path(str(folder / "example.py"), {"SMALL": SMALL}, run_name="__main__")


@pytest.mark.parametrize("name", [name for name, file in MODULES.items() if ">>>" in file.read_text(encoding="utf-8")])
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", [each for each in saliency.__all__ if inspect.isfunction(getattr(saliency, each))])
def test_every_function_of_the_interpreters_has_an_example(name):
    function = inspect.unwrap(getattr(saliency, name))
    assert any(each.examples for each in doctest.DocTestFinder(recurse=False).find(function, name))
