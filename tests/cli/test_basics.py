"""The command group, keygen and inspect: exit codes, what goes where, and what stays unloaded."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from keyed_xai import __version__
from keyed_xai.artifacts.documents import validate
from keyed_xai.errors import KeyedXAIError
from keyed_xai.keys import OwnerKey, read_owner_key, write_owner_key
from keyed_xai_cli import main as cli
from keyed_xai_cli.options import device_option, emit_json, key_file_option, read_key, seed_option

OLD = Path(__file__).parents[1] / "artifacts" / "example-v1.keyed"


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def in_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def stand_in(monkeypatch, action):
    """Put a command that does `action` in place of keygen."""
    monkeypatch.setattr(cli, "_load", lambda _name: click.Command("keygen", callback=action))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {"GOMP_SPINCOUNT": cli.SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_wait_asleep_unless_the_user_says_otherwise(given, kept):
    cli.share_cores(given)
    assert given == kept


def test_threads_are_told_to_sleep_before_torch_is_loaded():
    code = """
import os, sys
from click.testing import CliRunner
from keyed_xai_cli import main
def tell(): print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules)
main._load = lambda name: main.click.Command("keygen", callback=tell)
print(CliRunner().invoke(main.main, ["keygen"]).output)
"""
    assert in_process(code).stdout.split() == [cli.SPIN_COUNT, "False"]


def copy_of_old(tmp_path):
    folder = tmp_path / "m.keyed"
    folder.mkdir()
    for file in OLD.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


class TestHelp:
    def test_overview_names_every_command_in_order(self):
        result = run("--help")
        assert result.exit_code == 0
        places = [result.output.index(f"\n  {name} ") for name in cli.COMMANDS]
        assert places == sorted(places)

    @pytest.mark.parametrize("argument", ["--help", "--version"])
    def test_overview_loads_nothing_heavy(self, argument):
        result = in_process(
            "import sys\n"
            "from keyed_xai_cli.main import main\n"
            "try:\n"
            f"    main([{argument!r}])\n"
            "except SystemExit as stop:\n"
            "    assert stop.code == 0\n"
            "heavy = {'torch', 'numpy', 'rich', 'cryptography', 'jsonschema', 'matplotlib', 'PIL', 'jinja2'}\n"
            "heavy &= set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "assert {name for name in sys.modules if name.startswith('keyed_xai.')} == {'keyed_xai.errors'}\n"
        )
        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize("command", ["keygen", "inspect"])
    def test_help_of_a_command_and_its_run_do_not_load_torch(self, command, tmp_path):
        arguments = {"keygen": ["keygen", "-o", str(tmp_path / "k.pem")], "inspect": ["inspect", str(OLD)]}[command]
        result = in_process(
            "import sys\n"
            "from keyed_xai_cli.main import main\n"
            f"for arguments in (['{command}', '--help'], {arguments!r}):\n"
            "    try:\n"
            "        main(arguments)\n"
            "    except SystemExit as stop:\n"
            "        assert stop.code == 0\n"
            "assert 'torch' not in sys.modules\n"
        )
        assert result.returncode == 0, result.stderr

    def test_library_itself_does_not_load_torch(self):
        assert in_process("import sys, keyed_xai; assert 'torch' not in sys.modules").returncode == 0

    def test_version_is_the_library_s(self):
        assert run("--version").output == f"keyed-xai, version {__version__}\n"

    @pytest.mark.parametrize("name", ["keygen", "inspect"])
    def test_help_line_starts_the_command_s_own_help(self, name):
        assert run(name, "--help").exit_code == 0
        assert cli._load(name).name == name


class TestExitCodes:
    @pytest.mark.parametrize(
        "arguments", [["nonsense"], ["keygen"], ["keygen", "--nonsense"], ["inspect", "/no/such/file"]], ids=str
    )
    def test_usage_error_is_2(self, arguments):
        assert run(*arguments).exit_code == 2

    def test_typo_gets_a_suggestion(self):
        assert "keygen" in run("keygne").stderr

    def test_own_error_is_1_with_one_line(self, monkeypatch):
        def fail():
            raise KeyedXAIError("first\nsecond \x1b[31mred")

        stand_in(monkeypatch, fail)
        result = run("keygen")
        assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Error: first second [31mred\n")

    def test_operating_system_error_is_1_and_names_the_file(self, monkeypatch):
        def fail():
            raise PermissionError(errno.EACCES, "Permission denied", "maps/a.png")

        stand_in(monkeypatch, fail)
        result = run("keygen")
        assert (result.exit_code, result.stderr) == (1, "Error: Permission denied: maps/a.png.\n")

    def test_not_shown_is_3(self, monkeypatch):
        stand_in(monkeypatch, lambda: click.get_current_context().exit(cli.NOT_SHOWN))
        assert run("keygen").exit_code == 3

    def test_interrupt_is_130(self, monkeypatch):
        def interrupt():
            raise KeyboardInterrupt

        stand_in(monkeypatch, interrupt)
        result = run("keygen")
        assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")

    def test_reader_that_left_a_pipe_ends_quietly(self, monkeypatch):
        def fail():
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        stand_in(monkeypatch, fail)
        assert run("keygen").stderr == ""

    def test_unexpected_error_shows_no_local_variables(self):
        result = in_process(
            "import click\n"
            "from keyed_xai_cli import main as cli\n"
            "def fail():\n"
            "    seed = 'sec' + 'ret'\n"
            "    raise RuntimeError('a bug')\n"
            "cli._load = lambda _name: click.Command('keygen', callback=fail)\n"
            "cli.main(['keygen'])\n"
        )
        assert result.returncode == 1
        assert "a bug" in result.stderr
        assert "secret" not in result.stderr

    def test_table_that_names_something_else_is_a_type_error(self, monkeypatch):
        monkeypatch.setitem(cli.COMMANDS, "keygen", ("json:dumps", "Not a command."))
        with pytest.raises(TypeError, match="json:dumps"):
            cli._load("keygen")


class TestKeygen:
    def test_writes_a_key_and_says_which(self, tmp_path):
        result = run("keygen", "-o", tmp_path / "k.pem")
        key = read_owner_key(tmp_path / "k.pem")
        assert result.exit_code == 0
        assert key.public.key_id in result.stdout
        assert "not encrypted" in result.stdout

    def test_passphrase_is_the_first_line_of_its_file(self, tmp_path):
        (tmp_path / "pass").write_bytes(b"open sesame\r\nsecond line\n")
        assert run("keygen", "-o", tmp_path / "k.pem", "--passphrase-file", tmp_path / "pass").exit_code == 0
        key = read_owner_key(tmp_path / "k.pem", b"open sesame")
        assert read_key(tmp_path / "k.pem", tmp_path / "pass").public.raw == key.public.raw

    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    def test_byte_order_mark_is_no_part_of_the_passphrase(self, tmp_path, mark):
        (tmp_path / "pass").write_bytes(mark + "schl\u00fcssel".encode() + b"\r\n")
        assert run("keygen", "-o", tmp_path / "k.pem", "--passphrase-file", tmp_path / "pass").exit_code == 0
        assert read_owner_key(tmp_path / "k.pem", "schl\u00fcssel".encode())

    def test_passphrase_in_utf_16_is_refused_and_says_so(self, tmp_path):
        (tmp_path / "pass").write_text("open sesame", encoding="utf-16")
        result = run("keygen", "-o", tmp_path / "k.pem", "--passphrase-file", tmp_path / "pass")
        assert result.exit_code == 1
        assert "is UTF-16, expected UTF-8" in result.stderr

    @pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf\n", b"x" * 1024, None])
    def test_passphrase_that_cannot_be_used_is_1_and_writes_nothing(self, tmp_path, content):
        if content is not None:
            (tmp_path / "pass").write_bytes(content)
        result = run("keygen", "-o", tmp_path / "k.pem", "--passphrase-file", tmp_path / "pass")
        assert result.exit_code == 1
        assert "passphrase" in result.stderr
        assert not (tmp_path / "k.pem").exists()

    def test_longest_passphrase_works(self, tmp_path):
        (tmp_path / "pass").write_bytes(b"x" * 1023 + b"\n")
        assert run("keygen", "-o", tmp_path / "k.pem", "--passphrase-file", tmp_path / "pass").exit_code == 0
        assert read_owner_key(tmp_path / "k.pem", b"x" * 1023)

    def test_existing_key_is_kept_without_force(self, tmp_path):
        run("keygen", "-o", tmp_path / "k.pem")
        before = (tmp_path / "k.pem").read_bytes()
        result = run("keygen", "-o", tmp_path / "k.pem")
        assert result.exit_code == 1
        assert "--force" in result.stderr
        assert (tmp_path / "k.pem").read_bytes() == before
        assert run("keygen", "-o", tmp_path / "k.pem", "--force").exit_code == 0
        assert (tmp_path / "k.pem").read_bytes() != before

    def test_json_on_standard_output_stands_alone(self, tmp_path):
        result = run("keygen", "-o", tmp_path / "k.pem", "--json", "-")
        document = json.loads(result.stdout)
        validate(document, "keygen", origin="it")
        assert document["key_id"] == read_owner_key(tmp_path / "k.pem").public.key_id
        assert "Wrote" in result.stderr

    def test_nothing_printed_or_written_but_the_key_holds_the_secret(self, tmp_path, monkeypatch):
        key = OwnerKey.from_raw(bytes([3]) * 32)
        monkeypatch.setattr(OwnerKey, "generate", lambda: key)
        result = run("keygen", "-o", tmp_path / "k.pem", "--json", tmp_path / "k.json")
        body = key.to_pem().splitlines()[1].decode()
        shown = result.output + (tmp_path / "k.json").read_text()
        assert body[22:] not in shown
        assert "03" * 16 not in shown


class TestInspect:
    def test_sound_model_is_0_with_card_licence_and_files(self):
        result = run("inspect", OLD)
        assert result.exit_code == 0
        for words in ("small_resnet", "commitment", "model.safetensors", "every file it covers is as it was signed"):
            assert words in result.stdout

    @pytest.mark.parametrize("name", ["model.safetensors", "card.json", "report.json"])
    def test_changed_file_is_1_and_is_named(self, tmp_path, name):
        folder = copy_of_old(tmp_path)
        (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
        result = run("inspect", folder)
        assert result.exit_code == 1
        assert f"Problem: {name} was changed" in result.stderr

    def test_missing_file_is_1_and_is_named(self, tmp_path):
        folder = copy_of_old(tmp_path)
        (folder / "model.safetensors").unlink()
        result = run("inspect", folder)
        assert result.exit_code == 1
        assert "model.safetensors is missing" in result.stderr

    def test_broken_signature_is_1_and_the_json_says_so(self, tmp_path):
        folder = copy_of_old(tmp_path)
        envelope = json.loads((folder / "license.json").read_text())
        envelope["signatures"][0]["sig"] = "A" * 86 + "=="
        (folder / "license.json").write_text(json.dumps(envelope))
        for path in (folder, folder / "license.json"):
            result = run("inspect", path, "--json", "-")
            document = json.loads(result.stdout)
            validate(document, "inspect", origin="it")
            assert result.exit_code == 1
            assert document["signature"] == "invalid"
            assert document["license"] is None
            assert "signature does not hold" in result.stderr

    @pytest.mark.parametrize(("name", "kind"), [("license.json", "license"), ("card.json", "card")])
    def test_single_file_is_0(self, name, kind):
        result = run("inspect", OLD / name, "--json", "-")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["kind"] == kind

    @pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\x80\x04.", b'{"payloadType": 1}'])
    def test_other_file_is_1(self, tmp_path, content):
        (tmp_path / "a.json").write_bytes(content)
        result = run("inspect", tmp_path / "a.json")
        assert result.exit_code == 1
        assert result.stderr

    def test_empty_folder_is_1(self, tmp_path):
        result = run("inspect", tmp_path)
        assert result.exit_code == 1
        assert "card.json" in result.stderr

    def test_markup_in_a_card_is_printed_as_it_is(self, tmp_path):
        card = json.loads((OLD / "card.json").read_text())
        card["label_names"] = ["[red]cat[/red]", "[/nonsense]"]
        (tmp_path / "card.json").write_text(json.dumps(card))
        result = run("inspect", tmp_path / "card.json")
        assert result.exit_code == 0
        assert "[/nonsense]" in result.stdout

    def test_json_file_that_cannot_be_written_is_1(self, tmp_path):
        (tmp_path / "file").touch()
        result = run("inspect", OLD, "--json", tmp_path / "file" / "a.json")
        assert result.exit_code == 1
        assert "Cannot write" in result.stderr

    def test_folder_of_the_json_file_is_made(self, tmp_path):
        assert run("inspect", OLD, "--json", tmp_path / "a" / "b" / "c.json").exit_code == 0
        assert json.loads((tmp_path / "a" / "b" / "c.json").read_text())["signature"] == "valid"

    def test_model_that_a_killed_run_was_about_to_replace_is_found(self, tmp_path):
        copy_of_old(tmp_path).rename(tmp_path / ".m.keyed.keyed-xai-old")
        assert run("inspect", tmp_path / "m.keyed").exit_code == 0
        assert [path.name for path in tmp_path.iterdir()] == ["m.keyed"]


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "code"),
        [
            ([], 0),
            (["--device", "cuda:1"], 0),
            (["--device", "tpu"], 2),
            (["--device", "cuda:"], 2),
            (["--seed", "7"], 0),
            (["--seed", "-1"], 2),
        ],
        ids=str,
    )
    def test_device_and_seed_are_checked(self, arguments, code):
        seen = {}
        command = click.command()(device_option(seed_option(lambda **options: seen.update(options))))
        assert CliRunner().invoke(command, arguments).exit_code == code
        assert code or seen.keys() == {"device", "seed"}

    @pytest.mark.parametrize(("required", "code"), [(True, 2), (False, 0)])
    def test_key_file_is_required_where_asked(self, required, code):
        command = click.command()(key_file_option(required=required)(lambda **_options: None))
        assert CliRunner().invoke(command, []).exit_code == code

    def test_key_and_passphrase_files_are_read(self, tmp_path):
        key = OwnerKey.generate()
        write_owner_key(tmp_path / "k.pem", key)
        assert read_key(tmp_path / "k.pem", None).public.raw == key.public.raw

    def test_document_is_checked_even_when_nobody_asks_for_it(self):
        with pytest.raises(KeyedXAIError, match="schema"):
            emit_json({}, schema="keygen", json_path=None)


def test_module_runs_as_a_script():
    command = [sys.executable, "-m", "keyed_xai_cli", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == f"keyed-xai, version {__version__}\n"
