"""Weight shifting, regularisation and batch norm learnt anew, by hand and on a tiny protected model."""

import json

import pytest
import torch
from torch import nn

from keyed_xai.errors import ModelError
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.gate_state import measure_gate_state
from keyed_xai.threats.removal.shifting import (
    RegularisationSettings,
    ShiftingSettings,
    regularise,
    relearn_batch_norm,
    shift_weights,
    shifted,
    squared_weights,
)
from keyed_xai.threats.removal.tuning import TuningSettings
from tests.heard import Heard
from tests.threatened import evidence, make_blobs, protected

ATTACKS = {
    "shift": (shift_weights, ShiftingSettings),
    "regularise": (regularise, RegularisationSettings),
    "relearn": (relearn_batch_norm, TuningSettings),
}
every_attack = pytest.mark.parametrize(("attack", "make"), ATTACKS.values(), ids=ATTACKS)


@pytest.fixture(scope="module")
def data():
    return make_blobs(64, 5)


def weights(model, kind):
    return [module.weight.detach() for module in model.modules() if isinstance(module, kind)]


@every_attack
def test_attack_leaves_the_model_and_gives_back_a_working_copy(attack, make, data):
    before = {name: tensor.clone() for name, tensor in protected().state_dict().items()}
    result = attack(protected(), Attacker(data=data), make(share=1.0, batch_size=16))
    state = measure_gate_state(result.model, evidence(decoys=9))
    assert all(torch.equal(tensor, before[name]) for name, tensor in protected().state_dict().items())
    assert not result.model.training
    assert state.predictions["top1"] > 0.7
    json.dumps(result.to_json(), allow_nan=False)


@every_attack
def test_without_labels_the_stolen_model_teaches(attack, make):
    """Its answers from before the attack, not those of the damaged copy."""
    unlabelled = make_blobs(64, 5, labelled=False)
    result = attack(protected(), Attacker(data=unlabelled), make(share=1.0, batch_size=16))
    assert measure_gate_state(result.model, evidence(), ownership=False).agreement > 0.7


@every_attack
def test_seed_decides(attack, make, data):
    first, again, other = (
        attack(protected(), Attacker(data=data), make(share=0.5, batch_size=16, epochs=1, seed=seed)).model.state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


# Weight shifting


def test_shift_is_the_formula_filter_by_filter():
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 2, 2)
    found = shifted(weight, 1.5, 0.5, torch.Generator().manual_seed(4))
    noise = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(4))
    mean = (weight[0] + weight[1] + weight[2]) / 3
    for number in range(3):
        wanted = weight[number] - 1.5 * mean - 0.5 * weight.std() * noise[number]
        torch.testing.assert_close(found[number], wanted)


def test_full_shift_without_noise_leaves_no_mean_filter():
    weight = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    assert shifted(weight, 1.0, 0.0, torch.Generator()).mean(0).abs().max() < 1e-6


def test_shift_throws_accuracy_off_before_tuning(data):
    def measure(model):
        return {"top1": measure_gate_state(model, evidence(), ownership=False).predictions["top1"]}

    settings = ShiftingSettings(share=1.0, batch_size=16)
    curve = shift_weights(protected(), Attacker(data=data, measure=measure), settings).curve
    assert len(curve) == 11
    assert curve[0]["top1"] < measure(protected())["top1"] - 0.2
    assert curve[-1]["top1"] > curve[0]["top1"] + 0.2


def test_model_without_convolutions_is_refused(data):
    network = nn.Sequential(nn.Flatten(), nn.Linear(576, 3))
    classifier = wrap_network(network.eval(), input=InputSpec(1, 24, 24, mean=(0.4,), std=(0.2,)), require_map=False)
    with pytest.raises(ModelError, match="no convolution"):
        shift_weights(classifier, Attacker(data=data), ShiftingSettings())
    with pytest.raises(ModelError, match="no batch norm"):
        relearn_batch_norm(classifier, Attacker(data=data), TuningSettings())


# Regularisation


def test_decay_shrinks_weights_that_later_epochs_let_be(data):
    settings = {"share": 1.0, "batch_size": 16, "epochs": 1}
    brief, long = (
        regularise(protected(), Attacker(data=data), RegularisationSettings(**settings, decay_epochs=epochs))
        for epochs in (1, 12)
    )
    before, after, later = (
        float(squared_weights([*each.parameters()]).detach()) for each in (protected(), brief.model, long.model)
    )
    assert later < 0.7 * after < 0.7 * before


def test_curve_counts_the_epochs_of_both_phases(data):
    heard = Heard()
    settings = RegularisationSettings(share=1.0, batch_size=32, epochs=3, decay_epochs=2)
    result = regularise(protected(), Attacker(data=data, progress=heard), settings)
    assert [row["epoch"] for row in result.curve] == list(range(6))
    assert heard.counts("tuning") == [(done, 10) for done in range(1, 11)]


def test_decay_is_half_the_squares_in_the_loss():
    one, two = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([[3.0]]))
    assert float(squared_weights([one, two]).detach()) == 14


@pytest.mark.parametrize("fields", [{"decay": 0.0}, {"decay_epochs": 0}])
def test_no_decay_is_refused(fields):
    with pytest.raises(ValueError, match="positive decay"):
        RegularisationSettings(**fields)


@pytest.mark.parametrize("fields", [{"strength": -1.0}, {"noise": -0.1}])
def test_negative_shift_is_refused(fields):
    with pytest.raises(ValueError, match="no negative"):
        ShiftingSettings(**fields)


# Batch norm learnt anew


def test_filters_and_last_layer_stay(data):
    result = relearn_batch_norm(protected(), Attacker(data=data), TuningSettings(share=1.0, batch_size=16, epochs=2))
    for kind in (nn.Conv2d, nn.Linear):
        for before, after in zip(weights(protected(), kind), weights(result.model, kind), strict=True):
            assert torch.equal(before, after)
    scales = zip(weights(protected(), nn.BatchNorm2d), weights(result.model, nn.BatchNorm2d), strict=True)
    assert all(not torch.equal(before, after) for before, after in scales)
    assert result.figures["batch_norms"] == len(weights(protected(), nn.BatchNorm2d))
