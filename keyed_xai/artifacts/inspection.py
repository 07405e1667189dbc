"""What is in an artifact and what is wrong with it: all problems at once, where reading stops at the first."""

from collections.abc import Mapping
from pathlib import Path

from keyed_xai.artifacts.card import Card, read_card
from keyed_xai.artifacts.documents import Document, parse_json, printable, read_limited
from keyed_xai.artifacts.folder import CARD_FILE, LICENSE_FILE, describe_changes, describe_contradictions
from keyed_xai.artifacts.license import (
    LARGEST_LICENSE,
    License,
    SubjectState,
    check_subjects,
    read_license,
    verify_license,
)
from keyed_xai.errors import ArtifactError


def inspect_artifact(path: Path) -> Document:
    """Return a document of the schema "inspect" about a model's folder, a licence or a card.

    Raises:
        ArtifactError: It is none of them.
    """
    if path.is_dir():
        return _inspect_folder(path)
    document = parse_json(read_limited(path, LARGEST_LICENSE), origin=str(path))
    if "payloadType" in document:
        return _inspect_license(path, document)
    if str(document.get("schema")).startswith("keyed-xai/card/"):
        card = Card.from_json(document, origin=str(path))
        return _result(path, "card", card=card)
    raise ArtifactError(f"{printable(str(path))} is neither a licence nor a card, and not a model's folder.")


def _inspect_folder(folder: Path) -> Document:
    card, license_ = None, None
    problems: list[str] = []
    subjects: list[tuple[str, SubjectState]] = []
    signature = "invalid" if (folder / LICENSE_FILE).exists() else "absent"
    try:
        card = read_card(folder / CARD_FILE)
    except ArtifactError as error:
        problems.append(str(error))
    try:
        license_ = read_license(folder / LICENSE_FILE)
        signature = "valid"
        problems += describe_contradictions(card, license_) if card is not None else []
        subjects = check_subjects(license_, folder)
        problems += describe_changes(subjects)
    except ArtifactError as error:
        problems.append(str(error))
    return _result(
        folder, "model", card=card, license_=license_, signature=signature, states=dict(subjects), problems=problems
    )


def _inspect_license(path: Path, document: Document) -> Document:
    try:
        license_ = verify_license(document, origin=str(path))
    except ArtifactError as error:
        return _result(path, "license", signature="invalid", problems=[str(error)])
    states = dict.fromkeys(license_.subjects, "not checked")
    return _result(path, "license", license_=license_, signature="valid", states=states)


def _result(
    path: Path,
    kind: str,
    *,
    card: Card | None = None,
    license_: License | None = None,
    signature: str = "absent",
    states: Mapping[str, str] | None = None,
    problems: list[str] | None = None,
) -> Document:
    return {
        "schema": "keyed-xai/inspect/v1",
        "path": str(path),
        "kind": kind,
        "card": card.to_json() if card is not None else None,
        "license": license_.to_json() if license_ is not None else None,
        "signature": signature,
        "subjects": [{"name": name, "state": state} for name, state in (states or {}).items()],
        "problems": problems or [],
    }
