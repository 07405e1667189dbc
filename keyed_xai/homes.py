"""Public names of a package that load from the modules they live in when they are first used."""

import importlib
import sys
from collections.abc import Callable, Mapping


def load_on_use(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return a package's `__getattr__` and `__dir__`, so that to import it loads none of the modules.

    Args:
        package: Name of the package.
        homes: Public name to the module that it lives in. `__getattr__` raises an AttributeError for other names, and
            an ImportError where the module is not in the distribution that is installed.
    """

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            home = importlib.import_module(homes[name])
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("keyed_xai."):
                raise
            raise ImportError(f"{name} is not part of keyed-xai-runtime. Install keyed-xai in its place.") from error
        return getattr(home, name)

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, list_names
