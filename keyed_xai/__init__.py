"""License the saliency maps of an image classifier, and prove that it is yours, with a cryptographic key.

A user calls the names below; `import keyed_xai` loads none of them, nor torch, before they are used:

    protect, write_protection, explain, read_claim, load_probe, verify, export_onnx, Runtime, Client, run_attack, audit

The rooms of the package, in the order in which a model and its images pass them:

    keys, triggers, array_triggers    an owner key and the trigger it is turned into, on tensors and on arrays
    decoys                            what closed maps show
    models, data, saliency            networks, images and tables, interpreters and pooled maps
    metrics                           how maps and predictions are compared
    training                          the loss, the loop, its goals, checkpoints and pre-flight
    protection, backdoors             what protects a model; what attacks one as the paper does
    artifacts, reporting              files that are read and written; what people read
    explanation, ownership            maps of images; tests of whose a model is
    export, inference, serving        the ONNX graph; who runs it, without torch; who serves it
    threats, auditing                 attacks and defences; what runs them and reports
    demo                              the main job on data that come with the package
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keyed_xai.artifacts.folder import read_model_folder
    from keyed_xai.auditing import audit, open_suspect
    from keyed_xai.backdoors import run_attack
    from keyed_xai.errors import KeyedXAIError
    from keyed_xai.explanation import explain
    from keyed_xai.export.exporting import export_onnx
    from keyed_xai.inference.client import Client
    from keyed_xai.inference.runtime import Runtime
    from keyed_xai.keys import OwnerKey, read_owner_key, write_owner_key
    from keyed_xai.models import load_classifier, wrap_network
    from keyed_xai.ownership import load_probe, read_claim, verify, verify_ownership
    from keyed_xai.protection import protect, write_protection

__version__ = "0.1.0"
__all__ = [
    "Client",
    "KeyedXAIError",
    "OwnerKey",
    "Runtime",
    "audit",
    "explain",
    "export_onnx",
    "load_classifier",
    "load_probe",
    "open_suspect",
    "protect",
    "read_claim",
    "read_model_folder",
    "read_owner_key",
    "run_attack",
    "verify",
    "verify_ownership",
    "wrap_network",
    "write_owner_key",
    "write_protection",
]

_HOMES = {
    "Client": "keyed_xai.inference.client",
    "KeyedXAIError": "keyed_xai.errors",
    "OwnerKey": "keyed_xai.keys",
    "Runtime": "keyed_xai.inference.runtime",
    "audit": "keyed_xai.auditing",
    "explain": "keyed_xai.explanation",
    "export_onnx": "keyed_xai.export.exporting",
    "load_classifier": "keyed_xai.models",
    "load_probe": "keyed_xai.ownership",
    "open_suspect": "keyed_xai.auditing",
    "protect": "keyed_xai.protection",
    "read_claim": "keyed_xai.ownership",
    "read_model_folder": "keyed_xai.artifacts.folder",
    "read_owner_key": "keyed_xai.keys",
    "run_attack": "keyed_xai.backdoors",
    "verify": "keyed_xai.ownership",
    "verify_ownership": "keyed_xai.ownership",
    "wrap_network": "keyed_xai.models",
    "write_owner_key": "keyed_xai.keys",
    "write_protection": "keyed_xai.protection",
}


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


__getattr__, __dir__ = load_on_use(__name__, _HOMES)
