"""JSON Schemas (draft 2020-12) of every file and report that keyed-xai writes, and fixed key test vectors.

What several schemas share stands in one place, `common.json` or the schema that it belongs to most, and the others name
it by `$ref` with the name of its file, as validators of other makes resolve it beside a schema. Here it is put in its
place once, when a schema is loaded: to look it up again for every value would make validating slower, most of all for
lists as long as a stranger likes.
"""

import functools
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from referencing import Registry
from referencing.retrieval import to_cached_resource

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
    """Return the JSON Schema called `name`, whole, without any `$ref`; treat it as read-only, it is shared.

    Raises:
        ValueError: `name` is not one of `SCHEMAS`.
    """
    if name not in SCHEMAS:
        raise ValueError(f"Expected the name of a schema, one of {', '.join(SCHEMAS)}; got {name!r}.")
    file = f"{name}.json"
    return _whole(_FILES.get_or_retrieve(file).value.contents, file)


def load_key_vectors() -> dict[str, Any]:
    """Return the test vectors that every release must reproduce: what format version 1 derives from fixed keys."""
    vectors: dict[str, Any] = json.loads(_read("key-vectors.json"))
    return vectors


def _whole(part: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Return a part of a file with what its `$ref`s name in their place; a description beside a `$ref` goes first."""
    own = {
        keyword: _whole(value, file) if isinstance(value, dict) else value
        for keyword, value in part.items()
        if keyword not in ("$ref", "$defs")
    }
    if "$ref" not in part:
        return own
    named = _FILES.resolver(file).lookup(part["$ref"]).contents
    there = _whole(named, part["$ref"].partition("#")[0] or file)
    return own | {keyword: value for keyword, value in there.items() if keyword not in ("$schema", "$id", *own)}


def _read(file: str) -> str:
    return resources.files(__name__).joinpath(file).read_text(encoding="utf-8")


_FILES: Registry[Mapping[str, Any]] = Registry(
    retrieve=to_cached_resource()(_read)  # type: ignore[call-arg] # attrs' argument, which mypy does not see
)
