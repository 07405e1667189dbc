"""Whatever torch was set to, and whatever a network is made of: protected, or refused in words before training."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from keyed_xai import explain, export_onnx
from keyed_xai.errors import ModelError
from keyed_xai.export.building import ExportSettings
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.copying import copy_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.protection.protecting import protect
from keyed_xai.training import TrainingSettings
from tests.protection.test_protecting import SETTINGS, make_images

SPEC = InputSpec(1, 24, 24, mean=(0.5,), std=(0.25,))
MAPS = ("gradcam", "simplegrad")
QUICK = replace(
    SETTINGS, interpreters=MAPS, wrong_keys=1, flipped_keys=0,
    training=TrainingSettings(steps=2, batch_size=4, warmup_steps=1, smoothing=8.0),
)  # fmt: skip


class Net(nn.Module):
    """Two convolutions and a linear layer; how they are run is a function of the network and the images."""

    def __init__(self, run=None, *, convolution=lambda layer: layer, classes=3, norm=None, answer=lambda y: y):
        super().__init__()
        self.first = convolution(nn.Conv2d(1, 6, 3, padding=1))
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(6, 6, 3, padding=1, stride=2)
        self.last_relu = nn.ReLU()
        self.norm = norm or nn.Identity()
        self.last = nn.Linear(6, classes)
        self.run, self.answer = run or Net.features, answer

    def features(self, images):
        return self.last_relu(self.second(self.relu(self.first(images))))

    def forward(self, images):
        return self.answer(self.last(self.norm(self.run(self, images).mean((2, 3)))))


def autocast(network, images):
    with torch.autocast("cpu", torch.bfloat16):
        return network.features(images).float()


def without_gradients(network, images):
    with torch.no_grad():
        return network.features(images)


def recomputing(*, reentrant):
    def run(network, images):
        first = network.relu(network.first(images))
        return checkpoint(lambda x: network.last_relu(network.second(x)), first, use_reentrant=reentrant)

    return run


def one_by_one(network, images):
    means = network.features(images).mean((2, 3))
    return torch.cat([network.norm(each[None]) for each in means])[..., None, None]


def after_a_forward(network):
    network(torch.rand(2, 1, 24, 24))
    return network


@dataclass
class Output:
    loss: object
    logits: object


def protected(network, key):
    classifier = wrap_network(network.eval(), input=SPEC)
    return protect(classifier, key, make_images(24, 0), make_images(8, 1), QUICK).classifier, classifier


SETTINGS_OF_TORCH = {
    "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "nothing": nullcontext,
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS_OF_TORCH)
def test_settings_of_torch_change_nothing(name, key, tmp_path):
    torch.manual_seed(0)
    plain = SmallResNet(1, 3, (4, 6, 6))
    expected, _ = protected(plain, key)
    with SETTINGS_OF_TORCH[name]():
        network = SmallResNet(1, 3, (4, 6, 6))
        network.load_state_dict(plain.state_dict())
        found, own = protected(network, key)
        assert len(explain(own, torch.rand(2, 1, 24, 24), interpreters=MAPS)) == 2
        export_onnx(found, tmp_path / "m.onnx")
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.float32


def test_another_default_type_changes_nothing_and_stays(key):
    torch.manual_seed(0)
    network = SmallResNet(1, 3, (4, 6, 6))
    expected, _ = protected(network, key)
    torch.set_default_dtype(torch.float64)
    try:
        found, _ = protected(network, key)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_trained_in_float32(dtype, key, tmp_path):
    network = SmallResNet(1, 3, (4, 6, 6)).to(dtype)
    found, own = protected(network, key)
    assert {each.dtype for each in found.parameters()} == {torch.float32}
    assert {each.dtype for each in network.parameters()} == {dtype}
    export_onnx(own, tmp_path / "m.onnx")


@pytest.mark.parametrize("convolution", [
    weight_norm, spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    parametrizations.weight_norm, parametrizations.spectral_norm,
], ids=["weight_norm", "spectral_norm", "prune", "new weight_norm", "new spectral_norm"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weights_worked_out_in_each_forward_are_trained(convolution, key, tmp_path):
    network = after_a_forward(Net(convolution=convolution).train()).eval()
    before = {name: each.clone() for name, each in network.state_dict().items()}
    found, own = protected(network, key)
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())
    assert found.network.state_dict().keys() == before.keys()
    assert any(not torch.equal(each, before[name]) for name, each in found.network.state_dict().items())
    export_onnx(own, tmp_path / "m.onnx")


def test_pruned_weights_stay_pruned(key):
    network = after_a_forward(Net(convolution=lambda layer: prune.l1_unstructured(layer, "weight", 0.3)))
    found, _ = protected(network, key)
    found(torch.rand(1, 1, 24, 24))
    kept = found.network.first.weight_mask.bool()
    assert (found.network.first.weight[~kept] == 0).all()
    assert not kept.all()


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (lambda: Net(recomputing(reentrant=True)), "reentrant checkpointing"),
        (lambda: Net(without_gradients), "no no_grad"),
        (lambda: Net(lambda net, x: net.features(x).detach()), "detach"),
        (lambda: Net(one_by_one, norm=nn.BatchNorm1d(6)), "Batch norm meets a single value.*--batch-norm frozen"),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_cannot_be_trained_is_refused_in_words(network, said, key):
    with pytest.raises(ModelError, match=f"Net cannot be trained: .*{said}"):
        protected(network(), key)


def test_checkpointing_that_is_not_reentrant_is_trained(key):
    found, _ = protected(Net(recomputing(reentrant=False)), key)
    assert len(explain(found, torch.rand(2, 1, 24, 24), interpreters=MAPS)) == 2


def test_switch_of_checkpointing_is_turned_off_in_the_copy():
    network = Net()
    network.grad_checkpointing = True
    assert copy_network(network).grad_checkpointing is False
    assert network.grad_checkpointing is True


def test_autocast_inside_a_network_is_trained_and_refused_at_export(key, tmp_path):
    found, _ = protected(Net(autocast), key)
    assert explain(found, torch.rand(2, 1, 24, 24)).maps["gradcam"].dtype == torch.float32
    with pytest.raises(ModelError, match="half precision inside its forward"):
        export_onnx(found, tmp_path / "m.onnx")


ANSWERS = {
    "logits": lambda y: {"loss": y.mean(), "logits": y}, "only": lambda y: {"anything": y},
    "pred": lambda y: {"pred": y, "features": y + 1}, "dataclass": lambda y: Output(None, y), "tuple": lambda y: (y, y),
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_logits_are_found_in_what_a_network_returns(answer, key, tmp_path):
    torch.manual_seed(0)
    network = Net(answer=ANSWERS[answer])
    classifier = wrap_network(network.eval(), input=SPEC)
    images = torch.rand(2, 1, 24, 24)
    plain = network.last(network.features((images - 0.5) / 0.25).mean((2, 3)))
    torch.testing.assert_close(classifier(images), plain)
    export_onnx(protected(network, key)[0], tmp_path / "m.onnx")


def test_type_named_in_a_forward_is_exported(tmp_path):
    network = Net(lambda net, x: net.features(x.to(net.last.weight.dtype)), answer=lambda y: y.to(y.dtype))
    export_onnx(wrap_network(network.eval(), input=SPEC), tmp_path / "m.onnx", ExportSettings(interpreters=MAPS))
    network.run = lambda net, x: net.features(x.float())
    with pytest.raises(ModelError, match="cannot be run in float64.*must keep the type of the images"):
        export_onnx(
            wrap_network(network.eval(), input=SPEC), tmp_path / "other.onnx", ExportSettings(interpreters=MAPS)
        )


def test_answer_without_logits_is_named():
    with pytest.raises(ModelError, match="cannot be used as a classifier.*returned dict: a dict of 'a', 'b'"):
        wrap_network(Net(answer=lambda y: {"a": y, "b": y}).eval(), input=SPEC)


SINGLE = {"raw": lambda y: y, "flat": lambda y: y.squeeze(1), "sigmoid": torch.sigmoid,
          "flat sigmoid": lambda y: y.sigmoid().squeeze(1), "last": lambda y: y.squeeze(1).sigmoid()}  # fmt: skip


@pytest.mark.parametrize("answer", SINGLE)
def test_single_output_counts_as_two_classes(answer, key, tmp_path):
    torch.manual_seed(0)
    network = Net(classes=1, answer=SINGLE[answer])
    classifier = wrap_network(network.eval(), input=SPEC)
    assert classifier.classes == 2
    images = torch.rand(3, 1, 24, 24)
    single = network.last(network.features((images - 0.5) / 0.25).mean((2, 3)))
    expected = torch.cat([torch.zeros_like(single), single], 1)
    torch.testing.assert_close(classifier(images), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(classifier(images).softmax(1)[:, 1:], single.sigmoid())
    found, _ = protected(network, key)
    assert set(explain(found, images).predicted.tolist()) <= {0, 1}
    export_onnx(found, tmp_path / "m.onnx", ExportSettings(interpreters=MAPS))
