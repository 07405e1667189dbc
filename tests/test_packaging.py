"""What setuptools is told, held against the tree: a package left out is missing only from installed copies."""

import tomllib
from pathlib import Path

import keyed_xai

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_installed():
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "keyed_xai").rglob("__init__.py")
        if "__pycache__" not in file.parts
    }
    assert found | {"keyed_xai_benchmarks", "keyed_xai_cli", "keyed_xai_schemas"} == set(
        SETTINGS["tool"]["setuptools"]["packages"]
    )


def test_every_file_beside_the_code_is_installed():
    folders = SETTINGS["tool"]["setuptools"]["package-dir"]
    installed = set()
    for package, patterns in SETTINGS["tool"]["setuptools"]["package-data"].items():
        first, *rest = package.split(".")
        folder = ROOT.joinpath(folders[first], *rest)
        installed |= {file for pattern in patterns for file in folder.glob(pattern)}
    files = {file for folder in folders.values() for file in (ROOT / folder).rglob("*") if file.is_file()}
    beside = {file for file in files if file.suffix not in (".py", ".pyc")}
    assert beside == installed
    assert {file.name for file in beside} >= {"page.html", "base.html", "py.typed", "card.json", "common.json"}


def test_links_for_mypy_lead_to_the_mapped_folders():
    for name in ("keyed_xai_benchmarks", "keyed_xai_cli", "keyed_xai_schemas"):
        folder = SETTINGS["tool"]["setuptools"]["package-dir"][name]
        assert (ROOT / ".mypy" / name).resolve() == ROOT / folder


def test_every_public_name_has_a_home():
    assert set(keyed_xai.__all__) == set(keyed_xai._HOMES)
    for name in keyed_xai.__all__:
        assert getattr(keyed_xai, name).__name__ == name
    assert set(keyed_xai.__all__) <= set(dir(keyed_xai))


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(keyed_xai, "nonsense")
