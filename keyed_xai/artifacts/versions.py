"""Versions of the packages that a result depends on."""

import importlib.metadata
import platform

_PACKAGES = ("torch", "torchvision", "numpy", "cryptography")


def package_versions() -> dict[str, str]:
    """Return package names to versions, this one's and Python's included."""
    from keyed_xai import __version__

    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"keyed-xai": __version__, "python": platform.python_version(), **found}
