"""Licences: what is signed, tampering at every place, and the files that a licence covers."""

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.license import check_subjects, encode_for_signing, sign_license, verify_license
from keyed_xai.errors import ArtifactError
from tests.licensed import CARD, OWNER, TIME
from tests.marked import STRANGER
from tests.spoilt import json_values, leaves, put


@pytest.fixture(scope="module")
def envelope():
    return sign_license(OWNER, {"model.safetensors": b"weights", "card.json": b"{}"}, card=CARD, time=TIME)


def resign(statement, key=OWNER, *, payload_type="application/vnd.in-toto+json", signed_type=None):
    """An envelope around any statement whose signature holds."""
    payload = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
    signature = key.sign(encode_for_signing(signed_type or payload_type, payload))
    return {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key.public.key_id, "sig": base64.b64encode(signature).decode()}],
    }


def opened(envelope):
    return json.loads(base64.b64decode(envelope["payload"]))


class TestLicense:
    def test_commits_to_the_seed_of_the_version_that_the_card_names(self):
        second = TriggerParameters("spread", 8.0, 32, version=2)
        license_ = verify_license(sign_license(OWNER, {"card.json": b"{}"}, card=replace(CARD, trigger=second)))
        assert license_.trigger == second
        assert license_.commitment == OWNER.commitment("spread", version=2) != OWNER.commitment("spread")

    def test_says_what_was_signed(self, envelope):
        license_ = verify_license(envelope, expected=OWNER.public)
        assert license_.public_key.raw == OWNER.public.raw
        assert license_.commitment == OWNER.commitment("spread")
        assert (license_.trigger, license_.decoy, license_.grid) == (CARD.trigger, CARD.decoy, CARD.grid)
        assert license_.interpreters == CARD.interpreters
        assert license_.time == TIME
        assert list(license_.subjects) == ["card.json", "model.safetensors"]

    def test_statement_is_in_toto_version_1(self, envelope):
        statement = opened(envelope)
        assert statement["_type"] == "https://in-toto.io/Statement/v1"
        assert statement["predicate"]["time"] == "2026-03-04T05:06:07Z"

    def test_signed_bytes_are_those_of_the_dsse_specification(self):
        # Source: DSSE v1.0.2, protocol.md, test vectors.
        assert encode_for_signing("http://example.com/HelloWorld", b"hello world") == (
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        )

    def test_same_input_gives_the_same_licence(self, envelope):
        again = sign_license(OWNER, {"card.json": b"{}", "model.safetensors": b"weights"}, card=CARD, time=TIME)
        assert again == envelope

    def test_time_is_now_in_utc_by_default_and_needs_a_zone(self):
        signed = verify_license(sign_license(OWNER, {"a": b""}, card=CARD)).time
        assert abs(datetime.now(UTC) - signed) < timedelta(minutes=1)
        east = TIME.astimezone(timezone(timedelta(hours=5)))
        assert verify_license(sign_license(OWNER, {"a": b""}, card=CARD, time=east)).time == TIME
        with pytest.raises(ValueError, match="time zone"):
            sign_license(OWNER, {"a": b""}, card=CARD, time=datetime(2026, 1, 1))

    def test_holds_no_secret(self, envelope):
        text = json.dumps(opened(envelope)) + json.dumps(envelope)
        for secret in (bytes([1]) * 32, OWNER.derive_seed("spread")):
            assert secret.hex() not in text
            assert base64.b64encode(secret).decode()[:40] not in text

    def test_other_owner_than_expected_is_refused(self, envelope):
        with pytest.raises(ArtifactError, match=STRANGER.public.key_id[:16]):
            verify_license(envelope, expected=STRANGER.public)

    @pytest.mark.parametrize("part", ["payload", "sig", "keyid"])
    def test_every_character_is_covered(self, envelope, part):
        place = envelope if part == "payload" else envelope["signatures"][0]
        text = place[part]
        for position in range(0, len(text), 7 if part == "payload" else 1):
            flipped = text[:position] + ("A" if text[position] != "A" else "B") + text[position + 1 :]
            changed = put(envelope, ("payload",) if part == "payload" else ("signatures", 0, part), flipped)
            with pytest.raises(ArtifactError):
                verify_license(changed)

    def test_every_field_of_the_statement_is_covered_by_the_signature(self, envelope):
        statement = opened(envelope)
        changes = {
            ("subject", 0, "digest", "sha256"): "0" * 64,
            ("subject", 0, "name"): "other.json",
            ("predicate", "commitment"): "0" * 64,
            ("predicate", "trigger", "amplitude"): 9.0,
            ("predicate", "decoy"): "boundary",
            ("predicate", "interpreters"): ["gradcam"],
            ("predicate", "grid"): [7, 7],
            ("predicate", "time"): "2020-03-04T05:06:07Z",
        }
        for path, value in changes.items():
            payload = json.dumps(put(statement, path, value), separators=(",", ":")).encode()
            with pytest.raises(ArtifactError, match="signature does not hold"):
                verify_license(envelope | {"payload": base64.b64encode(payload).decode()})

    def test_key_of_a_stranger_put_in_place_is_refused(self, envelope):
        statement = opened(envelope)
        statement["predicate"]["public_key"] = STRANGER.public.to_pem().decode()
        with pytest.raises(ArtifactError, match="fingerprint"):
            verify_license(resign(statement, STRANGER))
        statement["predicate"]["key_id"] = STRANGER.public.key_id
        payload = json.dumps(statement).encode()
        with pytest.raises(ArtifactError, match="fingerprint"):
            verify_license(envelope | {"payload": base64.b64encode(payload).decode()})

    def test_signature_over_another_payload_type_is_refused(self, envelope):
        with pytest.raises(ArtifactError, match="signature does not hold"):
            verify_license(resign(opened(envelope), signed_type="text/plain"))
        with pytest.raises(ArtifactError, match="payloadType"):
            verify_license(resign(opened(envelope), payload_type="text/plain"))

    def test_base64_in_another_spelling_is_refused(self, envelope):
        signature = envelope["signatures"][0]["sig"]
        assert signature.endswith("==")
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        twin = alphabet[alphabet.index(signature[-3]) ^ 1]  # differs in bits that decoding drops
        changed = signature[:-3] + twin + "=="
        assert base64.b64decode(changed) == base64.b64decode(signature)
        with pytest.raises(ArtifactError, match="canonical"):
            verify_license(put(envelope, ("signatures", 0, "sig"), changed))

    @pytest.mark.parametrize("count", [0, 2])
    def test_exactly_one_signature_is_taken(self, envelope, count):
        with pytest.raises(ArtifactError, match="signatures"):
            verify_license(envelope | {"signatures": envelope["signatures"] * count})

    @pytest.mark.parametrize(
        "name",
        [
            "../card.json",
            "/etc/passwd",
            "a/../../b",
            "..",
            ".",
            "",
            "a\\b",
            "c:/x",
            "a//b",
            "a/",
            ".hidden",
            "a\n",
            "a\0",
        ],
    )
    def test_name_that_leads_out_of_the_folder_is_refused_both_ways(self, envelope, name):
        with pytest.raises(ArtifactError, match="name"):
            sign_license(OWNER, {name: b""}, card=CARD)
        with pytest.raises(ArtifactError, match="name"):
            verify_license(resign(put(opened(envelope), ("subject", 0, "name"), name)))

    @pytest.mark.parametrize(
        ("path", "value", "says"),
        [
            (("subject", 1, "name"), "card.json", "lists a file twice"),
            (("predicate", "time"), "2026-02-30T00:00:00Z", "day is out of range|does not match|unconverted"),
            (("predicate", "time"), "2026-02-03T00:00:00+01:00", "time"),
            (("predicate", "public_key"), "-----BEGIN PUBLIC KEY-----\nAAAA\n", "Ed25519 public key"),
            (("predicate", "version"), "keyed-xai/license/v2", "version"),
            (("predicateType",), "https://slsa.dev/provenance/v1", "predicateType"),
            (("_type",), "https://in-toto.io/Statement/v0.1", "_type"),
            (("predicate", "seed"), "00" * 32, "expected no fields but"),
            (("predicate", "grid"), [65, 8], "maximum 64"),
            (("predicate", "grid"), [8, 10**400], "out of range"),
            (("predicate", "trigger", "tile"), 257, "maximum 256"),
        ],
    )
    def test_statement_that_is_out_of_order_is_refused_though_signed(self, envelope, path, value, says):
        with pytest.raises(ArtifactError, match=says):
            verify_license(resign(put(opened(envelope), path, value)))

    @pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff", b'{"a": NaN}', b'{"_type": 1, "_type": 2}'])
    def test_payload_that_is_no_statement_is_refused_though_signed(self, payload):
        with pytest.raises(ArtifactError):
            verify_license(resign(payload))

    @given(data=st.data(), value=json_values)
    @settings(max_examples=200, deadline=None)
    def test_any_value_anywhere_in_a_signed_statement_is_refused_or_read(self, envelope, data, value):
        statement = opened(envelope)
        path = data.draw(st.sampled_from(list(leaves(statement))))
        try:
            license_ = verify_license(resign(put(statement, path, value)))
        except ArtifactError:
            return
        assert license_.public_key.raw == OWNER.public.raw

    @given(data=st.data(), value=json_values)
    @settings(max_examples=200, deadline=None)
    def test_any_value_anywhere_in_the_envelope_is_refused(self, envelope, data, value):
        changed = put(envelope, data.draw(st.sampled_from(list(leaves(envelope)))), value)
        if changed != envelope:
            with pytest.raises(ArtifactError):
                verify_license(changed)


class TestSubjects:
    def test_each_file_is_ok_missing_or_changed(self, model):
        (model.folder / "card.json").write_bytes(b"{}")
        (model.folder / "pictures" / "a.png").unlink()
        states = dict(check_subjects(model.license, model.folder))
        assert states == {
            "card.json": "changed",
            "model.safetensors": "ok",
            "pictures/a.png": "missing",
            "report.html": "ok",
            "report.json": "ok",
        }

    def test_link_out_of_the_folder_counts_as_changed(self, model, tmp_path):
        outside = tmp_path / "elsewhere.html"
        outside.write_bytes((model.folder / "report.html").read_bytes())
        (model.folder / "report.html").unlink()
        (model.folder / "report.html").symlink_to(outside)
        assert dict(check_subjects(model.license, model.folder))["report.html"] == "changed"

    def test_folder_in_place_of_a_file_counts_as_changed(self, model):
        (model.folder / "report.html").unlink()
        (model.folder / "report.html").mkdir()
        assert dict(check_subjects(model.license, model.folder))["report.html"] == "changed"
