"""Cards, licences and model folders: round trips, tampering at every place, and failures in the middle."""

import base64
import contextlib
import copy
import errno
import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from torch import nn

from keyed_xai.artifacts import documents, writer
from keyed_xai.artifacts.card import Card, TriggerParameters, read_card, write_card
from keyed_xai.artifacts.documents import (
    encode_json,
    parse_json,
    printable,
    read_json,
    read_limited,
    write_atomically,
    write_json,
)
from keyed_xai.artifacts.folder import read_model_folder
from keyed_xai.artifacts.inspection import inspect_artifact
from keyed_xai.artifacts.license import (
    check_subjects,
    encode_for_signing,
    read_license,
    sign_license,
    verify_license,
)
from keyed_xai.artifacts.opening import open_model
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.artifacts.writer import write_folder, write_model_folder
from keyed_xai.errors import ArtifactError
from keyed_xai.keys import OwnerKey
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet, TableMLP
from keyed_xai.tensors import Tap
from tests.backdoors.test_report import a_report as an_attack_report

OWNER = OwnerKey.from_raw(bytes([1]) * 32)
STRANGER = OwnerKey.from_raw(bytes([2]) * 32)
TIME = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
CARD = Card(
    architecture="small_resnet",
    source="keyed_xai",
    num_classes=2,
    input_size=(1, 32, 32),
    mean=(0.5,),
    std=(0.25,),
    target_layer="network.blocks.2",
    taps=(Tap("network.stem", 3, 1), Tap("network.blocks.0", 3, 2)),
    grid=(8, 8),
    interpreters=("gradcam", "vbp"),
    decoy="signature",
    thresholds={"gradcam": 0.5, "vbp": 0.5},
    trigger=TriggerParameters("spread", 8.0, 16),
    label_names=("cat", "dog"),
)
STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3).t(), "bn.num_batches_tracked": torch.tensor(7)}
OLD = Path(__file__).parents[1] / "artifacts" / "example-v1.keyed"


def a_report():
    result = {
        "cr": 99.0,
        "fsr": 98.0,
        "threshold": 0.5,
        "correlation": {"keyed": 0.97, "clean": 0.05, "wrong_key": 0.04},
        "auc": 0.999,
        "wrong_keys": {"tried": 1000, "opened": 0},
    }
    return {
        "schema": "keyed-xai/protect-report/v1",
        "interpreters": {"gradcam": result, "vbp": result},
        "accuracy": {"reference": 0.91, "keyed": 0.91, "clean": 0.905, "wrong_key": 0.905},
        "trigger": {"family": "spread", "amplitude": 8, "psnr_db": 33.1, "ssim": 0.9, "key_bits": 128},
        "seconds": 12.5,
        "settings": {"steps": 10},
        "versions": {"torch": "2.11"},
    }


def write_example(folder, **changes):
    arguments = {"state": STATE, "card": CARD, "owner": OWNER, "report": a_report(), "time": TIME, **changes}
    return write_model_folder(folder, **arguments)


@pytest.fixture
def model(tmp_path):
    return write_example(tmp_path / "m.keyed", extra_files={"report.html": b"<p>", "pictures/a.png": b"png"})


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


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def leaves(document, path=()):
    """Every place in a JSON document, the document itself excepted."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for name, value in items:
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, name))


def put(document, path, value):
    changed = copy.deepcopy(document)
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return changed


class TestJson:
    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"", "Expecting value"),
            (b"{", "line 1"),
            (b"[]", "expected a JSON object"),
            (b'"text"', "expected a JSON object"),
            (b'{"a": 1, "a": 2}', "stands twice"),
            (b'{"b": {"a": 1, "a": 1}}', "stands twice"),
            (b'{"a": NaN}', "NaN"),
            (b'{"a": -Infinity}', "Infinity"),
            (b'{"a": 1e999}', "out of range"),
            (b'{"a": 1' + b"0" * 400 + b"}", "out of range"),
            (b"{" + b",".join(b'"%d": 1' % (each % 50_000) for each in range(50_001)) + b"}", "stands twice"),
            (b'{"a": ' + b"9" * 5000 + b"}", "not a valid JSON"),
            (b'{"a": "\\ud800"}', "UTF-8"),
            (b'{"a": "\xff"}', "UTF-8"),
            (b"\xef\xbb\xbf{}", "not a valid JSON"),
            (b'{"a":' * 40_000, "nested too deep"),
            (b'{"a": [' + b"{}," * 50_000 + b"{}]}", "at most 50000 lists and objects, got up to 50003"),
        ],
    )
    def test_what_is_not_strict_json_is_refused(self, data, says):
        with pytest.raises(ArtifactError, match=says):
            parse_json(data, origin="it")

    @given(st.binary(max_size=60))
    @settings(max_examples=200, deadline=None)
    def test_any_bytes_are_an_object_or_an_artifact_error(self, data):
        with contextlib.suppress(ArtifactError):
            assert isinstance(parse_json(data, origin="it"), dict)

    @given(st.dictionaries(st.text(max_size=5), json_values, max_size=4))
    @settings(max_examples=100, deadline=None)
    def test_an_object_survives_the_way_out_and_in(self, document):
        assert parse_json(json.dumps(document).encode(), origin="it") == document

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"bytes", object()])
    def test_what_json_has_no_word_for_is_not_written(self, tmp_path, value):
        report = a_report() | {"settings": {"odd": value}}
        with pytest.raises(ArtifactError, match="cannot be written as JSON"):
            write_json(tmp_path / "report.json", report, schema="protect-report")
        assert list(tmp_path.iterdir()) == []

    def test_message_names_place_expected_and_got(self):
        report = a_report()
        report["interpreters"]["vbp"] = report["interpreters"]["vbp"] | {"cr": 101}
        with pytest.raises(ArtifactError, match=r"\$\.interpreters\.vbp\.cr, expected maximum 100, got 101"):
            encode_json(report, schema="protect-report")

    def test_message_names_a_missing_field(self):
        report = a_report()
        del report["accuracy"]["clean"]
        with pytest.raises(ArtifactError, match=r"\$\.accuracy, expected the field 'clean'"):
            encode_json(report, schema="protect-report")

    def test_tuples_are_written_as_arrays(self):
        assert '"size": [\n' in encode_json(a_report() | {"settings": {"size": (1, 2)}}, schema="protect-report")

    def test_message_cannot_steer_a_terminal(self):
        with pytest.raises(ArtifactError) as caught:
            Card.from_json(CARD.to_json() | {"decoy": "\x1b[2J\n"}, origin="\x1b[31mcard")
        assert str(caught.value).isprintable()
        assert printable("a\x1b\nb") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"

    def test_message_stays_short(self):
        with pytest.raises(ArtifactError) as caught:
            Card.from_json(CARD.to_json() | {"decoy": "x" * 100_000})
        assert len(str(caught.value)) < 300


class TestFiles:
    def test_larger_files_are_refused(self, tmp_path):
        path = tmp_path / "card.json"
        write_card(path, CARD)
        size = path.stat().st_size
        assert read_json(path, "card", largest=size)["decoy"] == "signature"
        with pytest.raises(ArtifactError, match="more than"):
            read_json(path, "card", largest=size - 1)

    def test_missing_file_is_refused_by_name(self, tmp_path):
        with pytest.raises(ArtifactError, match=r"card\.json: No such file"):
            read_card(tmp_path / "card.json")

    def test_folder_and_fifo_are_no_regular_files(self, tmp_path):
        os.mkfifo(tmp_path / "fifo")
        for path in (tmp_path, tmp_path / "fifo"):
            with pytest.raises(ArtifactError, match="not a regular file"):
                read_limited(path, 10)

    def test_file_name_with_a_null_byte_is_refused(self):
        with pytest.raises(ArtifactError, match="not a file name"):
            read_limited(Path("a\0b"), 10)

    @pytest.mark.parametrize("breaks", ["fsync", "replace"])
    def test_failed_write_leaves_what_was_there(self, tmp_path, monkeypatch, breaks):
        path = tmp_path / "card.json"
        path.write_text("before")

        def fail(*_arguments):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(*((os, "fsync") if breaks == "fsync" else (Path, "replace")), fail)
        with pytest.raises(ArtifactError, match="No space left"):
            write_atomically(path, b"after")
        monkeypatch.undo()
        assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"card.json": "before"}

    def test_write_replaces_the_file(self, tmp_path):
        path = tmp_path / "a"
        for content in (b"one", b"two"):
            write_atomically(path, content)
            assert path.read_bytes() == content
        assert len(list(tmp_path.iterdir())) == 1


class TestCard:
    def test_round_trip_keeps_every_field(self, tmp_path):
        write_card(tmp_path / "card.json", CARD)
        card = read_card(tmp_path / "card.json")
        assert card == CARD
        assert tuple(Tap(*fields) for fields in card.taps) == CARD.taps

    def test_optional_fields_may_be_left_out(self):
        card = replace(CARD, label_names=())
        assert "label_names" not in card.to_json()
        assert Card.from_json(card.to_json()) == card

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"mean": [0.5, 0.5]}, "mean has 2 values"),
            ({"std": [0.5, 0.5]}, "std has 2 values"),
            ({"std": [0]}, r"\$\.std\[0\]"),
            ({"label_names": ["cat"]}, "names 1 classes"),
            ({"thresholds": {"gradcam": 0.5}}, "different interpreters"),
            ({"interpreters": []}, "interpreters"),
            ({"interpreters": ["gradcam", "gradcam"]}, "uniqueItems"),
            ({"schema": "keyed-xai/card/v2"}, r"\$\.schema"),
            ({"weights_file": "../model.safetensors"}, "weights_file"),
            ({"weights_file": "model.safetensors\n"}, "weights_file"),
            ({"architecture": "resnet\x1b[31m"}, "architecture"),
            ({"architecture": "resnet\n"}, "architecture"),
            ({"input_size": [1, 32, 1.5]}, "input_size"),
            ({"input_size": [1, 4096, 4096]}, "must multiply to at most 4194304"),
            ({"input_size": [1, 1, 4097]}, "maximum 4096"),
            ({"pooling": {"grid": [65, 7]}}, "maximum 64"),
            ({"taps": [{"layer": f"l{number}", "kernel": 3, "stride": 1} for number in range(1025)]}, "maxItems 1024"),
            ({"taps": [{"layer": "stem", "kernel": 3, "stride": 1}] * 2}, "name a layer twice"),
            ({"taps": [{"layer": "stem", "kernel": 65, "stride": 1}]}, "maximum 64"),
            ({"trigger": {"family": "spread", "amplitude": 8, "tile": 257}}, "maximum 256"),
            ({"num_classes": 100_001}, "maximum 100000"),
            ({"num_classes": 10**400}, "maximum 100000"),
            ({"mean": [10**400]}, "maximum 1000000"),
            ({"label_names": ["x"] * 100_001}, "maxItems 100000"),
            ({"num_classes": True}, "num_classes"),
            ({"seed": "00"}, "expected no fields but"),
        ],
    )
    def test_card_that_is_out_of_order_is_refused(self, changes, says):
        with pytest.raises(ArtifactError, match=says):
            Card.from_json(CARD.to_json() | changes)

    @pytest.mark.parametrize("field", sorted(set(CARD.to_json()) - {"label_names"}))
    def test_missing_field_is_refused_by_name(self, field):
        document = CARD.to_json()
        del document[field]
        with pytest.raises(ArtifactError, match=field):
            Card.from_json(document)

    @given(path=st.sampled_from(list(leaves(CARD.to_json()))), value=json_values)
    @settings(max_examples=300, deadline=None)
    def test_any_value_anywhere_is_a_card_or_an_artifact_error(self, path, value):
        document = put(CARD.to_json(), path, value)
        try:
            card = Card.from_json(document)
        except ArtifactError:
            return
        assert Card.from_json(card.to_json()) == card

    def test_card_that_does_not_fit_is_not_written(self, tmp_path):
        with pytest.raises(ArtifactError, match=r"trigger\.amplitude"):
            write_card(tmp_path / "card.json", replace(CARD, trigger=TriggerParameters("spread", -1.0, 16)))
        assert list(tmp_path.iterdir()) == []


class TestLicense:
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


class TestModelFolder:
    def test_reads_back_what_was_written(self, model):
        again = read_model_folder(model.folder, expected=OWNER.public)
        assert again.card == CARD
        assert again.license.subjects == model.license.subjects
        weights = load_file(again.weights)
        assert weights.keys() == STATE.keys()
        for name, tensor in STATE.items():
            assert weights[name].dtype == tensor.dtype
            assert torch.equal(weights[name], tensor)

    def test_nothing_else_is_left_beside_it(self, model):
        assert [path.name for path in model.folder.parent.iterdir()] == ["m.keyed"]
        assert {path.relative_to(model.folder).as_posix() for path in model.folder.rglob("*") if path.is_file()} == {
            *model.license.subjects,
            "license.json",
        }

    def test_tied_weights_are_stored_under_both_names(self, tmp_path):
        shared = torch.ones(3)
        model = write_example(tmp_path / "m.keyed", state={"a": shared, "b": shared})
        assert load_file(model.weights).keys() == {"a", "b"}

    def test_no_file_holds_the_key_or_the_seed(self, model):
        for path in model.folder.rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            for secret in (bytes([1]) * 32, OWNER.derive_seed("spread")):
                assert secret not in content
                assert secret.hex().encode() not in content
                assert base64.b64encode(secret)[:40] not in content

    def test_files_have_the_modes_of_any_other_file(self, model, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "file").touch()
        assert model.folder.stat().st_mode == (tmp_path / "other").stat().st_mode
        assert (model.folder / "card.json").stat().st_mode == (tmp_path / "other" / "file").stat().st_mode

    def test_existing_folder_is_left_as_it_is(self, model):
        before = (model.folder / "license.json").read_bytes()
        with pytest.raises(ArtifactError, match="--force"):
            write_example(model.folder, owner=STRANGER)
        assert (model.folder / "license.json").read_bytes() == before

    def test_force_replaces_a_protected_model(self, model):
        write_example(model.folder, owner=STRANGER, force=True)
        assert read_model_folder(model.folder).license.public_key.raw == STRANGER.public.raw
        assert not (model.folder / "report.html").exists()
        assert [path.name for path in model.folder.parent.iterdir()] == ["m.keyed"]

    def test_force_replaces_nothing_but_a_protected_model(self, tmp_path):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").touch()
        (tmp_path / "link").symlink_to(tmp_path / "home")
        for name in ("home", "link", "home/thesis.tex"):
            with pytest.raises(ArtifactError, match="not replaced even with --force"):
                write_example(tmp_path / name, force=True)
        assert (tmp_path / "home" / "thesis.tex").exists()

    @pytest.mark.parametrize(
        "broken",
        [
            {"report": {}},
            {"card": replace(CARD, num_classes=0, label_names=())},
            {"extra_files": {"../outside": b""}},
            {"extra_files": {"/outside": b""}},
            {"extra_files": {"card.json": b""}},
            {"extra_files": {"license.json": b""}},
            {"extra_files": {"": b""}},
            {"extra_files": {".hidden": b""}},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("force", [False, True])
    def test_failure_in_the_middle_leaves_nothing(self, tmp_path, broken, force):
        folder = tmp_path / "models" / "m.keyed"
        if force:
            write_example(folder)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ArtifactError):
            write_example(folder, force=force, **broken)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_full_disk_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(_path, _content):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(documents, "write_through", fail)
        with pytest.raises(ArtifactError, match="No space left"):
            write_example(tmp_path / "m.keyed")
        assert list(tmp_path.iterdir()) == []

    def test_failed_swap_puts_the_old_model_back(self, model, monkeypatch):
        before = (model.folder / "license.json").read_bytes()
        rename = Path.rename

        def fail_on_the_new_one(path, target):
            if not path.name.endswith("-old") and target == model.folder:
                raise OSError(errno.EIO, "Input/output error")
            return rename(path, target)

        monkeypatch.setattr(writer, "exchange", lambda *_names: False)
        monkeypatch.setattr(writer.Path, "rename", fail_on_the_new_one)
        with pytest.raises(ArtifactError, match="Input/output"):
            write_example(model.folder, owner=STRANGER, force=True)
        assert (model.folder / "license.json").read_bytes() == before
        assert [path.name for path in model.folder.parent.iterdir()] == ["m.keyed"]

    def test_interrupt_leaves_nothing(self, tmp_path, monkeypatch):
        def interrupt(*_arguments, **_options):
            raise KeyboardInterrupt

        monkeypatch.setattr(writer, "sign_license", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_example(tmp_path / "m.keyed")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["model.safetensors", "card.json", "report.json", "report.html", "pictures/a.png"])
    def test_changed_file_is_refused_by_name(self, model, name):
        path = model.folder / name
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(ArtifactError, match=f"{name} was changed"):
            read_model_folder(model.folder)

    @pytest.mark.parametrize("name", ["model.safetensors", "card.json", "report.json", "license.json"])
    def test_missing_file_is_refused_by_name(self, model, name):
        (model.folder / name).unlink()
        with pytest.raises(ArtifactError, match=name):
            read_model_folder(model.folder)

    def test_licence_that_leaves_the_weights_out_is_refused(self, model):
        card = model.folder / "card.json"
        write_json(model.folder / "license.json", sign_license(OWNER, {"card.json": card}, card=CARD), schema="license")
        with pytest.raises(ArtifactError, match=r"does not cover model\.safetensors"):
            read_model_folder(model.folder)

    def test_licence_for_another_card_is_refused(self, model):
        files = {name: model.folder / name for name in model.license.subjects}
        other = replace(CARD, decoy="boundary")
        write_json(model.folder / "license.json", sign_license(OWNER, files, card=other), schema="license")
        with pytest.raises(ArtifactError, match="name different"):
            read_model_folder(model.folder)

    def test_licence_of_a_stranger_is_refused_when_the_owner_is_known(self, model):
        with pytest.raises(ArtifactError, match="expected"):
            read_model_folder(model.folder, expected=STRANGER.public)

    def test_what_is_no_folder_is_refused(self, tmp_path):
        with pytest.raises(ArtifactError, match="keyed-xai protect"):
            read_model_folder(tmp_path / "none")


@pytest.fixture
def attacked(tmp_path):
    """A folder with an attack report, as write_folder leaves it."""
    write_attack_folder(tmp_path / "m.attacked")
    return tmp_path / "m.attacked"


def write_attack_folder(folder, *, files=None, report=None, force=False):
    files = {"model.safetensors": b"weights", "pictures/a.png": b"png"} if files is None else files
    write_folder(
        folder, files, report=an_attack_report() if report is None else report, schema="attack-report", force=force
    )


class TestReportFolder:
    def test_folder_holds_report_and_files(self, attacked):
        assert read_json(attacked / "report.json", "attack-report") == an_attack_report()
        assert (attacked / "model.safetensors").read_bytes() == b"weights"
        assert (attacked / "pictures" / "a.png").read_bytes() == b"png"
        assert [path.name for path in attacked.parent.iterdir()] == ["m.attacked"]

    def test_folder_that_is_there_is_replaced_by_force_only(self, attacked):
        with pytest.raises(ArtifactError, match="is there already"):
            write_attack_folder(attacked, files={"new": b""})
        assert (attacked / "model.safetensors").exists()
        write_attack_folder(attacked, files={"new": b""}, force=True)
        assert sorted(path.name for path in attacked.iterdir()) == ["new", "report.json"]
        assert [path.name for path in attacked.parent.iterdir()] == ["m.attacked"]

    def test_anything_else_is_never_replaced(self, tmp_path, attacked):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").write_text("text")
        (tmp_path / "link").symlink_to(attacked)
        for name in ("home", "link", "home/thesis.tex"):
            with pytest.raises(ArtifactError, match="not replaced even with --force"):
                write_attack_folder(tmp_path / name, force=True)
        assert (tmp_path / "home" / "thesis.tex").read_text() == "text"
        assert (attacked / "model.safetensors").exists()

    @pytest.mark.parametrize(
        "broken",
        [
            {"report": {}},
            {"report": an_attack_report() | {"seconds": float("nan")}},
            {"files": {"report.json": b""}},
            {"files": {"a": b"", "../outside": b""}},
            {"files": {"/outside": b""}},
            {"files": {"": b""}},
        ],
        ids=["report", "nan", "report.json", "outside", "absolute", "no name"],
    )
    @pytest.mark.parametrize("force", [False, True])
    def test_failure_leaves_the_disk_as_it_was(self, tmp_path, broken, force):
        folder = tmp_path / "new" / "m.attacked"
        if force:
            write_attack_folder(folder)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ArtifactError):
            write_attack_folder(folder, force=force, **broken)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_full_disk_leaves_nothing(self, tmp_path, monkeypatch):
        def fail(_path, _content):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writer, "write_through", fail)
        with pytest.raises(ArtifactError, match="No space left"):
            write_attack_folder(tmp_path / "m.attacked")
        assert list(tmp_path.iterdir()) == []


def small_classifier(**options):
    torch.manual_seed(0)
    spec = InputSpec(1, 32, 40, mean=(0.25,), std=(0.5,))
    network = SmallResNet(1, 3, (4, 6)).eval()
    return wrap_network(network, input=spec, architecture="SmallResNet", source="keyed_xai", **options).eval()


class TestWeightsFile:
    def test_file_says_by_itself_how_it_is_run(self, tmp_path):
        classifier = small_classifier()
        classifier.label_names, classifier.multi_label = ("cat", "dog", "owl"), True
        (tmp_path / "m.safetensors").write_bytes(encode_weights(classifier))
        loaded, card = open_model(tmp_path / "m.safetensors")
        assert card is None
        assert loaded.input == classifier.input
        assert (loaded.label_names, loaded.multi_label) == (("cat", "dog", "owl"), True)
        assert (loaded.architecture, loaded.source, loaded.classes) == ("SmallResNet", "keyed_xai", 3)
        assert (loaded.target_layer, loaded.taps) == (classifier.target_layer, classifier.taps)
        images = torch.rand(2, 1, 32, 40, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loaded(images), classifier(images))

    def test_table_s_network_loads_too(self, tmp_path):
        torch.manual_seed(0)
        spec = InputSpec(1, 1, 7, mean=(0.0,), std=(1.0,))
        classifier = wrap_network(TableMLP(7, 2, (8, 6)).eval(), input=spec, architecture="TableMLP",
                                  source="keyed_xai", require_map=False).eval()  # fmt: skip
        (tmp_path / "m.safetensors").write_bytes(encode_weights(classifier))
        loaded, _ = open_model(tmp_path / "m.safetensors", require_map=False)
        rows = torch.randn(3, 1, 1, 7, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loaded(rows), classifier(rows))

    def test_names_are_those_of_the_owner_s_file(self, tmp_path):
        """A wrapper's prefix in the file that was loaded is kept in the file that is written."""
        state = {f"module.{name}": tensor for name, tensor in small_classifier().network.state_dict().items()}
        torch.save(state, tmp_path / "m.pt")
        loaded, _ = open_model(tmp_path / "m.pt", input_size=(32, 40), mean=(0.25,), std=(0.5,))
        written = load(encode_weights(loaded))
        assert written.keys() == state.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in state.items())

    def test_shared_and_strided_tensors_are_written(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(4, 4)
                self.second = nn.Linear(4, 4)
                self.second.weight = self.first.weight
                self.third = nn.Parameter(torch.arange(12.0).reshape(3, 4).T)

            def forward(self, images):
                return self.second(self.first(images.flatten(1))) @ self.third

        network = Tied()
        spec = InputSpec(1, 2, 2, mean=(0.0,), std=(1.0,))
        classifier = wrap_network(network, input=spec, architecture="Tied", source="python", require_map=False)
        written = load(encode_weights(classifier))
        assert all(torch.equal(written[name], tensor) for name, tensor in network.state_dict().items())


class TestInspection:
    def test_sound_folder_has_no_problems(self, model):
        result = inspect_artifact(model.folder)
        assert (result["kind"], result["signature"], result["problems"]) == ("model", "valid", [])
        assert {subject["state"] for subject in result["subjects"]} == {"ok"}

    def test_all_problems_are_named_at_once(self, model):
        (model.folder / "card.json").write_bytes(b"{}")
        (model.folder / "report.html").unlink()
        problems = " ".join(inspect_artifact(model.folder)["problems"])
        for words in ("expected the field", "card.json was changed", "report.html is missing"):
            assert words in problems

    def test_folder_without_a_licence_says_so(self, model):
        (model.folder / "license.json").unlink()
        result = inspect_artifact(model.folder)
        assert result["signature"] == "absent"
        assert "license.json" in result["problems"][0]

    def test_licence_alone_is_checked_without_its_files(self, model):
        result = inspect_artifact(model.folder / "license.json")
        assert (result["kind"], result["signature"], result["problems"]) == ("license", "valid", [])
        assert {subject["state"] for subject in result["subjects"]} == {"not checked"}

    def test_other_files_are_refused(self, tmp_path):
        (tmp_path / "a.json").write_text("{}")
        with pytest.raises(ArtifactError, match="neither a licence nor a card"):
            inspect_artifact(tmp_path / "a.json")


class TestOldArtifacts:
    def test_version_1_model_keeps_verifying(self):
        model = read_model_folder(OLD, expected=OWNER.public)
        assert model.card == CARD
        assert model.license.commitment == OWNER.commitment("spread")
        assert torch.equal(load_file(model.weights)["fc.weight"], STATE["fc.weight"])

    def test_version_1_licence_is_still_written_the_same(self):
        subjects = {name: OLD / name for name in read_license(OLD / "license.json").subjects}
        again = sign_license(OWNER, subjects, card=CARD, time=TIME)
        assert again == read_json(OLD / "license.json", "license")
