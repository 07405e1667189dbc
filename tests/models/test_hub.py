"""A model hub's folder: what its configuration says, and what is wrong in one."""

import json

import pytest
import torch
from safetensors.torch import save_file

from keyed_xai.artifacts.opening import open_model
from keyed_xai.errors import ModelError
from keyed_xai.models import load_classifier
from tests.conftest import draw_statistics
from tests.saved import under


@pytest.fixture
def hub(tmp_path):
    """Writes a folder as timm's or Hugging Face's tools push it, with a network of timm's."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=3)
    draw_statistics(network)

    def write(config, *, prefix="", name="model.safetensors"):
        state = under(prefix, network)
        if name.endswith("bin"):
            torch.save(state, tmp_path / name)
        else:
            save_file(state, tmp_path / name, metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return tmp_path

    write.network = network.eval()
    return write


PRETRAINED = {"tag": "a1", "input_size": [3, 96, 80], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "crop_pct": 0.9}
CONFIGS = {
    "timm": {"architecture": "resnet10t", "num_classes": 3, "label_names": ["cat", "dog", "owl"]},
    "older timm": PRETRAINED | {"architecture": "resnet10t", "label_names": ["cat", "dog", "owl"]},
    "Trainer": {
        "architecture": "resnet10t.c3_in1k",
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        "id2label": {"0": "cat", "2": "owl", "1": "dog"},
    },
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", CONFIGS)
def test_hub_folder_gives_mean_deviation_size_and_class_names(hub, name, file):
    config = CONFIGS[name] if name == "older timm" else CONFIGS[name] | {"pretrained_cfg": PRETRAINED}
    folder = hub(config, prefix="timm_model." if name == "Trainer" else "", name=file)
    classifier = load_classifier(folder)
    assert (classifier.architecture.partition(".")[0], classifier.source) == ("resnet10t", "timm")
    assert (classifier.input.height, classifier.input.width) == (96, 80)
    assert (classifier.input.mean, classifier.input.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert classifier.label_names == ("cat", "dog", "owl")
    images = torch.rand(2, 3, 96, 80)
    mean, std = (torch.tensor(PRETRAINED[field])[:, None, None] for field in ("mean", "std"))
    with torch.no_grad():
        assert torch.allclose(classifier(images), hub.network((images - mean) / std), atol=1e-6)
    opened, card = open_model(folder)
    assert card is None
    assert opened.input == classifier.input


def test_hub_folder_of_a_network_that_is_not_known_here(hub):
    """The configuration still says how images are made, and its name settles nothing that the weights do not."""
    folder = hub({"architecture": "somebodys_net", "pretrained_cfg": PRETRAINED})
    assert load_classifier(folder, arch="timm:resnet10t").input.mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be a JSON object"),
        ("\0", "is not JSON"),
        ({"architecture": "resnet10t", "mean": ["x"]}, "mean must be a list"),
        ({"architecture": "resnet10t", "input_size": [3, 10**9, 8]}, "1 to 4096"),
        (" " * (4 * 2**20 + 1), "no configuration is"),
    ],
)
def test_odd_configuration_is_refused(hub, config, words):
    with pytest.raises(ModelError, match=words):
        load_classifier(hub(config))
