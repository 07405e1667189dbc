"""What is said of an artifact: its signature, its files, and all its problems at once."""

import pytest

from keyed_xai.artifacts.inspection import inspect_artifact
from keyed_xai.errors import ArtifactError


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
