"""JSON documents that are validated both ways, and files that appear whole or not at all."""

import functools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from keyed_xai.errors import ArtifactError
from keyed_xai.outputs import claimed, sync_folder
from keyed_xai_schemas import load_schema

Document = dict[str, Any]
"""A JSON object."""
LARGEST_DOCUMENT = 16 * 1024 * 1024
"""Bytes; a longer file is refused before it is parsed."""
_LONGEST_QUOTE = 80
_MOST_CONTAINERS = 50_000
_MOST_DIGITS = 20  # of a whole number, its sign counted: 64 bits


def read_json(path: Path, schema: str, *, largest: int = LARGEST_DOCUMENT) -> Document:
    """Return the JSON object in a file, once it fits the schema.

    Args:
        path: The file to read.
        schema: Name of a schema of `keyed_xai_schemas`, such as "card".
        largest: Most bytes the file may have.

    Raises:
        ArtifactError: The file cannot be read, is too large, is not JSON, or does not fit.
    """
    document = parse_json(read_limited(path, largest), origin=str(path))
    validate(document, schema, origin=str(path))
    return document


def write_json(path: Path, document: Mapping[str, Any], *, schema: str) -> None:
    """Write a document that fits its schema, whole or not at all; an existing file is replaced.

    Raises:
        ArtifactError: The document does not fit, or the file cannot be written.
    """
    write_atomically(path, encode_json(document, schema=schema).encode())


def encode_json(document: Mapping[str, Any], *, schema: str) -> str:
    """Return a document that fits its schema as indented JSON with a newline at the end.

    Raises:
        ArtifactError: The document does not fit, or holds something that JSON has no word for, such as NaN.
    """
    try:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"The {schema} document cannot be written as JSON: {error}.") from error
    validate(json.loads(text), schema, origin=f"the {schema} document")
    return text + "\n"


def parse_json(data: bytes, *, origin: str) -> Document:
    """Return the JSON object in `data`; more strict than json.loads.

    Refused on top: anything but UTF-8, duplicate names, NaN, infinite numbers, whole numbers of more than 64 bits, half
    a surrogate pair, nesting that is too deep to parse, and more lists and objects than any document of ours has: each
    costs many times its text's bytes.

    Args:
        data: The document's bytes.
        origin: What the message calls the place they come from.

    Raises:
        ArtifactError: The bytes are not such an object.
    """
    try:
        if (containers := data.count(b"{") + data.count(b"[")) > _MOST_CONTAINERS:
            raise ValueError(f"expected at most {_MOST_CONTAINERS} lists and objects, got up to {containers}")
        document = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_check_unique_names,
            parse_constant=_raise_constant,
            parse_float=_finite_float,
            parse_int=_short_int,
        )
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else _why(error)
        raise ArtifactError(f"{printable(origin)} is not a valid JSON document: {reason}.") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{printable(origin)}: expected a JSON object, got {_quote(document)}.")
    return document


def validate(document: object, schema: str, *, origin: str) -> None:
    """Check a parsed document against a schema.

    Raises:
        ArtifactError: It does not fit; the message names the place, what was expected there and what came.
    """
    error = next(_validator(schema).iter_errors(document), None)  # the first: bounds the work
    if error is not None:
        raise ArtifactError(f"{printable(origin)} does not fit the schema {schema!r}: {_describe(error)}.")


def read_limited(path: Path, largest: int) -> bytes:
    """Return a regular file's bytes.

    Raises:
        ArtifactError: It is no regular file, cannot be read, or has more than `largest` bytes.
    """
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{printable(str(path))} is not a regular file.")
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file name"
        raise ArtifactError(f"Cannot read {printable(str(path))}: {reason}.") from error
    if len(data) > largest:
        raise ArtifactError(f"{printable(str(path))} has more than {largest} bytes, the most that is read.")
    return data


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a draft beside `path`, flush it to the disk, and move it into place; the folder is made.

    Raises:
        ArtifactError: The file cannot be written, or another process is writing it; what was there before is as it was.
    """
    with writing(path), claimed(path) as draft:
        try:
            write_through(draft, data)
            draft.replace(path)
            sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)


def write_openly(path: Path, data: bytes) -> None:
    """Write a secret under its own name, where nobody overlooks it: a killed process leaves part of it, never a draft.

    Raises:
        ArtifactError: The file cannot be written, or another process is writing it; then it is not there.
    """
    with writing(path), claimed(path):
        path.unlink(missing_ok=True)
        try:
            write_through(path, data)
            sync_folder(path.parent)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_through(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says while `path` is written into an ArtifactError."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"Cannot write {printable(str(path))}: {error.strerror or error}.") from error


def printable(text: str) -> str:
    """Return text from outside on one line and without control characters, so that it cannot steer a terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


@functools.cache
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator(load_schema(schema))


def _check_unique_names(pairs: list[tuple[str, Any]]) -> Document:
    document = dict(pairs)
    if len(document) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {_quote(twice)} stands twice in one object")
    return document


def _raise_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {_quote(text)} is out of range")
    return number


def _short_int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"the number {_quote(text)} is out of range")
    return int(text)


def _why(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeError):
        return "it is not UTF-8 text"
    return str(error)


def _describe(error: ValidationError) -> str:
    place = _shorten(printable(error.json_path))
    expected, instance = error.validator_value, error.instance
    if error.validator == "required" and isinstance(expected, list) and isinstance(instance, dict):
        missing = next(name for name in expected if name not in instance)
        return f"at {place}, expected the field {missing!r}, got an object without it"
    if error.validator == "additionalProperties" and isinstance(error.schema, Mapping) and isinstance(instance, dict):
        known = error.schema.get("properties", {})
        extra = next((name for name in instance if name not in known), "")
        return f"at {place}, expected no fields but {', '.join(known)}; got {_quote(extra)}"
    return f"at {place}, expected {error.validator} {_quote(expected)}, got {_quote(instance)}"


def _quote(value: object) -> str:
    return _shorten(json.dumps(value, ensure_ascii=True))


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."
