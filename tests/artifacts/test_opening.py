"""Models on disk made ready for use."""

import pytest
import torch

from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.opening import derive_trigger, make_family, open_model
from keyed_xai.errors import ArtifactError, ModelError
from keyed_xai.models import InputSpec
from tests.marked import OWNER, TRIGGER, marked_classifier, unmarked_classifier, write_folder


@pytest.fixture(scope="module")
def trigger():
    return derive_trigger(OWNER, TRIGGER)


class TestLoading:
    def test_folder_comes_with_its_card(self, tmp_path):
        write_folder(tmp_path / "m.keyed", unmarked_classifier())
        classifier, card = open_model(tmp_path / "m.keyed")
        assert card.trigger == TRIGGER
        assert (classifier.input, classifier.taps) == (unmarked_classifier().input, unmarked_classifier().taps)

    def test_file_comes_without_a_card_and_takes_options(self, tmp_path):
        torch.save(unmarked_classifier().network.state_dict(), tmp_path / "m.pt")
        classifier, card = open_model(
            tmp_path / "m.pt", input_size=16, mean=(0.1,), std=(0.2,), target_layer="blocks.0", classes=3
        )
        assert card is None
        assert classifier.input == InputSpec(1, 16, 16, mean=(0.1,), std=(0.2,))
        assert classifier.target_layer == "network.blocks.0"

    def test_card_names_the_classes(self, tmp_path):
        write_folder(tmp_path / "m.keyed", unmarked_classifier(), label_names=("cat", "dog", "cow"))
        assert open_model(tmp_path / "m.keyed")[0].label_names == ("cat", "dog", "cow")

    def test_options_override_the_card(self, tmp_path):
        write_folder(tmp_path / "m.keyed", unmarked_classifier())
        classifier, _ = open_model(tmp_path / "m.keyed", arch="SmallResNet", input_size=64, target_layer="blocks.0")
        assert (classifier.input.height, classifier.target_layer) == (64, "network.blocks.0")

    def test_folder_that_was_changed_is_refused(self, tmp_path):
        folder = write_folder(tmp_path / "m.keyed", unmarked_classifier()).folder
        (folder / "report.json").write_text("{}")
        with pytest.raises(ArtifactError, match="changed"):
            open_model(folder)

    def test_owner_s_own_module_cannot_be_loaded_from_weights(self, tmp_path):
        write_folder(tmp_path / "m.keyed", marked_classifier())
        with pytest.raises(ModelError, match="--factory"):
            open_model(tmp_path / "m.keyed")

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [(TriggerParameters("mosaic", 8.0, 32), "moire"), (TriggerParameters("spread", 8.0, 16), "tile")],
    )
    def test_trigger_that_cannot_be_made_is_refused(self, parameters, message):
        with pytest.raises(ArtifactError, match=message):
            make_family(parameters)

    def test_trigger_does_not_show_itself(self, trigger):
        assert "tensor" not in repr(trigger)
