"""Outputs are held by one run at a time, and whatever a killed run leaves is finished or removed at the next start."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from keyed_xai import outputs as claims
from keyed_xai.errors import ArtifactError
from keyed_xai.outputs import claimed, prepare_folder

ROOT = Path(__file__).parents[1]
HOLD = "import sys, time, pathlib, keyed_xai.outputs as claims\nwith claims.claimed(pathlib.Path(sys.argv[1])):\n"
WAIT = "    print('held', flush=True)\n    time.sleep(60)\n"


@contextlib.contextmanager
def another_run(output):
    """Another process that holds an output until it is killed."""
    command = [sys.executable, "-c", HOLD + WAIT, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(claims, "_PATIENCE", 0.1)


def kill_everywhere(folder, *cases):
    """Return by case what every death left, once it is sure that the next start leaves nothing hidden."""
    command = [sys.executable, "-m", "tests.killed", str(folder), *cases]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for death in (each for deaths in found.values() for each in deaths):
        assert not hidden(death["left"]["keys"])
        assert not hidden(death["claimed"]["files"] + death["after"]["files"])
        assert death["after"]["state"] in (1, 2)
    assert all(len(deaths) > 10 for deaths in found.values())
    return found


def hidden(names):
    return [name for name in names if "/." in f"/{name}"]


def states(deaths, when):
    return {death[when]["state"] for death in deaths}


def test_whoever_is_killed_while_replacing_leaves_the_old_or_the_new_one(tmp_path):
    found = kill_everywhere(tmp_path / "here", "model", "attacked model", "file", "checkpoint", "key by force")
    assert {case: states(deaths, "left") for case, deaths in found.items()} == dict.fromkeys(found, {0, 1})


def test_where_folders_cannot_be_exchanged_the_next_start_finds_the_old_or_the_new_one(tmp_path):
    deaths = kill_everywhere(tmp_path / "here", "model by steps")["model by steps"]
    assert states(deaths, "left") == {0, 1, None}
    assert states(deaths, "claimed") == {0, 1}


def test_whoever_is_killed_while_writing_a_secret_hides_no_draft_of_it(tmp_path):
    found = kill_everywhere(tmp_path / "here", "keyed image", "key")
    assert states(found["keyed image"], "left") == {0, None, "half a file", 1}
    assert states(found["key"], "left") == {None, "empty", 1}


def test_whoever_is_killed_while_making_leaves_nothing_or_all(tmp_path):
    found = kill_everywhere(tmp_path / "here", "new model", "new repository", "new file")
    assert {case: states(deaths, "left") for case, deaths in found.items()} == dict.fromkeys(found, {None, 1})


class TestClaims:
    def test_folder_is_made_and_nothing_is_left_of_a_claim(self, tmp_path):
        for content in ([], ["m.keyed"]):
            with claimed(tmp_path / "a" / "b" / "m.keyed") as draft:
                assert draft.parent.is_dir()
                assert not draft.exists()
                for name in content:
                    (draft.parent / name).touch()
            assert [path.name for path in tmp_path.rglob("m.keyed")] == content
            assert (tmp_path / "a").exists() == bool(content)

    def test_second_run_is_refused_while_the_first_lives(self, tmp_path, impatient):
        output = tmp_path / "m.keyed"
        with another_run(output) as first:
            with pytest.raises(ArtifactError, match="Another run is writing .*m.keyed"), claimed(output):
                pytest.fail("both hold it")
            first.send_signal(signal.SIGKILL)
            first.wait()
            with claimed(output):
                pass
        assert not list(tmp_path.iterdir())

    def test_run_waits_for_one_that_is_about_to_end(self, tmp_path):
        with another_run(tmp_path / "m.keyed") as first:
            threading.Timer(0.3, first.kill).start()
            with claimed(tmp_path / "m.keyed"):
                pass

    def test_thread_may_claim_again_what_it_holds(self, tmp_path, impatient):
        with claimed(tmp_path / "m.keyed"):
            with claimed(tmp_path / "m.keyed"):
                pass
            assert (tmp_path / ".m.keyed.keyed-xai-lock").exists()
            refused = []
            other = threading.Thread(target=lambda: refused.append(self.is_refused(tmp_path / "m.keyed")))
            other.start()
            other.join()
            assert refused == [True]
        assert not list(tmp_path.iterdir())

    @staticmethod
    def is_refused(output):
        try:
            with claimed(output):
                return False
        except ArtifactError:
            return True

    def test_outputs_side_by_side_do_not_know_each_other(self, tmp_path):
        with another_run(tmp_path / "a.keyed"), claimed(tmp_path / "b.keyed"):
            pass

    @pytest.mark.parametrize("name", [".", "..", "/", "a/.."])
    def test_path_without_a_name_is_refused(self, name):
        with pytest.raises(ArtifactError, match="choose another"), claimed(Path(name)):
            pytest.fail("it has no name")

    def test_folder_that_is_filled_is_swept_but_for_what_is_held(self, tmp_path):
        for name in ("a.png", "b.json", ".c"):
            (tmp_path / f".{name}.keyed-xai-lock").touch()
            (tmp_path / f".{name}.keyed-xai-draft").write_bytes(b"half")
        (tmp_path / ".mine").touch()
        with another_run(tmp_path / "b.json"):
            (tmp_path / ".b.json.keyed-xai-draft").touch()
            prepare_folder(tmp_path)
            assert sorted(path.name for path in tmp_path.iterdir()) == [
                ".b.json.keyed-xai-draft",
                ".b.json.keyed-xai-lock",
                ".mine",
            ]

    def test_folder_that_is_filled_is_made(self, tmp_path):
        prepare_folder(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()
        (tmp_path / "c").touch()
        with pytest.raises(ArtifactError, match="Cannot write"):
            prepare_folder(tmp_path / "c")

    def test_old_folder_is_put_back_only_where_there_is_no_other(self, tmp_path):
        for number in (1, 2):
            (tmp_path / ".m.keyed.keyed-xai-old").mkdir()
            (tmp_path / ".m.keyed.keyed-xai-old" / "number").write_text(str(number))
            with claimed(tmp_path / "m.keyed"):
                pass
            assert (tmp_path / "m.keyed" / "number").read_text() == "1"
        assert [path.name for path in tmp_path.iterdir()] == ["m.keyed"]
