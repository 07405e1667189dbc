"""Folders being written: what is in them, what is replaced, and failures in the middle."""

import base64
import errno
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from keyed_xai.artifacts import documents, writer
from keyed_xai.artifacts.documents import read_json
from keyed_xai.artifacts.folder import read_model_folder
from keyed_xai.artifacts.writer import write_folder
from keyed_xai.errors import ArtifactError
from tests.backdoors.test_report import a_report as an_attack_report
from tests.licensed import CARD, OWNER, write_example
from tests.marked import STRANGER


class TestModelFolder:
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
