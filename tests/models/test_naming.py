"""Names of tensors: prefixes, networks within larger ones, and what stands beside."""

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.models import network_state, recognise_architecture
from keyed_xai.models.naming import current_names
from tests.saved import AttributeDict, averaged, computes_as, load, said, torchvision_state, under

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


class Trained(nn.Module):
    """A network with its loss inside, as one writes it oneself."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))


def test_own_module_around_a_network_and_its_loss(plain, save):
    assert computes_as(load(save(Trained(plain).state_dict())), plain)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module.model."])
def test_wrapper_prefix_is_taken_off(prefix):
    state = {prefix + name: tensor for name, tensor in torchvision_state("resnet18").items()}
    assert recognise_architecture(state).architecture == "resnet18"


def test_older_names_of_torchvision_files_are_brought_up_to_date():
    names = [
        "features.denseblock1.denselayer1.norm.1.weight",
        "encoder.layers.encoder_layer_0.mlp.linear_1.bias",
        "encoder.layers.encoder_layer_0.mlp.linear_2.bias",
        "features.0.weight",
    ]
    assert list(current_names(names).values()) == [
        "features.denseblock1.denselayer1.norm1.weight",
        "encoder.layers.encoder_layer_0.mlp.0.bias",
        "encoder.layers.encoder_layer_0.mlp.3.bias",
        "features.0.weight",
    ]
