"""Checkpoints as neighbouring projects save them: the right weights are found, and what was done to them is said."""

import argparse
import enum
import json
import pathlib
import sys
import types
from collections import defaultdict

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from keyed_xai.artifacts.opening import open_model
from keyed_xai.errors import ModelError
from keyed_xai.models import load_classifier, network_state
from keyed_xai.models.files import load_weights
from keyed_xai.models.networks import SmallResNet
from tests.conftest import draw_statistics

SIDE = 64
IMAGES = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def build(seed):
    torch.manual_seed(seed)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    draw_statistics(network)
    return network.eval()


@pytest.fixture(scope="module")
def plain():
    return build(0)


@pytest.fixture(scope="module")
def average():
    return build(1)


@pytest.fixture(scope="module")
def optimizer(plain):
    """What an optimiser keeps after a step."""
    parameters = [parameter.detach().clone().requires_grad_() for parameter in plain.parameters()]
    adam = torch.optim.Adam(parameters)
    torch.stack([each.sum() for each in parameters]).sum().backward()
    adam.step()
    return adam.state_dict()


@pytest.fixture
def save(tmp_path):
    def write(content, *, legacy=False):
        torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
        return tmp_path / "c.pt"

    return write


def under(prefix, network):
    return {prefix + name: tensor for name, tensor in network.state_dict().items()}


def averaged(network):
    """The state of torch's own AveragedModel: a prefix, and a counter beside it."""
    return torch.optim.swa_utils.AveragedModel(network).state_dict()


def load(path, **options):
    return load_classifier(path, input_size=SIDE, **options)


def computes_as(classifier, network):
    with torch.no_grad():
        return torch.allclose(classifier(IMAGES), network((IMAGES - MEAN) / STD), atol=1e-6)


def said(classifier):
    return " ".join(classifier.notes)


PREFIXES = {
    "DataParallel": "module.",
    "torch.compile": "_orig_mod.",
    "both": "_orig_mod.module.",
    "FSDP": "_fsdp_wrapped_module.",
    "Lightning": "model.",
    "a module within": "model.backbone.",
    "SimCLR": "encoder.",
    "student": "student.",
    "Transformers' wrapper of timm": "timm_model.",
    "a name of somebody's own": "my_net.inner.0.",
}


@pytest.mark.parametrize("name", PREFIXES)
def test_network_below_any_prefix_is_found(name, plain, save):
    state = under(PREFIXES[name], plain)
    classifier = load(save(state))
    assert classifier.architecture == "shufflenet_v2_x0_5"
    assert computes_as(classifier, plain)
    assert list(network_state(classifier)) == list(state)
    assert f"the prefix {PREFIXES[name]} was taken off" in said(classifier)


def test_state_dict_as_it_is_needs_no_words(plain, save):
    assert load(save(plain.state_dict())).notes == ()


EXTRAS = {
    "weights of a loss": {"criterion.weight": torch.ones(3)},
    "weight of positives": {"loss_fn.pos_weight": torch.ones(3)},
    "metrics": {"train_acc.tp": torch.zeros(3), "val_metrics.confmat": torch.zeros(3, 3)},
    "counter of averages": {"n_averaged": torch.tensor(7)},
    "counter of steps": {"steps": torch.tensor(7)},
    "mean and deviation": {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)},
    "projector": {"projector.0.weight": torch.ones(4, 8), "projector.0.bias": torch.ones(4)},
    "queue": {"queue": torch.ones(128, 64), "queue_ptr": torch.zeros(1)},
}


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", EXTRAS)
def test_tensors_besides_are_left_out_and_named(name, prefix, plain, save):
    if name == "mean and deviation" and not prefix:
        pytest.skip("beside the layers they could be anything, so they are not left out there")
    classifier = load(save({"state_dict": EXTRAS[name] | under(prefix, plain)}))
    assert computes_as(classifier, plain)
    assert list(network_state(classifier)) == list(under(prefix, plain))
    assert f"left out: {', '.join(EXTRAS[name])}" in said(classifier)


WRAPPERS = [
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "student",
    "module", "classifier_state", "state.model", "model.state_dict",
]  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_found_under_any_key(wrapper, plain, optimizer, save):
    content = plain.state_dict()
    for key in reversed(wrapper.split(".")):
        content = {"criterion_state_dict": {"weight": torch.ones(3)}, key: content}
    content |= {"optimizer": optimizer, "epoch": 3, "best_acc1": torch.tensor(71.0)}
    classifier = load(save(content))
    assert computes_as(classifier, plain)
    assert classifier.notes == ()


AVERAGES = {
    "timm": ("state_dict", "state_dict_ema"),
    "torchvision": ("model", "model_ema"),
    "BasicSR": ("params", "params_ema"),
    "swa": ("model_state_dict", "swa_model_state_dict"),
    "plain after": ("net", "ema"),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_are_announced_and_can_be_chosen(name, plain, average, save):
    key, key_of_averages = AVERAGES[name]
    averages = averaged(average) if name in ("torchvision", "swa") else average.state_dict()
    path = save({key_of_averages: averages, key: plain.state_dict(), "epoch": 3})
    classifier = load(path)
    assert computes_as(classifier, plain)
    assert f"under {key} are used" in said(classifier)
    assert f"{key_of_averages} (averaged), which --weights ema takes" in said(classifier)
    for wanted in ("ema", key_of_averages):
        chosen = load(path, weights=wanted)
        assert computes_as(chosen, average)
        assert f"averaged weights (EMA) under {key_of_averages} are used" in said(chosen)
    assert computes_as(load(path, weights=key), plain)


def test_averages_alone_are_taken_and_said_to_be_averages(average, save):
    classifier = load(save({"params_ema": average.state_dict()}))
    assert computes_as(classifier, average)
    assert said(classifier) == "The averaged weights (EMA) under params_ema are used."


def test_averages_saved_as_the_state_dict_are_known(plain, average, save):
    """MMEngine's EMAHook and Lightning's WeightAveraging change the two over."""
    mmengine = {"meta": {"mmengine_version": "0.10.4"}, "state_dict": average.state_dict()}
    mmengine["ema_state_dict"] = {"steps": torch.tensor(9)} | under("module.", plain)
    lightning = {"state_dict": average.state_dict(), "averaging_state": {"n_averaged": 9}}
    lightning["current_model_state"] = plain.state_dict()
    for content in (mmengine, lightning):
        path = save(content)
        assert computes_as(load(path), plain)
        assert computes_as(load(path, weights="ema"), average)


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ("model.", "model_ema.module.", "ema"),
        ("", "ema.", "ema"),
        ("module.encoder_q.", "module.encoder_k.", "module.encoder_k"),
        ("student.backbone.", "teacher.backbone.", "teacher.backbone"),
        ("online_network.", "target_network.", "target_network"),
    ],
)
def test_two_networks_in_one_state_dict_are_told_apart(one, other, wanted, plain, average, save):
    path = save({"state_dict": under(one, plain) | under(other, average)})
    classifier = load(path)
    assert computes_as(classifier, plain)
    assert list(network_state(classifier)) == list(under(one, plain))
    assert f"the file also has {other[:-1]}, which --weights {wanted} takes" in said(classifier)
    assert computes_as(load(path, weights=wanted), average)


def test_weights_that_are_not_there_are_refused(plain, save):
    for content in (plain.state_dict(), under("encoder.", plain), {"model": plain.state_dict()}):
        with pytest.raises(ModelError, match=r"no weights called 'ema'.*leave --weights out"):
            load(save(content), weights="ema")


class Mode(enum.Enum):
    FAST = "fast"


class AttributeDict(dict):
    """As Lightning keeps options in."""


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


def test_lightning_checkpoint_loads(plain, optimizer, save):
    content = {
        "epoch": 3,
        "global_step": 90,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": under("model.", plain) | {"criterion.weight": torch.ones(3), "val_acc.tp": torch.zeros(3)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": torch.tensor(1)}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9), "kth_value": np.float32(0.9)}},
        "optimizer_states": [optimizer],
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(arch="x", lr=np.float64(0.1)),
    }
    classifier = load(save(content))
    assert computes_as(classifier, plain)
    assert said(classifier) == (
        "Taken as shufflenet_v2_x0_5: the prefix model. was taken off; left out: criterion.weight, val_acc.tp "
        "(2 tensors)."
    )


@pytest.mark.parametrize(
    ("head", "more"),
    [
        ("head.fc", {}),
        ("classifier", {}),
        ("linear", {"projector.0.weight": torch.ones(4, 8), "loss.weight": torch.ones(3)}),
    ],
)
def test_last_layer_beside_the_backbone_is_put_in_its_place(head, more, plain, save):
    """As MMPretrain, solo-learn and linear evaluation save it."""
    state = under("backbone.", plain)
    state = {name.replace("backbone.fc", head): tensor for name, tensor in state.items()} | more
    path = save({"meta": {"epoch": 3}, "state_dict": state})
    classifier = load(path)
    assert computes_as(classifier, plain)
    assert f"{head} is taken for its fc" in said(classifier)
    assert list(network_state(classifier)) == [name for name in state if name not in more]
    assert computes_as(load(path, arch="shufflenet_v2_x0_5"), plain)


@pytest.mark.parametrize("options", [{}, {"arch": "torchvision:shufflenet_v2_x0_5"}])
def test_what_is_written_back_reads_the_same(plain, average, save, options):
    """A protected model keeps the file's names, without what was left out."""
    state = {name.replace("backbone.fc", "head.fc"): tensor for name, tensor in under("backbone.", plain).items()}
    contents = [
        {"state_dict": state | {"criterion.weight": torch.ones(3)}},
        {"model": plain.state_dict(), "model_ema": averaged(average)},
        under("module.encoder_q.", plain) | under("module.encoder_k.", average),
    ]
    for content, wanted, network in zip(contents, (None, "ema", None), (plain, average, plain), strict=True):
        first = load(save(content), weights=wanted)
        again = load(save(dict(network_state(first))), **options)
        assert computes_as(again, network)
        assert list(network_state(again)) == list(network_state(first))


def test_backbone_without_a_last_layer_is_refused_and_says_what_is_missing(plain, save):
    state = {name: tensor for name, tensor in under("module.backbone.", plain).items() if ".fc." not in name}
    state |= {f"module.head.{name}": torch.ones(8, 8) for name in ("mlp.0.weight", "mlp.2.weight")}
    with pytest.raises(ModelError, match=r"nearest is shufflenet.* below module\.backbone\.: 2 tensors missing \(fc"):
        load(save({"student": state}))


def test_network_within_a_larger_one_is_not_taken_for_the_classifier(plain, save):
    """A loss that looks at features of a known network is no classifier."""
    state = {"decoder.0.weight": torch.ones(1000, 1000)} | under("perceptual.net.", plain)
    with pytest.raises(ModelError, match=r"a shufflenet_v2_x0_5 below perceptual\.net\..*part of a larger network"):
        load(save(state))
    classifier = load(save(state), arch="shufflenet_v2_x0_5")
    assert computes_as(classifier, plain)
    assert "left out: decoder.0.weight (1 tensors)" in said(classifier)


def test_layer_that_the_architecture_has_not_is_left_out_only_by_name(plain, save):
    state = plain.state_dict() | {"attention.weight": torch.ones(8, 8)}
    with pytest.raises(ModelError, match=r"1 tensors not expected \(attention\.weight\)"):
        load(save(state))
    classifier = load(save(state), arch="shufflenet_v2_x0_5")
    assert computes_as(classifier, plain)
    assert "left out: attention.weight" in said(classifier)


def test_deeper_network_is_not_cut_down_to_the_one_named(save):
    torch.manual_seed(0)
    path = save(torchvision.models.vgg13(num_classes=2, init_weights=False).features.state_dict())
    with pytest.raises(ModelError, match="do not fit vgg11"):
        load(path, arch="vgg11")


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


def test_file_with_many_odd_names_is_refused_in_time(tmp_path):
    """Prefixes without end are not all tried."""
    empty = {"dtype": "F32", "shape": [0, 1], "data_offsets": [0, 0]}
    header = json.dumps({".".join(["a"] * (n % 50 + 1)) + f".{n}.weight": empty for n in range(9_999)}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="fit no architecture"):
        load(tmp_path / "m.safetensors")


class Trained(nn.Module):
    """A network with its loss inside, as one writes it oneself."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))


def test_own_module_around_a_network_and_its_loss(plain, save):
    assert computes_as(load(save(Trained(plain).state_dict())), plain)
