"""A network built by the user's own code, which weights alone do not rebuild."""

import importlib
import os
import sys
from collections.abc import Callable

from torch import nn

from keyed_xai.errors import ModelError

_AS_IN = "Expected PACKAGE.MODULE:CALLABLE, as in my_models.nets:make_net"


def build_with_factory(factory: str) -> nn.Module:
    """Return the network that a factory makes: **imports and runs the code that it names**.

    Only a user names a factory, never a file.

    Args:
        factory: ``package.module:callable``, looked for as Python looks for modules, then in the working folder. It is
            called without arguments and returns a network; weights are loaded into it afterwards.

    Raises:
        ModelError: There is no such module or callable, it fails, or it returns something else.
    """
    module_name, _, path = factory.partition(":")
    if not path or not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise ModelError(f"{_AS_IN}; got {factory!r}.")
    try:
        made = _find(module_name, path)()
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001 - the user's own code may raise anything
        raise ModelError(f"the factory {factory} failed: {type(error).__name__}: {error}. Mend it.") from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"the factory {factory} must return a torch.nn.Module, but returned {type(made).__name__}.")
    return made


def _find(module_name: str, path: str) -> Callable[[], object]:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ModelError(f"there is no module {module_name}, neither installed nor in this folder. {_AS_IN}.") from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise ModelError(f"{module_name} has no {path}. {_AS_IN}.")
        found = getattr(found, name)
    if not callable(found):
        raise ModelError(f"{module_name}:{path} is of type {type(found).__name__}, not a callable. {_AS_IN}.")
    return found
