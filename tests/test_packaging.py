"""What the packages say of themselves, held against the tree; tests/test_distributions.py builds and installs them."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import keyed_xai

ROOT = Path(__file__).parent.parent


def read_settings(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


SETTINGS = read_settings(ROOT)


def find_bounds(settings):
    """Specifiers of dependencies by name, those of extras for users too."""
    project = settings["project"]
    extras = project.get("optional-dependencies", {})
    asked = [*project["dependencies"], *extras.get("timm", ()), *extras.get("heic", ()), *extras.get("bench", ())]
    requirements = map(Requirement, asked)
    return {canonicalize_name(each.name): str(each.specifier) for each in requirements}


def test_oldest_versions_tested_are_the_oldest_allowed():
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(name): f">={version}" for name, _, version in (line.partition("==") for line in lines)}
    bounds = find_bounds(SETTINGS)
    assert {name: pinned[name] for name in bounds} == bounds


def test_runtime_asks_for_the_same_versions():
    bounds = find_bounds(read_settings(ROOT / ".runtime"))
    everything = find_bounds(SETTINGS)
    assert bounds.pop("onnxruntime") == everything["onnxruntime-gpu"]
    assert bounds.items() < everything.items()


def test_links_lead_to_the_mapped_folders():
    folders = SETTINGS["tool"]["setuptools"]["package-dir"]
    links = [ROOT / ".mypy" / name for name in ("keyed_xai_benchmarks", "keyed_xai_cli", "keyed_xai_schemas")]
    links += [ROOT / ".runtime" / name for name in ("keyed_xai", "keyed_xai_schemas")]
    for link in links:
        assert link.resolve() == ROOT / folders[link.name]


def test_every_public_name_has_a_home():
    assert set(keyed_xai.__all__) == set(keyed_xai._HOMES)
    for name in keyed_xai.__all__:
        assert getattr(keyed_xai, name).__name__ == name
    assert set(keyed_xai.__all__) <= set(dir(keyed_xai))


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(keyed_xai, "nonsense")


@pytest.mark.parametrize("room", ["auditing", "backdoors", "explanation", "ownership", "protection"])
def test_room_loads_what_it_exports_on_use(room):
    program = f"import sys, keyed_xai.{room}\nassert not {{'torch', 'onnxruntime', 'rich'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
    package = importlib.import_module(f"keyed_xai.{room}")
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    assert set(package.__all__) <= set(dir(package))
