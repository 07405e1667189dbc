"""Distributions built from a copy of the tree, and folders to run them in that hold what they ask for and no more."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PARTS = ("pyproject.toml", "README.md", "LICENSE", "keyed_xai", "benchmarks", "cli", "schemas", ".runtime")
STANDS_IN = {"onnxruntime": "onnxruntime-gpu"}
"""The tests' environment can hold one of the two only."""


def build(name, folder):
    """The sdist and the wheel, made from the sdist, of the distribution in a folder of the tree ("." for its top)."""
    tree = folder / "tree"
    tree.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
            shutil.copytree(ROOT / part, tree / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / part, tree)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree / name)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def install(wheel, folder):
    """A Python whose packages are those of a wheel and links to what it requires, with what that requires."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/*/site-packages")
    (installed,) = metadata.distributions(path=[str(packages)], name=name_of(wheel))
    for name in find_required(installed):
        link(metadata.distribution(name), packages)
    return python


def find_required(distribution):
    """Names of the distributions that one needs, directly or not, as they stand in this environment."""
    found, waiting = set(), [(distribution, "")]
    while waiting:
        asking, extra = waiting.pop()
        for requirement in map(Requirement, asking.requires or ()):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = canonicalize_name(requirement.name)
            name = STANDS_IN.get(name, name)
            for each in ("", *requirement.extras):
                if (name, each) not in found:
                    found.add((name, each))
                    waiting.append((metadata.distribution(name), each))
    return {name for name, _ in found}


def link(distribution, folder):
    """Link what a distribution has at the top of its folder, scripts excepted."""
    for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
        if not (folder / top).exists():
            (folder / top).symlink_to(distribution.locate_file(top))


def list_files(wheel):
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if ".dist-info/" not in name}


def name_of(wheel):
    return wheel.name.partition("-")[0]


def run(*command):
    """Standard output of a command that ends well, in a folder and an environment that do not lead to the tree."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=sys.prefix, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
