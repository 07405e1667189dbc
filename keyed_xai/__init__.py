"""License the saliency maps of an image classifier, and prove that it is yours, with a cryptographic key.

The names below load on first use, so that `import keyed_xai` itself does not load torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keyed_xai.artifacts.folder import read_model_folder
    from keyed_xai.attacking import run_attack
    from keyed_xai.auditing import audit
    from keyed_xai.errors import KeyedXAIError
    from keyed_xai.explanation import explain
    from keyed_xai.exporting import export_onnx
    from keyed_xai.keys import OwnerKey, read_owner_key
    from keyed_xai.models import load_classifier, wrap_network
    from keyed_xai.ownership import verify_ownership
    from keyed_xai.protection import protect
    from keyed_xai.suspects import open_suspect

__version__ = "0.1.0"
__all__ = [
    "KeyedXAIError",
    "OwnerKey",
    "audit",
    "explain",
    "export_onnx",
    "load_classifier",
    "open_suspect",
    "protect",
    "read_model_folder",
    "read_owner_key",
    "run_attack",
    "verify_ownership",
    "wrap_network",
]

_HOMES = {
    "KeyedXAIError": "keyed_xai.errors",
    "OwnerKey": "keyed_xai.keys",
    "audit": "keyed_xai.auditing",
    "explain": "keyed_xai.explanation",
    "export_onnx": "keyed_xai.exporting",
    "load_classifier": "keyed_xai.models",
    "open_suspect": "keyed_xai.suspects",
    "protect": "keyed_xai.protection",
    "read_model_folder": "keyed_xai.artifacts.folder",
    "read_owner_key": "keyed_xai.keys",
    "run_attack": "keyed_xai.attacking",
    "verify_ownership": "keyed_xai.ownership",
    "wrap_network": "keyed_xai.models",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted([*globals(), *_HOMES])
