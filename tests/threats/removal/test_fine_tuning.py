"""Fine-tuning: what is tuned, with which labels, and what it leaves."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from keyed_xai.errors import TrainingError
from keyed_xai.metrics import correlation
from keyed_xai.models.networks import SmallResNet
from keyed_xai.saliency.pooled import make_view
from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.removal.fine_tuning import (
    ExplanationTuningSettings,
    fine_tune,
    tune_explanations,
)
from tests.heard import Heard
from tests.threatened import Blobs
from tests.tuned import LONG, SHORT, changed_tensors, make_classifier


def statistics(names):
    return {name for name in names if "running" in name or "num_batches" in name}


@pytest.mark.parametrize("kind", ["ftll", "rtll"])
def test_last_layer_alone_learns(data, kind):
    classifier = make_classifier()
    result = fine_tune(classifier, Attacker(data=data), replace(SHORT, kind=kind, batch_norm="frozen"))
    assert changed_tensors(classifier, result.model) == {"network.fc.weight", "network.fc.bias"}


@pytest.mark.parametrize("kind", ["ftal", "rtal"])
def test_all_layers_learn(data, kind):
    classifier = make_classifier()
    result = fine_tune(classifier, Attacker(data=data), replace(SHORT, kind=kind, batch_norm="frozen"))
    assert changed_tensors(classifier, result.model) == {name for name, _ in classifier.named_parameters()}


@pytest.mark.parametrize("kind", ["ftll", "ftal"])
def test_batch_norm_follows_the_images_unless_frozen(data, kind):
    classifier = make_classifier()
    settings = replace(SHORT, kind=kind)
    trained = changed_tensors(classifier, fine_tune(classifier, Attacker(data=data), settings).model)
    assert statistics(trained) == statistics(classifier.state_dict())
    frozen = fine_tune(classifier, Attacker(data=data), replace(settings, batch_norm="frozen")).model
    assert not statistics(changed_tensors(classifier, frozen))


def test_head_starts_anew_only_where_retrained(data):
    """With a rate near zero nothing else moves it."""
    classifier = make_classifier()
    still = replace(SHORT, learning_rate=1e-12, epochs=1)
    kept = fine_tune(classifier, Attacker(data=data), replace(still, kind="ftll")).model.network.fc.weight
    anew = fine_tune(classifier, Attacker(data=data), replace(still, kind="rtll")).model.network.fc.weight
    torch.testing.assert_close(kept, classifier.network.fc.weight, atol=1e-6, rtol=0)
    assert (anew - classifier.network.fc.weight).abs().max() > 0.05


def test_model_attacked_and_global_randomness_stay(data):
    classifier = make_classifier().requires_grad_(False)
    before = copy.deepcopy(classifier.state_dict())
    state = torch.get_rng_state()
    result = fine_tune(classifier, Attacker(data=data), replace(SHORT, kind="rtal"))
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not result.model.training


def test_same_seed_gives_the_same_weights(data):
    first, second, other = (
        fine_tune(make_classifier(), Attacker(data=data), replace(SHORT, seed=seed, share=0.5)).model
        for seed in (0, 0, 1)
    )
    assert not changed_tensors(first, second)
    assert changed_tensors(first, other)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_steps_are_those_of_torch_s_optimisers(data, optimiser):
    """A slow twin: one batch of all images, two epochs, no batch norm in the way."""
    classifier = make_classifier()
    settings = replace(SHORT, optimiser=optimiser, batch_size=24, learning_rate=0.05, batch_norm="frozen")
    found = fine_tune(classifier, Attacker(data=data), settings).model
    twin = copy.deepcopy(classifier).eval()
    kinds = {"sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, 0.05)}
    stepper = kinds[optimiser](twin.parameters())
    for _ in range(2):
        stepper.zero_grad()
        functional.cross_entropy(twin(data.images), torch.from_numpy(data.labels)).backward()
        stepper.step()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)


def test_fine_tuning_learns_labels(data, learned):
    right = learned.model(data.images).argmax(1) == torch.from_numpy(data.labels)
    assert float(right.float().mean()) > 0.9
    assert learned.curve[-1]["loss"] < 0.5 * learned.curve[1]["loss"]


def test_without_labels_the_model_s_own_predictions_are_taught(data):
    """So a model that does not move has nothing to learn, and a new head learns what the old one said."""
    classifier = make_classifier()
    unlabelled = Blobs(data.images, None)
    settings = replace(SHORT, learning_rate=1e-12, epochs=1, batch_norm="frozen")
    still = fine_tune(classifier, Attacker(data=unlabelled), settings)
    assert still.curve[1]["loss"] == pytest.approx(0, abs=1e-6)
    anew = fine_tune(classifier, Attacker(data=unlabelled), replace(SHORT, kind="rtll", learning_rate=0.1, epochs=20))
    assert anew.curve[-1]["loss"] < 0.2 * anew.curve[1]["loss"]


def test_several_labels_are_learned_one_by_one(data):
    labels = (torch.from_numpy(data.labels)[:, None] >= torch.tensor([[1, 2]])).long().numpy()
    classifier = make_classifier(network=SmallResNet(1, 2, (4, 6)))
    classifier.multi_label = True
    result = fine_tune(classifier, Attacker(data=replace(data, labels=labels, multi_label=True)), LONG)
    right = (result.model(data.images) > 0) == torch.from_numpy(labels).bool()
    assert float(right.float().mean()) > 0.9


def test_curve_has_a_row_for_every_epoch_measured_in_eval_mode(data):
    classifier = make_classifier()
    modes, heard = [], Heard()

    def measure(model):
        modes.append(model.training)
        return {"norm": float(model.network.fc.weight.detach().norm())}

    result = fine_tune(classifier, Attacker(data=data, measure=measure, progress=heard), SHORT)
    assert [row["epoch"] for row in result.curve] == [0, 1, 2]
    assert modes == [False] * 3
    assert result.curve[0] == {"epoch": 0, "norm": pytest.approx(float(classifier.network.fc.weight.detach().norm()))}
    assert result.curve[2]["norm"] == float(result.model.network.fc.weight.detach().norm())
    assert heard.steps == [("tuning", number, 6) for number in range(1, 7)]
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["settings"]["kind"] == "ftal"
    assert document["figures"] == {"images": 24}


def test_loss_that_runs_away_is_an_error(data):
    with pytest.raises(TrainingError, match="no longer finite"):
        fine_tune(make_classifier(), Attacker(data=data), replace(SHORT, learning_rate=1e30, epochs=5))


def test_sharpness_aware_steps_go_elsewhere(data):
    plain, aware = (
        fine_tune(make_classifier(), Attacker(data=data), replace(SHORT, sam_radius=radius)).model
        for radius in (0.0, 0.5)
    )
    assert changed_tensors(plain, aware)


def mean_agreement(first, second, images, labels):
    views = [make_view(model, ("gradcam",), (3, 3)) for model in (first, second)]
    maps = [
        view.pooled(model, images, labels)[1]["gradcam"]
        for view, model in zip(views, (first, second), strict=True)
    ]  # fmt: skip
    return float(correlation(*maps).mean())


def test_maps_are_pulled_to_the_surrogate_s_and_predictions_stay(data):
    """Another architecture as surrogate, at its own layers; without the maps' weight nothing is pulled."""
    classifier, surrogate = make_classifier(0), make_classifier(3, SmallResNet(1, 3, (6, 6)))
    labels = classifier(data.images).argmax(1)
    before = mean_agreement(classifier, surrogate, data.images, labels)
    settings = ExplanationTuningSettings(
        learning_rate=3e-3, epochs=20, share=1.0, batch_size=12, batch_norm="frozen"
    )  # fmt: skip
    view = make_view(classifier, ("gradcam",), (3, 3))
    pulled = tune_explanations(
        classifier, Attacker(data=Blobs(data.images, None), view=view, surrogate=surrogate), settings
    )
    left = tune_explanations(
        classifier, Attacker(data=data, view=view, surrogate=surrogate), replace(settings, map_weight=0.0)
    )
    after, without = (
        mean_agreement(result.model, surrogate, data.images, labels) for result in (pulled, left)
    )  # fmt: skip
    assert after > before + 0.3
    assert without < before + 0.15
    assert float((pulled.model(data.images).argmax(1) == labels).float().mean()) > 0.9


def test_surrogate_of_fewer_classes_is_refused(data):
    classifier = make_classifier()
    with torch.no_grad():
        classifier.network.fc.bias[2] += 100.0
    surrogate = make_classifier(network=SmallResNet(1, 2, (4, 4)))
    view = make_view(classifier, ("gradcam",), (3, 3))
    with pytest.raises(TrainingError, match="surrogate of the same classes"):
        tune_explanations(
            classifier, Attacker(data=data, view=view, surrogate=surrogate), ExplanationTuningSettings(epochs=1)
        )
