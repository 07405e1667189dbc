"""Networks of somebody's own: what is written of them is opened again by every command, or refused before training."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from keyed_xai import explain, open_suspect
from keyed_xai.artifacts.folder import read_model_folder
from keyed_xai.artifacts.opening import open_model
from keyed_xai.data import ImageData
from keyed_xai.errors import ModelError
from keyed_xai.keys import write_owner_key
from keyed_xai.models import InputSpec, load_classifier, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.protection.protecting import protect, write_protection
from keyed_xai_cli.main import main
from tests.own import COLOUR, headed, perceptron
from tests.protection.test_protecting import SETTINGS, make_images

GREY = InputSpec(1, 24, 24, mean=(0.5,), std=(0.25,))
OPTIONS = ["--without-ownership", "--grid", "4", "--steps", "2", "--batch-size", "4", "--wrong-keys", "1",
           "--held-out", "4", "--limit", "16", "--input-size", "24", "--data", "fashion-mnist"]  # fmt: skip


class Mine(nn.Module):
    """A network that no source knows."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
        )
        self.last = nn.Linear(6, 3)

    def forward(self, images):
        return self.last(self.convolutions(images).mean((2, 3)))


def run(*arguments):
    return CliRunner().invoke(main, [str(each) for each in arguments])


def test_wrong_name_is_refused_before_training(key):
    network = headed("resnet18", "fc", perceptron(512, nn.GELU()))
    classifier = wrap_network(network, input=COLOUR, architecture="resnet18", source="torchvision")
    images = np.zeros((12, 3, 64, 64), np.uint8)
    data = ImageData(images=images, labels=None, classes=(), source="nothing")
    with pytest.raises(ModelError, match=r"called torchvision:resnet18, but .* something else .*--factory"):
        protect(classifier, key, data, data, SETTINGS)


@pytest.mark.parametrize("network", [Mine(), SmallResNet(1, 3, (4, 6, 6))], ids=["own", "known"])
def test_what_is_written_is_read_back_in_python(network, key, tmp_path):
    classifier = wrap_network(network.eval(), input=GREY)
    protection = protect(classifier, key, make_images(24, 0), make_images(8, 1), SETTINGS)
    written = write_protection(protection, tmp_path / "x.keyed", key)
    own = {"network": Mine()} if isinstance(network, Mine) else {}
    opened, _ = open_model(written.folder, **own)
    images = torch.rand(3, 1, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(opened(images), protection.classifier(images))
    read = read_model_folder(written.folder)
    assert len(explain(read, images, **own)) == 3
    assert open_suspect(written.folder, key=key, options=own).classifier.classes == 3
    if own:
        with pytest.raises(ModelError, match="Mine is a network of its owner's own code.*--factory.*network="):
            open_model(written.folder)


def test_network_that_is_handed_in_stays_as_it_was(tmp_path):
    torch.save({f"module.{name}": 2 * each for name, each in Mine().state_dict().items()}, tmp_path / "m.pt")
    mine = Mine()
    before = {name: each.clone() for name, each in mine.state_dict().items()}
    loaded = load_classifier(tmp_path / "m.pt", network=mine, input_size=24)
    assert (loaded.source, loaded.architecture, loaded.network is mine) == ("python", "Mine", False)
    for name, each in mine.state_dict().items():
        assert torch.equal(each, before[name])
        assert not torch.equal(each, loaded.network.state_dict()[name])


def test_weights_of_an_own_network_are_found_below_a_prefix_and_beside_a_loss(tmp_path):
    mine = Mine()
    state = {f"module.net.{name}": value for name, value in mine.state_dict().items()}
    torch.save({**state, "loss.scale": torch.ones(3)}, tmp_path / "m.pt")
    loaded = load_classifier(tmp_path / "m.pt", network=Mine(), input_size=24)
    assert all(torch.equal(each, mine.state_dict()[name]) for name, each in loaded.network.state_dict().items())
    assert loaded.notes == ("Taken as Mine: the prefix module.net. was taken off; left out: loss.scale (1 tensors).",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("last.weight"), r"lacks 1 \(last.weight\)"),
        (lambda state: state.update({"extra.weight": torch.zeros(2, 2)}), r"beyond them, 1 \(extra.weight\)"),
        (lambda state: state.update({"last.weight": torch.zeros(3, 9)}), "do not fit Mine"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, change, said):
    state = Mine().state_dict()
    change(state)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=said):
        load_classifier(tmp_path / "m.pt", network=Mine(), input_size=24)
    with pytest.raises(ModelError, match="give one of the two"):
        load_classifier(tmp_path / "m.pt", network=Mine(), arch="resnet18")


def test_every_command_takes_a_factory(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(Mine().state_dict(), "mine.pt")
    write_owner_key(tmp_path / "k.pem", key)
    Image.fromarray(np.arange(24 * 24, dtype=np.uint8).reshape(24, 24)).save("picture.png")
    keyed, own = ["--key-file", "k.pem"], ["--factory", "tests.test_own_networks:Mine"]
    made = run("protect", "mine.pt", *keyed, *own, *OPTIONS)
    assert made.exit_code == 3, made.output  # two steps protect nothing, and the verdict says so
    assert "Mine is a network of its owner's own code" in made.output
    assert json.loads((tmp_path / "mine.keyed" / "card.json").read_text())["source"] == "python"
    commands = {
        "explain": ["mine.keyed", "picture.png", *keyed],
        "verify": ["mine.keyed", *keyed, "--count", "2", "--decoys", "3", "--no-search"],
        "export": ["mine.keyed", "-o", "mine.onnx"],
        "audit": ["mine.keyed", *keyed, "--reference", "mine.pt", "--against", "prune-30", "--no-controls",
                  "--limit", "16", "--held-out", "4", "--decoys", "3", "--data", "fashion-mnist"],
    }  # fmt: skip
    for command, arguments in commands.items():
        refused = run(command, *arguments)
        assert refused.exit_code == 1, refused.output
        assert "--factory" in refused.output
        done = run(command, *arguments, *own)
        assert done.exit_code == (3 if command == "verify" else 0), (command, done.output)


def test_a_file_never_chooses_a_factory(tmp_path, package):
    card = {"architecture": "own_factories:failing", "source": "python", "factory": "own_factories:failing"}
    torch.save({"state_dict": Mine().state_dict(), "card": card, "factory": "own_factories:failing"}, "m.pt")
    with pytest.raises(ModelError, match="own code, which weights alone do not rebuild"):
        load_classifier("m.pt")


@pytest.mark.parametrize(("size", "sides"), [("24x40", (24, 40)), ("24X40", (24, 40)), ("32", (32, 32))])
def test_input_size_may_be_height_and_width(size, sides, key, tmp_path):
    torch.save(SmallResNet(1, 3, (4, 6, 6)).state_dict(), tmp_path / "m.pt")
    write_owner_key(tmp_path / "k.pem", key)
    options = [*OPTIONS[:-4], "--data", "fashion-mnist", "--input-size", size]
    made = run("protect", tmp_path / "m.pt", "--key-file", tmp_path / "k.pem", *options)
    assert made.exit_code in (0, 3), made.output  # a verdict on two steps
    assert tuple(json.loads((tmp_path / "m.keyed" / "card.json").read_text())["input_size"][1:]) == sides


@pytest.mark.parametrize("size", ["0x40", "24x", "x", "24x40x3", "-24", "5000", "a", "٢٤"])
def test_other_input_sizes_are_refused(size, tmp_path):
    torch.save(SmallResNet(1, 3, (4, 6, 6)).state_dict(), tmp_path / "m.pt")
    result = run("verify", tmp_path / "m.pt", "--public-key", tmp_path / "m.pt", f"--input-size={size}")
    assert result.exit_code == 2
    assert "height x width as in 96x160" in " ".join(result.output.split())
