"""`keyed-xai audit`: what it writes and prints, and the exit codes."""

import json

import pytest
from click.testing import CliRunner

from keyed_xai.artifacts.documents import read_json, validate
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.artifacts.writer import write_model_folder
from keyed_xai.auditing.catalogue import AUDITS, GROUPS
from keyed_xai.keys import write_owner_key
from keyed_xai.models import network_state
from keyed_xai_cli import main as cli
from tests import marked
from tests.audited import PARAMETERS
from tests.marked import STRANGER, card_of
from tests.threatened import GRID, OWNER, protected, reference

BRIEF = ["--limit", "80", "--held-out", "24", "--decoys", "9", "--device", "cpu", "--no-controls"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    write_model_folder(
        folder / "m.keyed",
        state=network_state(protected()),
        card=card_of(protected(), trigger=PARAMETERS, grid=GRID),
        owner=OWNER,
        report=marked.REPORT,
    )
    (folder / "m.safetensors").write_bytes(encode_weights(reference()))
    write_owner_key(folder / "k.pem", OWNER)
    write_owner_key(folder / "other.pem", STRANGER)
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.main, ["audit", *(str(argument) for argument in arguments)])


def owned(place):
    return [place / "m.keyed", "--key-file", place / "k.pem", "--reference", place / "m.safetensors", *BRIEF]


def test_audit_writes_a_folder_and_prints_a_table(place, tmp_path):
    result = run(*owned(place), "--against", "int8", "--against", "prune-70", "-o", tmp_path / "a", "--json",
                 tmp_path / "r.json")  # fmt: skip
    assert result.exit_code == 0, result.output
    report = read_json(tmp_path / "a" / "audit.json", "audit-report")
    assert report == read_json(tmp_path / "r.json", "audit-report")
    assert [each["name"] for each in report["findings"]] == ["prune-70", "int8"]
    assert report["settings"]["against"] == ["int8", "prune-70"]
    for found in report["findings"]:
        assert found["title"] in result.output
        assert found["outcome"] in result.output
    assert f"{report['findings'][1]['after']['accuracy']:.1%}".replace("%", " %") in result.output
    assert "Wrote" in result.output
    again = run(*owned(place), "--against", "int8", "-o", tmp_path / "a")
    assert (again.exit_code, "--resume" in again.output) == (1, True)
    assert run(*owned(place), "--against", "int8", "-o", tmp_path / "a", "--resume").exit_code == 0


def test_json_on_standard_output_is_alone_there_and_the_folder_has_the_models_name(place):
    result = run(*owned(place), "--against", "int8", "--json", "-")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    validate(report, "audit-report", origin="standard output")
    assert "8-bit weights" in result.stderr
    assert (place / "m.keyed.audit" / "audit.html").exists()


def test_found_out_or_not_the_exit_code_is_0_and_what_was_not_run_is_said(place, tmp_path):
    result = run(place / "m.safetensors", *BRIEF, "--against", "checks", "--against", "activation-clusters",
                 "--against", "removal", "-o", tmp_path / "a")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Not run: int8 needs the owner's key and the reference model." in " ".join(result.output.split())
    assert read_json(tmp_path / "a" / "audit.json", "audit-report")["model"]["kind"] == "plain"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--against", "nonsense"], 2, "nonsense"),
        (["--against", "int8"], 1, "it needs the owner's key"),
        (["--reference", "absent"], 2, "absent"),
        (["--data", "nowhere"], 1, "nowhere"),
    ],
)
def test_what_cannot_work_ends_in_a_message(place, tmp_path, arguments, code, words):
    result = run(place / "m.keyed", *BRIEF, "-o", tmp_path / "a", *arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.output.split())
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not (tmp_path / "a").exists()


def test_another_owners_key_ends_in_a_message(place, tmp_path):
    result = run(place / "m.keyed", "--key-file", place / "other.pem", *BRIEF, "-o", tmp_path / "a")
    assert result.exit_code == 1
    assert "was protected with the key" in " ".join(result.output.split())


def test_list_names_everything_and_needs_no_model():
    result = run("--list")
    assert result.exit_code == 0, result.output
    assert not [name for name in (*AUDITS, *GROUPS) if name not in result.output]
