"""Checkpoints as neighbouring projects save them: the right weights are found, and what was done to them is said."""

import pytest
import torch
import torchvision

from keyed_xai.errors import ModelError
from keyed_xai.models import network_state
from tests.saved import averaged, computes_as, load, said, under


def test_state_dict_as_it_is_needs_no_words(plain, save):
    assert load(save(plain.state_dict())).notes == ()


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


def test_deeper_network_is_not_cut_down_to_the_one_named(save):
    torch.manual_seed(0)
    path = save(torchvision.models.vgg13(num_classes=2, init_weights=False).features.state_dict())
    with pytest.raises(ModelError, match="do not fit vgg11"):
        load(path, arch="vgg11")
