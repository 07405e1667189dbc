"""Owner keys, sub-keys and the byte stream that triggers and patterns are drawn from. Bytes in, bytes out.

Formats are numbered; each trigger family says which it is at::

    ikm     = the 32 raw bytes of the Ed25519 private key
    salt    = SHA-256(raw public key)
    seed_i  = HKDF-SHA256(ikm, salt, info = "keyed-xai/v<version>/trigger/<family>/<index>", 32 bytes)
    stream  = SHAKE-256(seed_i), read as little-endian uint32 words

The derivation is one-way: nobody can choose a trigger and then find a key for it. Test vectors are in
``schemas/key-vectors.json``. Seeds are secrets like the key itself; commitments to them are not.
"""

import base64
import binascii
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from keyed_xai.errors import KeyFormatError
from keyed_xai.outputs import claimed, sync_folder

SEED_BYTES = 32
_HOW_TO_MAKE_ONE = "Make one with `keyed-xai keygen -o k.pem`."
_LARGEST_PEM = 64 * 1024
_MOST_ROUNDS = 2_000_000  # of PBKDF2: a second or so
_ROUNDS = re.compile(rb"\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0c\x30.\x04(.)", re.DOTALL)  # its name; then salt, rounds
_PRIVATE_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY)-----.*?-----END \1-----", re.DOTALL)
# RFC 5958, section 2, and RFC 8410, section 7: version 2, Ed25519, 32 bytes, then attributes and the public key.
_VERSION_2 = re.compile(
    rb"\x30(?:[\x00-\x7f]|\x81.)\x02\x01\x01\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20(.{32})", re.DOTALL
)
_PUBLIC_IN_VERSION_2 = re.compile(rb"(?:\x81\x21|\xa1\x23\x03\x21)\x00(.{32})\Z", re.DOTALL)
_NO_KEY = (ValueError, UnsupportedAlgorithm, InternalError)  # what cryptography raises; the last for other curves' keys
_FIRST_WORDS = 64


class ByteStream:
    """SHAKE-256 of a seed, read once from front to back as little-endian uint32 words."""

    def __init__(self, seed: bytes) -> None:
        """Start at the first word.

        Args:
            seed: Any bytes; 32 for every seed this module derives.
        """
        self._seed = seed
        self._words: NDArray[np.uint32] = np.empty(0, np.uint32)  # the stream's beginning
        self._words_read = 0

    def __repr__(self) -> str:
        """Name the kind of object only: the seed is a secret."""
        return "ByteStream(<secret>)"

    def uint32(self, count: int) -> NDArray[np.uint32]:
        """Return the next `count` words."""
        start, self._words_read = self._words_read, self._words_read + count
        if self._words_read > len(self._words):  # hashed anew at twice the length: linear in all words read
            digest = hashlib.shake_256(self._seed).digest(4 * max(self._words_read, 2 * len(self._words), _FIRST_WORDS))
            self._words = np.frombuffer(digest, dtype="<u4")
        return self._words[start : self._words_read].astype(np.uint32)

    def below(self, bound: int) -> int:
        """Return the next unbiased integer in [0, bound), by rejection of the words past the last full multiple."""
        limit = 2**32 - 2**32 % bound
        while (word := int(self.uint32(1)[0])) >= limit:
            pass
        return word % bound

    def shuffle(self, count: int) -> NDArray[np.int64]:
        """Return a uniformly random permutation of 0 .. count - 1 (Fisher-Yates, from the last place to the first)."""
        order = np.arange(count, dtype=np.int64)
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


class PublicKey:
    """The public half of an owner key: who signed a licence, and which signature pattern a model should show."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        """Wrap a key of the cryptography package."""
        self._key = key
        self.raw: bytes = key.public_bytes_raw()

    def __repr__(self) -> str:
        """Show the key's fingerprint."""
        return f"PublicKey({self.key_id[:16]})"

    @classmethod
    def from_raw(cls, raw: bytes) -> "PublicKey":
        """Return the key with these 32 raw bytes.

        Raises:
            KeyFormatError: `raw` is not 32 bytes.
        """
        try:
            return cls(Ed25519PublicKey.from_public_bytes(raw))
        except ValueError as error:
            raise KeyFormatError(f"Expected a raw Ed25519 public key of 32 bytes, got {len(raw)} bytes.") from error

    @classmethod
    def from_pem(cls, data: bytes) -> "PublicKey":
        """Return the key in a SubjectPublicKeyInfo PEM.

        Raises:
            KeyFormatError: The bytes hold anything but an Ed25519 public key.
        """
        if b"PRIVATE KEY-----" in data:
            raise KeyFormatError("Expected a public key, got a private one. Never hand out the private key.")
        try:
            key = serialization.load_pem_public_key(data)
        except _NO_KEY as error:
            raise KeyFormatError("Expected an Ed25519 public key in PEM form; the bytes are not one.") from error
        if not isinstance(key, Ed25519PublicKey):
            raise KeyFormatError(f"Expected an Ed25519 public key, got {_kind(key)}.")
        return cls(key)

    def to_pem(self) -> bytes:
        """Return the key as a SubjectPublicKeyInfo PEM."""
        return self._key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    @property
    def key_id(self) -> str:
        """SHA-256 of the raw public key, hex."""
        return hashlib.sha256(self.raw).hexdigest()

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Return whether `signature` is this key's Ed25519 signature of `message`."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def derive_public_seed(self, name: str) -> bytes:
        """Return the public 32-byte seed called `name`, such as "decoy/gradcam"; anybody can derive it."""
        return _hkdf(self.raw, public=self.raw, name=f"v1/{name}")


class OwnerKey:
    """An Ed25519 private key. Its bytes leave this object only through `to_pem` and derived seeds."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        """Wrap a key of the cryptography package."""
        self._key = key
        self.public = PublicKey(key.public_key())

    def __repr__(self) -> str:
        """Show the public fingerprint only."""
        return f"OwnerKey(public={self.public.key_id[:16]})"

    @classmethod
    def generate(cls) -> "OwnerKey":
        """Return a new key from the operating system's random source."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_raw(cls, raw: bytes) -> "OwnerKey":
        """Return the key with these 32 raw private bytes.

        Raises:
            KeyFormatError: `raw` is not 32 bytes.
        """
        if len(raw) != SEED_BYTES:
            raise KeyFormatError(f"Expected {SEED_BYTES} raw Ed25519 private bytes, got {len(raw)}.")
        return cls(Ed25519PrivateKey.from_private_bytes(raw))

    @classmethod
    def from_pem(cls, data: bytes, passphrase: bytes | None = None) -> "OwnerKey":
        """Return the key in a PKCS#8 PEM, of version 1 or 2; its public key may stand in the same file.

        Raises:
            KeyFormatError: The bytes hold anything but one Ed25519 private key and its public one, or the passphrase
                does not fit.
        """
        blocks = [found[0] for found in _PRIVATE_BLOCK.finditer(data)]
        if len(blocks) == 1:
            key = cls._from_block(blocks[0] + b"\n", passphrase)
            key._check_public(data)
            return key
        if blocks:
            raise KeyFormatError(f"Expected one private key, got {len(blocks)} in one file. Leave the owner's alone.")
        return cls._from_block(data, passphrase)

    @classmethod
    def _from_block(cls, data: bytes, passphrase: bytes | None) -> "OwnerKey":
        _check_private_pem(data)
        _check_derivation(data)
        if (raw := _read_version_2(data)) is not None:
            if passphrase is not None:
                raise KeyFormatError(_passphrase_complaint(passphrase))
            return cls.from_raw(raw)
        try:
            key = serialization.load_pem_private_key(data, passphrase)
        except TypeError as error:
            raise KeyFormatError(_passphrase_complaint(passphrase)) from error
        except _NO_KEY as error:
            if passphrase is not None and b"ENCRYPTED" in data:
                raise KeyFormatError("The passphrase does not open this key, or the file is damaged.") from error
            raise KeyFormatError(f"The private key is malformed or cut short. {_HOW_TO_MAKE_ONE}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFormatError(f"Expected an Ed25519 private key, got {_kind(key)}. {_HOW_TO_MAKE_ONE}")
        return cls(key)

    def _check_public(self, data: bytes) -> None:
        """Refuse a public key beside the private one that is not its own."""
        start = data.find(b"-----BEGIN PUBLIC KEY-----")
        if start >= 0 and PublicKey.from_pem(_PRIVATE_BLOCK.sub(b"", data)).raw != self.public.raw:
            raise KeyFormatError("The private and the public key in the file do not belong together. Take one out.")

    def to_pem(self, passphrase: bytes | None = None) -> bytes:
        """Return the key as PKCS#8 PEM, encrypted when a passphrase is given.

        Raises:
            ValueError: The passphrase is empty.
        """
        if passphrase == b"":
            raise ValueError("The passphrase is empty: give one of at least one byte, or none at all.")
        encryption: serialization.KeySerializationEncryption = (
            serialization.NoEncryption() if passphrase is None else serialization.BestAvailableEncryption(passphrase)
        )
        return self._key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature of `message`."""
        return self._key.sign(message)

    def derive_seed(self, family: str, index: int = 0, *, version: int = 1) -> bytes:
        """Return the secret 32-byte seed of a trigger.

        Args:
            family: Trigger family, such as "spread".
            index: 0 for the owner's own trigger, above for licensees.
            version: The family's; seeds of several say nothing of each other.
        """
        name = f"v{version}/trigger/{family}/{index}"
        return _hkdf(self._key.private_bytes_raw(), public=self.public.raw, name=name)

    def one_bit_neighbours(self) -> Iterator["OwnerKey"]:
        """Yield the 256 keys whose private bytes differ from these in one bit."""
        raw = self._key.private_bytes_raw()
        for bit in range(8 * SEED_BYTES):
            flipped = bytearray(raw)
            flipped[bit // 8] ^= 1 << bit % 8
            yield OwnerKey.from_raw(bytes(flipped))

    def commitment(self, family: str, index: int = 0, *, version: int = 1) -> str:
        """Return a hex SHA-256 that binds the owner to a trigger's seed and hides it."""
        return commit_to_seed(self.derive_seed(family, index, version=version))


def commit_to_seed(seed: bytes) -> str:
    """Return the hex SHA-256 that a licence publishes for a secret seed of 256 bits."""
    return hashlib.sha256(b"keyed-xai/v1/commitment\0" + seed).hexdigest()


def read_owner_key(path: Path, passphrase: bytes | None = None) -> OwnerKey:
    """Return the owner key in a PEM file.

    Raises:
        KeyFormatError: The file cannot be read or holds no Ed25519 private key; the message never quotes the file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_PEM + 1)
    except OSError as error:
        raise KeyFormatError(f"Cannot read the key file {path}: {error.strerror}. {_HOW_TO_MAKE_ONE}") from error
    if len(data) > _LARGEST_PEM:
        raise KeyFormatError(f"{path} is larger than {_LARGEST_PEM} bytes: no key file is. {_HOW_TO_MAKE_ONE}")
    try:
        return OwnerKey.from_pem(data, passphrase)
    except KeyFormatError as error:
        raise KeyFormatError(f"{path}: {error}") from error


def write_owner_key(path: Path, key: OwnerKey, *, passphrase: bytes | None = None, force: bool = False) -> None:
    """Write the key as PEM with mode 0600, whole or not at all; its folder is made if need be.

    No draft ever holds the key: a process that is killed leaves nothing, an empty file, or the key under its name. An
    empty file holds nothing that could be lost and is written over, anything else only by `force`.

    Raises:
        KeyFormatError: The file is there already and `force` is off, is no key file, or cannot be written.
        ArtifactError: Another process is writing the file, or its folder cannot be made or written to.
    """
    pem = key.to_pem(passphrase)
    try:
        with claimed(path):
            _check_replaceable(path, force=force)
            _write_at_once(path, pem)
            sync_folder(path.parent)
    except OSError as error:
        raise KeyFormatError(f"Cannot write the key file {path}: {error.strerror}.") from error


def cached_owner_key(path: Path) -> OwnerKey:
    """Return the owner key in a PEM file without a passphrase; a new one is made and written where there is none.

    Raises:
        KeyFormatError: The file cannot be read or written, or holds something else.
    """
    if not path.exists() or not path.stat().st_size:
        write_owner_key(path, OwnerKey.generate())
    return read_owner_key(path)


def _check_replaceable(path: Path, *, force: bool) -> None:
    if not os.path.lexists(path):
        return
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size > _LARGEST_PEM:
        raise KeyFormatError(
            f"{path} is there and is a link, has another name as well, or is no key file: it is not written over even "
            "with --force. Choose another name."
        )
    if status.st_size and not force:
        raise KeyFormatError(
            f"{path} is there already and was left as it is. A lost key cannot be made again: "
            "choose another name, or pass --force (force=True in Python) to write over it."
        )


def _write_at_once(path: Path, pem: bytes) -> None:
    """Write a key over a file's content in one call of the system, which a kill cannot cut in two."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    with os.fdopen(handle, "r+b", buffering=0) as file:
        before = file.read()
        path.chmod(0o600)
        try:
            _overwrite(file, pem.ljust(len(before), b"\n"))  # a longer key that was there leaves no tail
            file.truncate(len(pem))
            os.fsync(handle)
        except BaseException:
            _overwrite(file, before)
            file.truncate(len(before))
            if not before:
                path.unlink()
            raise


def _overwrite(file: FileIO, data: bytes) -> None:
    file.seek(0)
    if file.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _hkdf(material: bytes, *, public: bytes, name: str) -> bytes:
    salt = hashlib.sha256(public).digest()
    return HKDF(hashes.SHA256(), SEED_BYTES, salt, f"keyed-xai/{name}".encode()).derive(material)


def _check_private_pem(data: bytes) -> None:
    if not data.strip():
        raise KeyFormatError(f"The key file is empty. {_HOW_TO_MAKE_ONE}")
    if b"PUBLIC KEY-----" in data:
        raise KeyFormatError("Expected the owner's private key, got a public key. Use the file that keygen wrote.")
    if b"BEGIN OPENSSH PRIVATE KEY" in data:
        raise KeyFormatError(f"Expected a PKCS#8 PEM, got an OpenSSH key. {_HOW_TO_MAKE_ONE}")
    if b"-----BEGIN " not in data:
        raise KeyFormatError(f"Expected a PEM file (-----BEGIN PRIVATE KEY-----), got other bytes. {_HOW_TO_MAKE_ONE}")


def _read_version_2(data: bytes) -> bytes | None:
    """Return the raw private key in a PKCS#8 PEM of version 2, which cryptography does not read; None for others.

    Raises:
        KeyFormatError: The public key in it is not its own.
    """
    try:
        der = _decode_body(data)
    except binascii.Error:
        return None
    found = _VERSION_2.match(der)
    if found is None or len(der) != (der[1] + 2 if der[1] < 0x80 else der[2] + 3):
        return None
    public = _PUBLIC_IN_VERSION_2.search(der, found.end())
    if public is not None and OwnerKey.from_raw(found[1]).public.raw != public[1]:
        raise KeyFormatError(f"The private key and the public one in it do not belong together. {_HOW_TO_MAKE_ONE}")
    return found[1]


def _decode_body(data: bytes) -> bytes:
    """Return what is between a PEM's first and last line, decoded."""
    return base64.b64decode(b"".join(line for line in data.splitlines() if b"-" not in line))


def _check_derivation(data: bytes) -> None:
    """Refuse an encrypted key whose passphrase would be hashed for minutes. Source: RFC 8018, appendix A.2."""
    with suppress(binascii.Error, IndexError):  # what is malformed is refused where it is read
        der = _decode_body(data)
        found = _ROUNDS.search(der)
        place = found.end() + found[1][0] if found else len(der)
        rounds = int.from_bytes(der[place + 2 : place + 2 + der[place + 1]], "big")
        if rounds > _MOST_ROUNDS:
            raise KeyFormatError(
                f"The key's passphrase is hashed {rounds} times, expected at most {_MOST_ROUNDS}. Encrypt the key "
                "anew, such as with openssl pkcs8 -topk8."
            )


def _passphrase_complaint(passphrase: bytes | None) -> str:
    if passphrase is None:
        return "The key is encrypted: give its passphrase with --passphrase-file."
    return "A passphrase was given, but the key is not encrypted: leave the passphrase out."


def _kind(key: object) -> str:
    """Name a key object in words: `_RSAPrivateKey` of 2048 bits is "an RSA key of 2048 bits"."""
    name = type(key).__name__.strip("_").removesuffix("PrivateKey").removesuffix("PublicKey")
    name = {"EllipticCurve": "EC"}.get(name, name)
    bits = getattr(key, "key_size", None)
    return f"a key of type {name}" + (f" with {bits} bits" if bits else "")
