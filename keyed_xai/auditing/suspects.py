"""A model to audit, on disk or in memory, and what is known about it."""

import reprlib
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.documents import printable, read_json
from keyed_xai.artifacts.folder import REPORT_FILE, read_model_folder
from keyed_xai.artifacts.opening import default_trigger, derive_trigger, open_model
from keyed_xai.artifacts.writer import is_attacked
from keyed_xai.errors import ArtifactError, KeyFormatError, ModelError
from keyed_xai.keys import OwnerKey
from keyed_xai.models import Classifier
from keyed_xai.models.loading import ModelChoices
from keyed_xai.triggers import Trigger
from keyed_xai.triggers.public import PUBLIC_TRIGGERS

_LARGEST_GRID = 64
KINDS = ("keyed", "attacked", "plain")


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A model to audit.

    Attributes:
        name: Name for reports; no path of this machine.
        kind: "keyed" behind a gate that answers to a key, "attacked" with a public trigger, or "plain".
        classifier: The model audited.
        interpreters: Names in INTERPRETERS whose maps are compared.
        grid: Rows and columns of the pooled maps; None takes the target layer's, at most 8 x 8.
        inverted: Whether maps are right only with the trigger.
        signature: Whether unkeyed maps show the owner's public pattern.
        key: The owner's, secret; None where it is not known.
        parameters: Parameters of the key's trigger.
        trigger: The key's, secret, or the public one; None where it is not known.
        reference: The model before it was protected or attacked.
        surrogate: An attacker's own model of the same task.
        licensed: When the owner's licence was signed; None without one.
    """

    name: str
    kind: str
    classifier: Classifier
    interpreters: tuple[str, ...] = ("gradcam",)
    grid: tuple[int, int] | None = None
    inverted: bool = False
    signature: bool = False
    key: OwnerKey | None = field(default=None, repr=False)
    parameters: TriggerParameters = TriggerParameters("spread", 8.0, 32)
    trigger: Trigger | None = field(default=None, repr=False)
    reference: Classifier | None = field(default=None, repr=False)
    surrogate: Classifier | None = field(default=None, repr=False)
    licensed: datetime | None = None

    def __post_init__(self) -> None:
        """Check that the models take the same images to the same classes.

        Raises:
            ModelError: They do not.
        """
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}; got {self.kind!r}")
        for name in ("reference", "surrogate"):
            other = getattr(self, name)
            if other is not None and _shape(other) != _shape(self.classifier):
                raise ModelError(
                    f"The {name} takes images and gives classes of {_shape(other)}, the model of "
                    f"{_shape(self.classifier)} (channels, height, width, classes). Give one of the same task."
                )


def open_suspect(
    path: Path,
    *,
    key: OwnerKey | None = None,
    reference: Path | None = None,
    surrogate: Path | None = None,
    options: ModelChoices | None = None,
) -> Suspect:
    """Return the model in a protected model's folder, in an attacked model's, or in a file of weights.

    Args:
        path: The folder or file. A file that is audited with a key counts as protected with the default settings.
        key: The owner's, for a protected model.
        reference: File of the model before it was protected or attacked.
        surrogate: File of an attacker's own model of the same task.
        options: How the model is run, as `loading.open_model` takes it; `allow_pickle` and `network` go for all three.

    Raises:
        ArtifactError: A folder is malformed, or not as signed.
        ModelError: Weights cannot be read or recognised, or the models do not fit each other.
        KeyFormatError: The key is not the owner's, or the model answers to none.
    """
    options = options or {}
    attacked = path.is_dir() and is_attacked(path)
    classifier, card = open_model(path, **options)
    allow_pickle, network = options.get("allow_pickle", False), options.get("network")
    others: dict[str, Any] = {
        name: open_model(file, card=card, allow_pickle=allow_pickle, network=network)[0]
        for name, file in (("reference", reference), ("surrogate", surrogate))
        if file is not None
    }
    name = printable(path.name)[:200] or "model"
    if attacked:
        if key is not None:
            raise KeyFormatError(f"{name} was attacked with a public trigger, not protected: leave out the key.")
        return Suspect(name=name, kind="attacked", classifier=classifier, **_read_attack(path), **others)
    if card is None and key is None:
        return Suspect(name=name, kind="plain", classifier=classifier, **others)
    protection: dict[str, Any] = {"inverted": True, "signature": True}
    if card is not None:
        protection |= {"interpreters": card.interpreters, "grid": card.grid, "parameters": card.trigger}
        protection["signature"] = card.decoy == "signature"
    if key is not None:
        protection["licensed"] = _read_time(path, key)
        parameters = protection.setdefault("parameters", default_trigger(classifier.input))
        protection |= {"key": key, "trigger": derive_trigger(key, parameters)}
    return Suspect(name=name, kind="keyed", classifier=classifier, **protection, **others)


def _read_attack(folder: Path) -> dict[str, Any]:
    """Return what an attack's report says about trigger and maps."""
    report = read_json(folder / REPORT_FILE, "attack-report")
    settings, trigger = report["settings"], report["trigger"]["family"]
    if trigger not in PUBLIC_TRIGGERS:
        raise ArtifactError(
            f"{printable(str(folder))} was attacked with the trigger {printable(trigger)}; an audit knows models of "
            f"images, with the triggers {', '.join(PUBLIC_TRIGGERS)}."
        )
    grid = settings.get("grid")
    if grid is not None and not _is_grid(grid):
        raise ArtifactError(
            f"{printable(str(folder))}: expected the report's grid as rows and columns from 1 to {_LARGEST_GRID}, got "
            f"{reprlib.repr(grid)}. Attack the model again."
        )
    return {
        "interpreters": tuple(report["interpreters"]),
        "grid": (grid[0], grid[1]) if grid is not None else None,
        "inverted": report["setting"] == "inverted",
        "trigger": PUBLIC_TRIGGERS[trigger](),
    }


def _is_grid(value: object) -> bool:
    """Return whether a value from a report is rows and columns."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(side) is int and 1 <= side <= _LARGEST_GRID for side in value)
    )


def _read_time(path: Path, key: OwnerKey) -> datetime | None:
    """Return when a protected model's folder was signed, and check that it was with this key; None for a file."""
    if not path.is_dir():
        return None
    license = read_model_folder(path).license
    signed = license.public_key
    if signed.raw != key.public.raw:
        raise KeyFormatError(
            f"{printable(path.name)} was protected with the key {signed.key_id[:16]}, and the key given is "
            f"{key.public.key_id[:16]}. Give the owner's, or none."
        )
    return license.time


def _shape(classifier: Classifier) -> tuple[int, int, int, int]:
    spec = classifier.input
    return *spec.shape, classifier.classes
