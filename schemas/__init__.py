"""JSON Schemas (draft 2020-12) of every file and report that keyed-xai writes, and fixed key test vectors."""

import functools
import json
from importlib import resources
from typing import Any

SCHEMAS = (
    "attack-report",
    "audit-finding",
    "audit-report",
    "bench-figures",
    "card",
    "explain",
    "export",
    "inspect",
    "keygen",
    "license",
    "license-statement",
    "onnx-metadata",
    "paper-defences",
    "paper-defences-row",
    "paper-table",
    "protect-report",
    "serving-figures",
    "train-report",
    "verify-report",
)
"""Names that `load_schema` takes, in alphabetical order."""


@functools.cache
def load_schema(name: str) -> dict[str, Any]:
    """Return the JSON Schema called `name`; treat it as read-only, it is shared.

    Raises:
        ValueError: `name` is not one of `SCHEMAS`.
    """
    if name not in SCHEMAS:
        raise ValueError(f"Expected the name of a schema, one of {', '.join(SCHEMAS)}; got {name!r}.")
    return _load(f"{name}.json")


def load_key_vectors() -> dict[str, Any]:
    """Return the test vectors that every release must reproduce: what format version 1 derives from fixed keys."""
    return _load("key-vectors.json")


def _load(file_name: str) -> dict[str, Any]:
    text = resources.files(__name__).joinpath(file_name).read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document
