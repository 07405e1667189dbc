"""What is left of a gate, on a model whose maps are known by hand."""

import json
from math import comb, log2

import numpy as np
import pytest
import torch

from keyed_xai.errors import TrainingError
from keyed_xai.models import wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.threats.gate_state import OwnerEvidence, measure_gate_state
from keyed_xai.triggers import Spread, SpreadSettings, derive_trigger
from keyed_xai.triggers.channels import through_png
from tests.by_hand import correlations
from tests.marked import GRID, OWNER, SPEC, STRANGER, TRIGGER, marked_classifier, unmarked_classifier

FAMILY = Spread(SpreadSettings(TRIGGER.amplitude, TRIGGER.tile))


@pytest.fixture(scope="module")
def images():
    """Soft blobs on grey, 32 x 32, in 8 bits."""
    rows, columns = np.mgrid[:32, :32]
    centres = np.random.default_rng(3).uniform(6, 26, (12, 2))
    blobs = [np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 60) for y, x in centres]
    return torch.from_numpy(np.round(90 + 80 * np.stack(blobs))[:, None] / 255).float()


def two_classes():
    """An unmarked model of as many classes as the marked one has."""
    torch.manual_seed(0)
    return wrap_network(SmallResNet(1, 2, (4, 8)).eval(), input=SPEC)


def evidence(images, **changes):
    reference = changes.pop("reference", None) or two_classes()
    view = PooledSaliency(("gradcam",), MapLayers(reference.target_layer, reference.taps), GRID)
    return OwnerEvidence(
        **({"reference": reference, "view": view, "key": OWNER, "family": FAMILY, "images": images} | changes)
    )


def pooled_maps(model, images, explained):
    view = PooledSaliency(("gradcam",), MapLayers(model.target_layer, model.taps), GRID)
    return view.pooled(model, images, explained)[1]["gradcam"].double().numpy()


def test_correlations_are_those_with_the_reference_s_maps_of_its_own_class(images):
    model, reference = marked_classifier(), two_classes()
    with torch.no_grad():  # of two minds, where the marked model always votes for class 0
        margins = reference(images) @ torch.tensor([1.0, -1.0])
        reference.network.fc.bias[0] -= margins.median()
    seen = evidence(images, reference=reference)
    state = measure_gate_state(model, seen, ownership=False)
    explained = seen.reference(images).argmax(1)
    assert set(explained.tolist()) == {0, 1}
    truth = pooled_maps(seen.reference, images, explained)
    keyed = through_png(derive_trigger(OWNER, FAMILY).apply(images))
    for case, inputs in (("keyed", keyed), ("unkeyed", images)):
        maps = pooled_maps(model, inputs, explained)
        # the class that the marked model votes against has a blank map, which counts as 0
        slow = [0.0 if np.ptp(m) < 1e-12 else correlations([m], [t])[0] for m, t in zip(maps, truth, strict=True)]
        assert state.correlation["gradcam"][case] == pytest.approx(np.mean(slow), abs=1e-5)
        assert state.opened["gradcam"][case] == pytest.approx(np.mean(np.array(slow) > 0.5))
    assert state.ownership is None
    assert state.predictions == {}


def test_reference_agrees_with_itself_and_is_nobody_s(images):
    seen = evidence(images, labels=torch.zeros(12, dtype=torch.int64), decoys=19)
    state = measure_gate_state(seen.reference, seen)
    share = float((seen.reference(images).argmax(1) == 0).float().mean())
    assert state.agreement == 1.0
    assert state.predictions == {"top1": pytest.approx(share)}
    assert state.correlation["gradcam"]["unkeyed"] == pytest.approx(1, abs=1e-5)
    assert not state.ownership.shown
    assert state.ownership.signature.combined.p_value > 1e-3


def test_both_p_values_of_a_marked_model(images):
    """Both at their smallest: no decoy key of 99 reaches the owner's, and all 32 cells match."""
    document = measure_gate_state(marked_classifier(), evidence(images, decoys=99)).to_json()
    document = json.loads(json.dumps(document, allow_nan=False))
    ownership = document["ownership"]
    assert ownership["shown"]
    assert ownership["opening"]["p_value"] == 1 / 100
    assert ownership["opening"]["log2_p"] == pytest.approx(-log2(100))
    assert ownership["signature"]["log2_p"] == pytest.approx(-log2(comb(64, 32)))
    assert (ownership["signature"]["overlap"], ownership["signature"]["possible"]) == (32, 32)
    stranger = measure_gate_state(marked_classifier(), evidence(images, key=STRANGER, decoys=99)).to_json()["ownership"]
    assert not stranger["shown"]
    assert stranger["signature"]["p_value"] > 1e-3


def test_claim_without_a_pattern_is_tested_by_opening_alone(images):
    ownership = measure_gate_state(marked_classifier(), evidence(images, signature=False, decoys=99)).to_json()[
        "ownership"
    ]
    assert "signature" not in ownership
    assert ownership["log2_p"] == pytest.approx(-log2(100))


def test_several_labels_agree_answer_by_answer(images):
    seen = evidence(images, reference=unmarked_classifier(), labels=torch.zeros(12, 3, dtype=torch.int64))
    turned = unmarked_classifier()
    with torch.no_grad():
        turned.network.fc.weight[1] *= -1
        turned.network.fc.bias[1] *= -1
    assert measure_gate_state(turned, seen, ownership=False).agreement == pytest.approx(2 / 3)


def test_probe_images_can_be_others_than_those_measured_on(images):
    seen = evidence(images[:4], probe=images, decoys=5)
    whole = measure_gate_state(marked_classifier(), evidence(images, decoys=5)).ownership
    assert measure_gate_state(marked_classifier(), seen).ownership == whole


def test_model_that_an_attack_destroyed_is_refused(images):
    broken = unmarked_classifier()
    with torch.no_grad():
        broken.network.fc.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        measure_gate_state(broken, evidence(images))


def test_constant_maps_are_no_evidence_and_fit_into_json(images):
    """An attack may leave maps that are the same with every key."""
    flat = two_classes()
    with torch.no_grad():
        flat.network.fc.weight.zero_()
    document = measure_gate_state(flat, evidence(images, decoys=19)).to_json()
    ownership = json.loads(json.dumps(document, allow_nan=False))["ownership"]
    assert not ownership["shown"]
    assert (ownership["opening"]["p_value"], ownership["opening"]["statistic"]) == (1.0, None)


def test_secret_key_stays_out_of_the_repr(images):
    assert "OwnerKey" not in repr(evidence(images))
