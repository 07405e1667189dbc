"""Licences: an in-toto Statement in a DSSE envelope, signed with the owner key.

The statement lists the SHA-256 digests of a protected model's files and binds them to the owner's public key, to a
commitment to the secret trigger, and to a time. Whoever holds the model can check it without the owner; that the key
*inside* is the one expected is for the caller to settle (`verify_license(..., expected=...)`).

Sources: in-toto Attestation Framework, Statement v1; DSSE v1.0.2 (pre-authentication encoding). Differences: exactly
one signature, standard base64 only, and `keyid` must fit the key.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from keyed_xai.artifacts.card import Card, TriggerParameters
from keyed_xai.artifacts.documents import Document, parse_json, printable, read_json, validate
from keyed_xai.errors import ArtifactError, KeyFormatError
from keyed_xai.keys import OwnerKey, PublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://keyed-xai.dev/license/v1"
VERSION = "keyed-xai/license/v1"
LARGEST_LICENSE = 2 * 1024 * 1024
"""Bytes of a license.json."""
_TIME = "%Y-%m-%dT%H:%M:%SZ"

SubjectState = Literal["ok", "missing", "changed"]


@dataclass(frozen=True, kw_only=True)
class License:
    """What a licence says, once its signature has been checked.

    Attributes:
        public_key: The owner's; the signature holds under it.
        commitment: Hex SHA-256 that binds the owner to the trigger's seed and hides it.
        trigger: Public parameters of the trigger.
        decoy: "signature", "boundary" or "nontargeted".
        interpreters: Names that were protected.
        grid: Rows and columns of the pooled map.
        time: When it was signed, UTC, by the owner's clock.
        subjects: Hex SHA-256 of every file the licence covers, by its path inside the folder.
    """

    public_key: PublicKey
    commitment: str
    trigger: TriggerParameters
    decoy: str
    interpreters: tuple[str, ...]
    grid: tuple[int, int]
    time: datetime
    subjects: Mapping[str, str]

    def to_json(self) -> Document:
        """Return what the licence says about the owner and the model, without the subjects."""
        return {
            "key_id": self.public_key.key_id,
            "public_key": self.public_key.to_pem().decode(),
            "commitment": self.commitment,
            "trigger": self.trigger.to_json(),
            "decoy": self.decoy,
            "interpreters": list(self.interpreters),
            "grid": list(self.grid),
            "time": self.time.strftime(_TIME),
        }


def sign_license(
    owner: OwnerKey, subjects: Mapping[str, Path | bytes], *, card: Card, time: datetime | None = None
) -> Document:
    """Return the signed envelope of a licence.

    Args:
        owner: Signs, and is named as the owner.
        subjects: Files (or their bytes) by their path inside the model's folder, with forward slashes.
        card: Says which trigger, decoy, interpreters and grid the owner claims.
        time: When it is signed; now by default. Whole seconds are kept.

    Raises:
        ArtifactError: A name leads out of the folder, or a file cannot be read.
        ValueError: `time` has no time zone.
    """
    signed_at = (time or datetime.now(UTC)).replace(microsecond=0)
    if signed_at.tzinfo is None:
        raise ValueError("Expected a time with a time zone, got one without.")
    license_ = License(
        public_key=owner.public,
        commitment=owner.commitment(card.trigger.family, version=card.trigger.version),
        trigger=card.trigger,
        decoy=card.decoy,
        interpreters=card.interpreters,
        grid=card.grid,
        time=signed_at.astimezone(UTC),
        subjects={name: digest(content) for name, content in sorted(subjects.items())},
    )
    statement = _statement(license_)
    validate(statement, "license-statement", origin="the licence's statement")
    payload = json.dumps(statement, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    signature = owner.sign(encode_for_signing(PAYLOAD_TYPE, payload))
    envelope: Document = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": owner.public.key_id, "sig": base64.b64encode(signature).decode()}],
    }
    validate(envelope, "license", origin="the licence")
    return envelope


def verify_license(
    envelope: Mapping[str, Any], *, expected: PublicKey | None = None, origin: str = "the licence"
) -> License:
    """Return what a licence says, once its signature holds under the key it names.

    Args:
        envelope: The DSSE envelope, parsed.
        expected: The owner it must name; anybody can sign a licence for themselves.
        origin: What messages call the place it comes from.

    Raises:
        ArtifactError: Anything about it is malformed, contradictory, or not as signed.
    """
    validate(envelope, "license", origin=origin)
    payload = _decode(envelope["payload"], origin)
    statement = parse_json(payload, origin=f"the statement in {origin}")
    validate(statement, "license-statement", origin=f"the statement in {origin}")
    license_ = _license(statement, origin)
    owner, signature = license_.public_key, envelope["signatures"][0]
    if not statement["predicate"]["key_id"] == signature["keyid"] == owner.key_id:
        raise ArtifactError(f"{printable(origin)}: the key's fingerprint does not fit the public key it names.")
    if not owner.verify(_decode(signature["sig"], origin), encode_for_signing(envelope["payloadType"], payload)):
        raise ArtifactError(f"{printable(origin)}: the signature does not hold. The licence was changed after signing, "
                            "or signed with another key.")  # fmt: skip
    if expected is not None and expected.raw != owner.raw:
        raise ArtifactError(f"{printable(origin)} is signed by {owner.key_id[:16]}, expected {expected.key_id[:16]}.")
    return license_


def read_license(path: Path, *, expected: PublicKey | None = None) -> License:
    """Return what the licence in a file says; see `verify_license`.

    Raises:
        ArtifactError: The file cannot be read, or the licence does not hold.
    """
    return verify_license(read_json(path, "license", largest=LARGEST_LICENSE), expected=expected, origin=str(path))


def check_subjects(license_: License, folder: Path) -> list[tuple[str, SubjectState]]:
    """Return the state of every file the licence covers, compared with its digest.

    A link that leads out of the folder counts as changed. Files the licence does not list are not looked at.
    """
    return [(name, _subject_state(folder, name, wanted)) for name, wanted in license_.subjects.items()]


def digest(content: Path | bytes) -> str:
    """Return the hex SHA-256 of bytes or of a file.

    Raises:
        ArtifactError: The file cannot be read.
    """
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    try:
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"Cannot read {printable(str(content))}: {error.strerror}.") from error


def encode_for_signing(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that DSSE signs: its pre-authentication encoding, version 1."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _statement(license_: License) -> Document:
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": value}} for name, value in license_.subjects.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"version": VERSION, **license_.to_json()},
    }


def _license(statement: Document, origin: str) -> License:
    """Read a statement that fits its schema; check what no schema can."""
    predicate = statement["predicate"]
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    if len(subjects) != len(statement["subject"]):
        raise ArtifactError(f"{printable(origin)} lists a file twice.")
    try:
        public_key = PublicKey.from_pem(predicate["public_key"].encode())
        time = datetime.strptime(predicate["time"], _TIME).replace(tzinfo=UTC)
    except (KeyFormatError, ValueError) as error:
        raise ArtifactError(f"{printable(origin)}: {error}") from error
    rows, columns = map(int, predicate["grid"])
    return License(
        public_key=public_key,
        commitment=predicate["commitment"],
        trigger=TriggerParameters.from_json(predicate["trigger"]),
        decoy=predicate["decoy"],
        interpreters=tuple(predicate["interpreters"]),
        grid=(rows, columns),
        time=time,
        subjects=subjects,
    )


def _decode(text: str, origin: str) -> bytes:
    """Decode base64 that has one spelling only: no stray bits after the last byte."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ArtifactError(f"{printable(origin)} holds malformed base64.") from error
    if base64.b64encode(data).decode() != text:
        raise ArtifactError(f"{printable(origin)} holds base64 that is not in its one canonical spelling.")
    return data


def _subject_state(folder: Path, name: str, wanted: str) -> SubjectState:
    # The schema keeps "..", absolute paths and drives out of names; links are settled here.
    path = folder.joinpath(*PurePosixPath(name).parts)
    if not path.exists():
        return "missing"
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return "changed"
    return "ok" if digest(path) == wanted else "changed"
