"""Folders of protected models: what is read back, and what was changed, is missing or does not fit."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from keyed_xai.artifacts.documents import write_json
from keyed_xai.artifacts.folder import read_model_folder
from keyed_xai.artifacts.license import sign_license
from keyed_xai.errors import ArtifactError
from tests.licensed import CARD, OWNER, STATE
from tests.marked import STRANGER


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
