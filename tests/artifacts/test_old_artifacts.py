"""Artifacts of version 1 keep verifying, and are still written the same."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from keyed_xai.artifacts.documents import read_json
from keyed_xai.artifacts.folder import read_model_folder
from keyed_xai.artifacts.license import read_license, sign_license
from tests.licensed import CARD, OWNER, STATE, TIME

OLD = Path(__file__).parents[1] / "artifacts" / "example-v1.keyed"


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
