"""JSON and files on their way in and out: what is refused, and failures in the middle."""

import contextlib
import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyed_xai.artifacts.card import Card, read_card, write_card
from keyed_xai.artifacts.documents import (
    encode_json,
    parse_json,
    printable,
    read_json,
    read_limited,
    write_atomically,
    write_json,
)
from keyed_xai.errors import ArtifactError
from tests.licensed import CARD, a_report
from tests.spoilt import json_values


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
