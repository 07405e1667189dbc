"""Keys: fixed vectors, a slow twin of the derivation, and everything a PEM file can be instead of a key."""

import base64
import errno
import hashlib
import hmac
import os
import re
import resource
import stat
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa, x25519
from hypothesis import given, settings
from hypothesis import strategies as st

from keyed_xai import keys
from keyed_xai.errors import ArtifactError, KeyFormatError
from keyed_xai.keys import (
    ByteStream,
    OwnerKey,
    PublicKey,
    cached_owner_key,
    commit_to_seed,
    read_owner_key,
    write_owner_key,
)
from keyed_xai_schemas import load_key_vectors

VECTORS = load_key_vectors()["keys"]
RAW = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
KEY = OwnerKey.from_raw(RAW)
STRANGER = OwnerKey.from_raw(bytes(32))
PASSPHRASE = b"correct horse"
every_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["private_key"][:8])


def slow_hkdf(material: bytes, public: bytes, name: str) -> bytes:
    """RFC 5869 with SHA-256 for 32 bytes, which is one block: extract, then expand once."""
    pseudorandom = hmac.new(hashlib.sha256(public).digest(), material, hashlib.sha256).digest()
    return hmac.new(pseudorandom, f"keyed-xai/{name}".encode() + b"\x01", hashlib.sha256).digest()


class SlowStream:
    """The byte stream, one word at a time, on Python integers."""

    def __init__(self, seed):
        self.bytes = iter(hashlib.shake_256(seed).digest(1 << 15))

    def word(self):
        return sum(next(self.bytes) << shift for shift in (0, 8, 16, 24))

    def below(self, bound):
        while True:
            word = self.word()
            if word < (2**32 // bound) * bound:
                return word % bound

    def shuffle(self, count):
        order = list(range(count))
        for last in range(count - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


class TestVectors:
    @every_vector
    def test_public_key_matches_the_vector(self, vector):
        public = OwnerKey.from_raw(bytes.fromhex(vector["private_key"])).public
        assert public.raw.hex() == vector["public_key"]
        assert public.key_id == vector["key_id"]

    @every_vector
    def test_triggers_match_the_vector(self, vector):
        key = OwnerKey.from_raw(bytes.fromhex(vector["private_key"]))
        for trigger in vector["triggers"]:
            family, index, version = trigger["family"], trigger["index"], trigger.get("version", 1)
            seed = key.derive_seed(family, index, version=version)
            assert seed.hex() == trigger["seed"]
            assert ByteStream(seed).uint32(8).tolist() == trigger["words"]
            assert key.commitment(family, index, version=version) == trigger["commitment"]

    @every_vector
    def test_decoys_match_the_vector(self, vector):
        public = PublicKey.from_raw(bytes.fromhex(vector["public_key"]))
        for interpreter, decoy in vector["decoys"].items():
            seed = public.derive_public_seed(f"decoy/{interpreter}")
            assert seed.hex() == decoy["seed"]
            assert ByteStream(seed).shuffle(64)[:16].tolist() == decoy["shuffle_64_first_16"]

    def test_rfc_8032_test_1_gives_its_public_key_and_signature(self):
        assert KEY.public.raw.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
        assert KEY.sign(b"").hex() == (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
            "d25bf5f0595bbe24655141438e7a100b"
        )


class TestDerivation:
    @given(raw=st.binary(min_size=32, max_size=32), index=st.integers(0, 10**6))
    @settings(max_examples=25, deadline=None)
    def test_seed_equals_the_slow_twin(self, raw, index):
        key = OwnerKey.from_raw(raw)
        public = key.public.raw
        assert key.derive_seed("spread", index) == slow_hkdf(raw, public, f"v1/trigger/spread/{index}")
        assert key.derive_seed("spread", index, version=2) == slow_hkdf(raw, public, f"v2/trigger/spread/{index}")
        assert key.public.derive_public_seed("decoy/vbp") == slow_hkdf(key.public.raw, key.public.raw, "v1/decoy/vbp")

    def test_families_indices_and_keys_give_different_seeds(self):
        other = OwnerKey.from_raw(bytes(32))
        seeds = {key.derive_seed(f, i) for key in (KEY, other) for f in ("spread", "moire") for i in range(3)}
        assert len(seeds) == 12

    def test_commitment_binds_the_seed_and_is_not_its_plain_hash(self):
        seed = KEY.derive_seed("spread")
        assert KEY.commitment("spread") == commit_to_seed(seed)
        assert KEY.commitment("spread") != hashlib.sha256(seed).hexdigest()


class TestByteStream:
    @given(seed=st.binary(max_size=64), cuts=st.lists(st.integers(0, 40), max_size=6))
    @settings(max_examples=50, deadline=None)
    def test_words_do_not_depend_on_how_they_are_cut(self, seed, cuts):
        stream = ByteStream(seed)
        pieces = np.concatenate([stream.uint32(cut) for cut in cuts]) if cuts else np.empty(0, np.uint32)
        assert pieces.dtype == np.uint32
        assert pieces.tolist() == ByteStream(seed).uint32(sum(cuts)).tolist()

    @given(seed=st.binary(max_size=64), count=st.integers(0, 200))
    @settings(max_examples=50, deadline=None)
    def test_shuffle_equals_the_slow_twin_and_is_a_permutation(self, seed, count):
        order = ByteStream(seed).shuffle(count)
        assert order.tolist() == SlowStream(seed).shuffle(count)
        assert sorted(order.tolist()) == list(range(count))

    def test_two_streams_of_one_seed_do_not_disturb_each_other(self):
        first, second = ByteStream(b"seed"), ByteStream(b"seed")
        first.shuffle(10)
        assert second.uint32(4).tolist() == ByteStream(b"seed").uint32(4).tolist()

    def test_shuffle_is_uniform_over_all_orders_of_four(self):
        stream, counts = ByteStream(b"uniform"), {}
        orders = [tuple(stream.shuffle(4).tolist()) for _ in range(2400)]
        for order in orders:
            counts[order] = counts.get(order, 0) + 1
        assert len(counts) == 24
        chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
        assert chi_square < 49.7  # 23 degrees of freedom: exceeded once in 1,000 seeds

    def test_words_hashed_stay_in_proportion_to_words_read(self, monkeypatch):
        hashed = []
        shake = hashlib.shake_256

        class Counting:
            def __init__(self, seed):
                self._inner = shake(seed)

            def digest(self, length):
                hashed.append(length)
                return self._inner.digest(length)

        monkeypatch.setattr(hashlib, "shake_256", Counting)
        stream = ByteStream(b"seed")
        words = [int(stream.uint32(1)[0]) for _ in range(5000)]
        assert sum(hashed) < 4 * 4 * 5000
        assert words == np.frombuffer(shake(b"seed").digest(4 * 5000), "<u4").tolist()

    def test_below_rejects_words_past_the_last_full_multiple(self, monkeypatch):
        words = iter([2**32 - 1, 7])
        stream = ByteStream(b"")
        monkeypatch.setattr(stream, "uint32", lambda _count: np.array([next(words)], np.uint32))
        assert stream.below(3) == 7 % 3  # 2^32 - 1 is a multiple of 3: taking it would favour 0


class TestPem:
    def test_round_trip_keeps_the_key(self):
        assert OwnerKey.from_pem(KEY.to_pem()).public.raw == KEY.public.raw
        assert PublicKey.from_pem(KEY.public.to_pem()).raw == KEY.public.raw

    def test_round_trip_with_a_passphrase_keeps_the_key(self):
        pem = KEY.to_pem(PASSPHRASE)
        assert b"ENCRYPTED" in pem
        assert OwnerKey.from_pem(pem, PASSPHRASE).public.raw == KEY.public.raw

    def test_passphrase_that_is_hashed_for_long_is_refused_before_it_is(self, monkeypatch):
        pem = KEY.to_pem(PASSPHRASE)
        monkeypatch.setattr(keys, "_MOST_ROUNDS", 2048)  # what cryptography writes
        assert OwnerKey.from_pem(pem, PASSPHRASE).public.raw == KEY.public.raw
        monkeypatch.setattr(keys, "_MOST_ROUNDS", 2047)
        monkeypatch.setattr(keys.serialization, "load_pem_private_key", None)
        with pytest.raises(KeyFormatError, match="hashed 2048 times, expected at most 2047"):
            OwnerKey.from_pem(pem, PASSPHRASE)

    @pytest.mark.parametrize("curve", [0x6F, 0x71])  # X448, Ed448: 32 bytes are no key of theirs
    @pytest.mark.parametrize("private", [True, False])
    def test_key_that_says_another_curve_is_refused(self, curve, private):
        head, body, tail = (KEY.to_pem() if private else KEY.public.to_pem()).splitlines()
        other = base64.b64decode(body).replace(b"\x2b\x65\x70", bytes([0x2B, 0x65, curve]))
        pem = b"\n".join([head, base64.b64encode(other), tail, b""])
        with pytest.raises(KeyFormatError, match="malformed|not one"):
            (OwnerKey if private else PublicKey).from_pem(pem)

    def test_empty_passphrase_is_refused(self):
        with pytest.raises(ValueError, match="empty"):
            KEY.to_pem(b"")

    @pytest.mark.parametrize(
        ("passphrase", "encrypted", "says"),
        [
            (None, True, "--passphrase-file"),
            (b"wrong", True, "does not open"),
            (PASSPHRASE, False, "leave the passphrase out"),
        ],
    )
    def test_passphrase_that_does_not_fit_is_refused(self, passphrase, encrypted, says):
        pem = KEY.to_pem(PASSPHRASE if encrypted else None)
        with pytest.raises(KeyFormatError, match=says):
            OwnerKey.from_pem(pem, passphrase)

    @pytest.mark.parametrize("encrypted", [False, True])
    def test_empty_passphrase_on_reading_is_refused(self, encrypted):
        with pytest.raises(KeyFormatError):
            OwnerKey.from_pem(KEY.to_pem(PASSPHRASE if encrypted else None), b"")

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: rsa.generate_private_key(65537, 1024), "RSA with 1024 bits"),
            (lambda: ec.generate_private_key(ec.SECP256R1()), "EC with 256 bits"),
            (x25519.X25519PrivateKey.generate, "X25519"),
            (ed448.Ed448PrivateKey.generate, "Ed448"),
            (lambda: dsa.generate_private_key(1024), "DSA with 1024 bits"),
        ],
        ids=["rsa", "ec", "x25519", "ed448", "dsa"],
    )
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # DSA and short RSA are deprecated upstream
    def test_other_kinds_of_key_are_refused_by_name(self, make, says):
        private = make()
        pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with pytest.raises(KeyFormatError, match=says) as caught:
            OwnerKey.from_pem(pem)
        assert "keygen" in str(caught.value)
        public = private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        with pytest.raises(KeyFormatError, match=says.split()[0]):
            PublicKey.from_pem(public)

    def test_key_of_version_2_is_read(self):
        """The example of RFC 8410, section 10.3: version 2, with an attribute and the public key."""
        seed = "d4ee72dbf913584ad5b6d8f1f769f8ad3afe7c28cbf1d4fbe097a88f44755842"
        public = "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1"
        key = OwnerKey.from_pem(RFC_8410)
        assert key.public.raw.hex() == public
        assert OwnerKey.from_raw(bytes.fromhex(seed)).public.raw == key.public.raw

    @pytest.mark.parametrize("tail", ["", "8121 00 public", "a123 0321 00 public"])
    def test_key_of_version_2_is_read_with_a_public_key_or_without(self, tail):
        """The public key as RFC 5958 tags it, and as the Rust library ring did."""
        assert OwnerKey.from_pem(version_2(tail, KEY.public.raw)).public.raw == KEY.public.raw

    def test_key_of_version_2_with_somebody_elses_public_key_is_refused(self):
        pem = version_2("8121 00 public", OwnerKey.generate().public.raw)
        with pytest.raises(KeyFormatError, match="do not belong together") as caught:
            OwnerKey.from_pem(pem)
        assert_no_secret(caught.value, pem)

    def test_key_of_version_2_has_no_passphrase(self):
        with pytest.raises(KeyFormatError, match="leave the passphrase out"):
            OwnerKey.from_pem(RFC_8410, PASSPHRASE)

    @given(cut=st.integers(0, 115))
    @settings(max_examples=40, deadline=None)
    def test_truncated_key_of_version_2_is_refused(self, cut):
        der = base64.b64decode(b"".join(RFC_8410.splitlines()[1:-1]))
        with pytest.raises(KeyFormatError, match="malformed"):
            OwnerKey.from_pem(as_pem(der[:cut]))

    @pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
    @pytest.mark.parametrize("private_first", [True, False])
    def test_private_and_public_key_in_one_file_are_read(self, private_first, passphrase):
        parts = [KEY.to_pem(passphrase), b"Bag Attributes: none\n", KEY.public.to_pem()]
        data = b"\xef\xbb\xbf" + b"".join(parts if private_first else parts[::-1])
        assert OwnerKey.from_pem(data, passphrase).public.raw == KEY.public.raw
        with pytest.raises(KeyFormatError, match="Never hand out"):
            PublicKey.from_pem(data)

    def test_public_key_of_another_beside_the_private_one_is_refused(self):
        with pytest.raises(KeyFormatError, match="do not belong together"):
            OwnerKey.from_pem(KEY.to_pem() + OwnerKey.generate().public.to_pem())

    def test_two_private_keys_in_one_file_are_refused(self):
        with pytest.raises(KeyFormatError, match="one private key, got 2"):
            OwnerKey.from_pem(KEY.to_pem() + OwnerKey.generate().to_pem())

    def test_openssh_key_is_refused_by_name(self):
        pem = KEY._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        with pytest.raises(KeyFormatError, match="OpenSSH"):
            OwnerKey.from_pem(pem)

    def test_public_key_in_place_of_the_private_one_is_refused(self):
        with pytest.raises(KeyFormatError, match="got a public key"):
            OwnerKey.from_pem(KEY.public.to_pem())

    def test_private_key_in_place_of_the_public_one_is_refused(self):
        with pytest.raises(KeyFormatError, match="Never hand out"):
            PublicKey.from_pem(KEY.to_pem())

    @pytest.mark.parametrize("data", [b"", b"\n \n", b"\x00" * 100, b"30 2e 02 01", RAW])
    def test_what_is_no_pem_is_refused(self, data):
        with pytest.raises(KeyFormatError, match="keygen"):
            OwnerKey.from_pem(data)

    @pytest.mark.parametrize("raw", [b"", bytes(31), bytes(33)])
    def test_raw_keys_of_another_length_are_refused(self, raw):
        with pytest.raises(KeyFormatError, match=str(len(raw))):
            OwnerKey.from_raw(raw)
        with pytest.raises(KeyFormatError, match=str(len(raw))):
            PublicKey.from_raw(raw)

    @given(data=st.binary(max_size=400), passphrase=st.none() | st.binary(max_size=8))
    @settings(max_examples=200, deadline=None)
    def test_any_bytes_are_refused_as_a_malformed_key(self, data, passphrase):
        with pytest.raises(KeyFormatError):
            OwnerKey.from_pem(data, passphrase)
        with pytest.raises(KeyFormatError):
            PublicKey.from_pem(data)

    @given(
        body=st.binary(max_size=200), label=st.sampled_from(["PRIVATE KEY", "ENCRYPTED PRIVATE KEY", "EC PRIVATE KEY"])
    )
    @settings(max_examples=200, deadline=None)
    def test_pem_around_any_bytes_is_refused(self, body, label):
        pem = f"-----BEGIN {label}-----\n{base64.b64encode(body).decode()}\n-----END {label}-----\n".encode()
        with pytest.raises(KeyFormatError):
            OwnerKey.from_pem(pem, PASSPHRASE if "ENCRYPTED" in label else None)

    @given(data=st.data(), passphrase=st.sampled_from([None, PASSPHRASE]))
    @settings(max_examples=40, deadline=None)
    def test_truncated_key_is_refused_without_a_quote_of_it(self, data, passphrase):
        pem = KEY.to_pem(passphrase).rstrip(b"\n")
        cut = data.draw(st.integers(0, len(pem) - 1))
        with pytest.raises(KeyFormatError) as caught:
            OwnerKey.from_pem(pem[:cut], passphrase)
        assert_no_secret(caught.value, pem)


RFC_8410 = b"""-----BEGIN PRIVATE KEY-----
MHICAQEwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
oB8wHQYKKoZIhvcNAQkJFDEPDA1DdXJkbGUgQ2hhaXJzgSEAGb9ECWmEzf6FQbrB
Z9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PRIVATE KEY-----
"""


def as_pem(der):
    return b"-----BEGIN PRIVATE KEY-----\n" + base64.b64encode(der) + b"\n-----END PRIVATE KEY-----\n"


def version_2(tail, public):
    """The key of these tests as PKCS#8 of version 2, and more behind it."""
    inner = bytes.fromhex("020101 3005 06032b6570 0422 0420") + RAW
    for part in tail.split():
        inner += public if part == "public" else bytes.fromhex(part)
    return as_pem(bytes([0x30, len(inner)]) + inner)


def assert_no_secret(error, pem):
    """No message in the chain of errors holds raw bytes, their hex, or a piece of the PEM's body."""
    body = b"".join(line for line in pem.splitlines() if not line.startswith(b"-----")).decode()
    while error is not None:
        message = f"{error!r} {error}"
        assert RAW.hex()[:16] not in message
        assert repr(RAW)[2:20] not in message
        assert not any(body[start : start + 12] in message for start in range(max(1, len(body) - 12)) if body)
        error = error.__cause__


class TestSecrecy:
    def test_reprs_show_public_things_only(self):
        seed = KEY.derive_seed("spread")
        shown = f"{KEY!r} {KEY} {ByteStream(seed)!r} {KEY.public!r}"
        for secret in (RAW, seed):
            assert secret.hex()[:8] not in shown
            assert base64.b64encode(secret).decode()[:8] not in shown
        assert KEY.public.key_id[:16] in repr(KEY)

    def test_signature_of_another_message_or_key_does_not_hold(self):
        signature = KEY.sign(b"message")
        assert KEY.public.verify(signature, b"message")
        assert not KEY.public.verify(signature, b"massage")
        assert not KEY.public.verify(bytes(64), b"message")
        assert not KEY.public.verify(signature[:-1], b"message")
        assert not OwnerKey.from_raw(bytes(32)).public.verify(signature, b"message")

    def test_generated_keys_differ(self):
        assert OwnerKey.generate().public.raw != OwnerKey.generate().public.raw


@contextmanager
def files_up_to(size):
    """Let no file grow past `size` bytes, as on a disk that is almost full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestFiles:
    def test_written_key_is_private_to_its_owner_and_reads_back(self, tmp_path):
        path = tmp_path / "k.pem"
        write_owner_key(path, KEY, passphrase=PASSPHRASE)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert read_owner_key(path, PASSPHRASE).public.raw == KEY.public.raw
        assert [file.name for file in tmp_path.iterdir()] == ["k.pem"]

    def test_existing_file_is_left_as_it_is(self, tmp_path):
        path = tmp_path / "k.pem"
        path.write_text("mine")
        with pytest.raises(KeyFormatError, match="--force"):
            write_owner_key(path, KEY)
        assert path.read_text() == "mine"
        assert [file.name for file in tmp_path.iterdir()] == ["k.pem"]

    def test_force_replaces_the_file_with_mode_0600(self, tmp_path):
        path = tmp_path / "k.pem"
        path.write_text("mine")
        path.chmod(0o644)
        write_owner_key(path, KEY, force=True)
        assert read_owner_key(path).public.raw == KEY.public.raw
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_dangling_link_is_not_followed(self, tmp_path):
        (tmp_path / "k.pem").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(KeyFormatError):
            write_owner_key(tmp_path / "k.pem", KEY)
        assert not (tmp_path / "elsewhere").exists()

    @pytest.mark.parametrize("name", ["missing.pem", "."])
    def test_unreadable_path_is_refused_by_name(self, tmp_path, name):
        with pytest.raises(KeyFormatError, match=re.escape(str(tmp_path / name))):
            read_owner_key(tmp_path / name)

    def test_folder_is_made(self, tmp_path):
        write_owner_key(tmp_path / "a" / "b" / "k.pem", KEY)
        assert read_owner_key(tmp_path / "a" / "b" / "k.pem").public.raw == KEY.public.raw

    def test_folder_that_cannot_be_made_is_refused(self, tmp_path):
        (tmp_path / "a").touch()
        with pytest.raises(ArtifactError, match=r"Cannot write .*k\.pem"):
            write_owner_key(tmp_path / "a" / "k.pem", KEY)

    def test_empty_file_is_written_over(self, tmp_path):
        (tmp_path / "k.pem").touch(0o644)
        write_owner_key(tmp_path / "k.pem", KEY)
        assert read_owner_key(tmp_path / "k.pem").public.raw == KEY.public.raw
        assert stat.S_IMODE((tmp_path / "k.pem").stat().st_mode) == 0o600

    def test_shorter_key_leaves_nothing_of_a_longer_one(self, tmp_path):
        write_owner_key(tmp_path / "k.pem", KEY, passphrase=PASSPHRASE)
        write_owner_key(tmp_path / "k.pem", KEY, force=True)
        assert (tmp_path / "k.pem").read_bytes() == KEY.to_pem()

    def test_force_writes_over_nothing_but_a_key_file_of_one_name(self, tmp_path):
        other = tmp_path / "other.pem"
        other.write_bytes(STRANGER.to_pem())
        (tmp_path / "link").symlink_to(other)
        (tmp_path / "second name").hardlink_to(other)
        (tmp_path / "folder").mkdir()
        (tmp_path / "large").write_bytes(bytes(70_000))
        for name in ("link", "second name", "folder", "large"):
            with pytest.raises(KeyFormatError, match="not written over even with --force"):
                write_owner_key(tmp_path / name, KEY, force=True)
        assert other.read_bytes() == STRANGER.to_pem()

    @pytest.mark.parametrize("before", [b"", STRANGER.to_pem()], ids=["nothing", "a key"])
    @pytest.mark.parametrize("fails", ["write", "fsync"])
    def test_full_disk_leaves_what_was_there(self, tmp_path, monkeypatch, before, fails):
        def full(_handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        path = tmp_path / "k.pem"
        if before:
            path.write_bytes(before)
        if fails == "fsync":
            monkeypatch.setattr(os, "fsync", full)
        with files_up_to(len(before) or 10 if fails == "write" else 1000), pytest.raises(KeyFormatError, match="space"):
            write_owner_key(path, KEY, passphrase=PASSPHRASE, force=True)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({"k.pem": before} if before else {})

    def test_key_is_kept_and_made_where_there_is_none(self, tmp_path):
        (tmp_path / "k.pem").touch()
        made = cached_owner_key(tmp_path / "k.pem")
        assert cached_owner_key(tmp_path / "k.pem").public.raw == made.public.raw

    def test_large_file_is_refused_before_it_is_parsed(self, tmp_path):
        path = tmp_path / "k.pem"
        path.write_bytes(KEY.to_pem() + b"#" * 70_000)
        with pytest.raises(KeyFormatError, match="larger"):
            read_owner_key(path)

    def test_damaged_file_is_refused_by_name_without_a_quote_of_it(self, tmp_path):
        path: Path = tmp_path / "k.pem"
        path.write_bytes(KEY.to_pem()[:80])
        with pytest.raises(KeyFormatError, match=re.escape(str(path))) as caught:
            read_owner_key(path)
        assert_no_secret(caught.value, KEY.to_pem())
