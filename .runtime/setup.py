"""Picks what keyed-xai-runtime is made of: `Runtime`, `Client`, and every module that they import, directly or not.

It runs whenever the distribution is built, so that no list has to be kept: in the repository, where `keyed_xai` and
`keyed_xai_schemas` are links, and in an sdist, where they are folders that hold what was picked before.
"""

import sys
from pathlib import Path

import grimp
from setuptools import setup
from setuptools.command.build_py import build_py

ROOTS = ("keyed_xai.inference", "keyed_xai.artifacts.folder")
"""The room of `Runtime` and `Client`, and who reads a model's folder, where clients find the trigger's parameters."""


def find_modules() -> set[str]:
    """Return the names of the modules: to import one is to import the packages around it too."""
    sys.path.insert(0, str(Path(__file__).parent))
    graph = grimp.build_graph("keyed_xai", exclude_type_checking_imports=True, cache_dir=None)
    found: set[str] = set()
    new = {each for root in ROOTS for each in (root, *graph.find_descendants(root))}
    while new:
        found |= new
        imported = {each for module in new for each in graph.find_modules_directly_imported_by(module)}
        new = (imported | {module.rpartition(".")[0] for module in new if "." in module}) - found
    return found


MODULES = find_modules()


class BuildPicked(build_py):
    """Takes the picked modules of a package instead of all."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Return package, name and file of each."""
        found = super().find_package_modules(package, package_dir)
        return [each for each in found if each[1] == "__init__" or f"{package}.{each[1]}" in MODULES]


packages = {name for name in MODULES if Path(__file__).parent.joinpath(*name.split("."), "__init__.py").exists()}
setup(packages=[*sorted(packages), "keyed_xai_schemas"], cmdclass={"build_py": BuildPicked})
