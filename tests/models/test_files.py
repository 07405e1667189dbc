"""Reading model files: formats, what is never run, and what is refused before it costs anything."""

import argparse
import enum
import json
import os
import pathlib
import pickle
import struct
import sys
import types
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from keyed_xai.errors import ModelError
from keyed_xai.models import (
    CARD_KEY,
    load_classifier,
)
from keyed_xai.models.files import load_weights, read_model_file
from keyed_xai.models.networks import SmallResNet
from keyed_xai.tensors import Tap
from tests.saved import AttributeDict, computes_as, load, same_state, under


class Bomb:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_legacy_torch_format_is_read(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_classifier(tmp_path / "old.pth").classes == 3


def test_safetensors_is_recognised_by_content(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "weights.bin")
    assert load_classifier(tmp_path / "weights.bin").classes == 3


def test_half_precision_is_read_as_float32(network, tmp_path):
    torch.save({name: tensor.half() for name, tensor in network.state_dict().items()}, tmp_path / "m.pt")
    assert {p.dtype for p in load_classifier(tmp_path / "m.pt").parameters()} == {torch.float32}


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


def test_folder_of_a_protected_model_is_not_taken_for_weights(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(ModelError, match="folder of a protected model"):
        load_classifier(tmp_path)


class Mode(enum.Enum):
    FAST = "fast"


BESIDE = {
    "NumPy scalar": np.float64(71.5),
    "NumPy integer": np.int64(3),
    "NumPy array": np.arange(4.0),
    "state of NumPy's generator": np.random.RandomState(0).get_state(),
    "options": argparse.Namespace(model="shufflenet_v2_x0_5", out=pathlib.PurePosixPath("runs/1"), mode=Mode.FAST),
    "lists by name": defaultdict(list, {"loss": [1.0, 2.0]}),
    "options as Lightning keeps them": AttributeDict(lr=0.1),
    "a class of the script's own": types.SimpleNamespace(width=3),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_objects_beside_the_weights_are_not_loaded(name, legacy, plain, optimizer, save):
    path = save({"model": plain.state_dict(), "optimizer": optimizer, "extra": BESIDE[name]}, legacy=legacy)
    classifier = load(path)
    assert computes_as(classifier, plain)
    assert classifier.notes == ()


def test_class_that_cannot_be_imported_here_is_no_obstacle(plain, save, monkeypatch):
    module = types.ModuleType("somebodys_package")
    module.Options = type("Options", (), {"__module__": "somebodys_package"})
    monkeypatch.setitem(sys.modules, "somebodys_package", module)
    path = save({"model": plain.state_dict(), "options": module.Options()})
    monkeypatch.delitem(sys.modules, "somebodys_package")
    assert computes_as(load(path), plain)


class Calls:
    """Becomes a call in a pickle."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def leave_a_mark(path):
    pathlib.Path(path).mkdir()


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_of_what_is_left_out_is_run(plain, save, tmp_path, legacy):
    mark = tmp_path / "mark"
    path = save({"model": plain.state_dict(), "x": Calls(leave_a_mark, str(mark))}, legacy=legacy)
    assert computes_as(load(path), plain)
    assert not mark.exists()


@pytest.mark.parametrize("function", [eval, exec, __import__])
@pytest.mark.parametrize("legacy", [False, True])
def test_file_that_names_functions_of_the_system_is_refused(plain, save, function, legacy):
    path = save({"model": plain.state_dict(), "x": Calls(function, "1")}, legacy=legacy)
    with pytest.raises(ModelError, match=r"would run code|no model file"):
        load(path)


def test_zeros_of_numpy_take_no_memory(plain, save):
    """NumPy's own function for scalars makes as many bytes as the file asks for."""
    huge = Calls(np.dtype, "V2000000000")
    path = save({"model": plain.state_dict(), "x": Calls(np.float64(0).__reduce__()[0], huge)})
    assert computes_as(load(path), plain)


def test_own_checkpoints_are_read_more_strictly(save):
    with pytest.raises(Exception, match="numpy"):
        load_weights(save({"x": np.float64(1)}))


def test_pickled_modules_need_allow_pickle_and_averages_can_be_chosen(save):
    """As Ultralytics saves them, in half precision."""
    torch.manual_seed(0)
    one, other = (SmallResNet(1, 3, (4, 8)).eval() for _ in range(2))
    path = save({"epoch": 3, "ema_updates": torch.tensor(3), "model": one.half(), "ema": other.half()})
    with pytest.raises(ModelError, match=r"SmallResNet.*would run code.*--allow-pickle"):
        load_classifier(path, input_size=16)
    taken = load_classifier(path, input_size=16, allow_pickle=True)
    chosen = load_classifier(path, input_size=16, allow_pickle=True, weights="ema")
    assert torch.equal(taken.network.fc.weight, one.float().fc.weight)
    assert torch.equal(chosen.network.fc.weight, other.float().fc.weight)


def test_safetensors_with_metadata_and_a_prefix(plain, average, tmp_path):
    state = under("model.", plain) | under("model_ema.", average) | {"n_averaged": torch.tensor(3)}
    save_file(state, tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert computes_as(load(tmp_path / "m.safetensors"), plain)
    assert computes_as(load(tmp_path / "m.safetensors", weights="ema"), average)


def test_file_with_many_odd_names_is_refused_in_time(tmp_path):
    """Prefixes without end are not all tried."""
    empty = {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]}
    header = json.dumps({".".join(["a"] * (n % 50 + 1)) + f".{n}.weight": empty for n in range(9_999)}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="fit no architecture"):
        load(tmp_path / "m.safetensors")
