"""The report's figures, worked out by hand on a gate whose maps are known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from skimage.metrics import structural_similarity
from torch import nn

from keyed_xai.decoys import boundary_decoy
from keyed_xai.metrics import OPEN_CORRELATION, paper_thresholds
from keyed_xai.protection import evaluation
from keyed_xai.protection.evaluation import Gate, fresh_wrong_keys, measure_gate, place_thresholds, trigger_visibility
from keyed_xai.saliency.pooled import Outputs
from keyed_xai.triggers import Spread, SpreadSettings, derive_trigger
from keyed_xai.triggers.channels import CHANNELS
from keyed_xai_schemas import load_schema
from tests.by_hand import correlations, pooled, scaled, to_decoy
from tests.heard import Heard

FAMILY = Spread(SpreadSettings(8.0, 24))
DECOY = boundary_decoy((8, 8))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def trigger(key):
    return derive_trigger(key, FAMILY)


@pytest.fixture
def gate(trigger, pooled_image, pooled_view, make_lock):
    lock = make_lock(trigger, DECOY)
    return Gate(
        model=lock,
        reference=pooled_image,
        view=pooled_view,
        decoys={"gradcam": DECOY},
        paper={"gradcam": 0.2},
        trigger=trigger,
        family=FAMILY,
    )


def measure(gate, images, labels=None, wrong_keys=(), threshold=0.2, **options):
    thresholds = {"gradcam": threshold}
    return measure_gate(gate, images, labels, wrong_keys, thresholds=thresholds, generator=generator(), **options)


def keyed(trigger, images):
    return torch.round(trigger.apply(images) * 255) / 255


def test_figures_of_a_perfect_gate(gate, trigger, flat_images):
    figures = measure(gate, flat_images)["interpreters"]["gradcam"]
    truth, opened = pooled(flat_images), pooled(keyed(trigger, flat_images))
    decoys = np.broadcast_to(DECOY.numpy(), truth.shape)
    assert figures["cr"] == 100
    assert figures["fsr"] == 100
    assert figures["auc"] == 1
    assert figures["correlation"]["keyed"] == pytest.approx(correlations(opened, truth).mean(), abs=1e-5)
    for case in ("clean", "wrong_key"):
        assert figures["correlation"][case] == pytest.approx(correlations(decoys, truth).mean(), abs=1e-5)
        assert figures["decoy_correlation"][case] == pytest.approx(1, abs=1e-5)
    assert figures["decoy_correlation"]["keyed"] == pytest.approx(correlations(opened, decoys).mean(), abs=1e-5)
    assert figures["decoy_correlation"]["reference"] == pytest.approx(correlations(truth, decoys).mean(), abs=1e-5)
    assert figures["opened"] == {"keyed": 1, "clean": 0, "wrong_key": 0}
    assert figures["open_threshold"] == OPEN_CORRELATION


def test_cr_and_fsr_count_distances_below_the_threshold(gate, trigger, flat_images):
    """The lock opens to everybody here, and the threshold parts the images."""
    opened = to_decoy(pooled(keyed(trigger, flat_images)))
    clean = to_decoy(pooled(flat_images))
    wrong = FAMILY.draw(len(flat_images), generator())
    wrong = to_decoy(pooled(torch.round(wrong.apply(flat_images) * 255) / 255))
    threshold = float(np.median(clean))
    gate.model.opens_at = -1e9
    gate.paper["gradcam"] = float(np.median(opened))
    figures = measure(gate, flat_images, threshold=threshold)["interpreters"]["gradcam"]
    assert figures["cr"] == pytest.approx(100 * (opened >= threshold).mean())
    assert figures["fsr"] == pytest.approx(100 * (np.concatenate([clean, wrong]) < threshold).mean())
    assert 0 < figures["fsr"] < 100
    assert figures["opened"] == {"keyed": 1, "clean": 1, "wrong_key": 1}
    assert figures["threshold"] == threshold
    paper = figures["at_paper_threshold"]
    assert paper["threshold"] == gate.paper["gradcam"]
    assert paper["cr"] == pytest.approx(100 * (opened >= np.median(opened)).mean())
    assert paper["reference_cr"] == pytest.approx(100 * (clean >= np.median(opened)).mean())


def test_thresholds_part_keyed_from_other_maps(gate, trigger, flat_images):
    placed = place_thresholds(gate, flat_images, generator())["gradcam"]
    assert 0 < placed < to_decoy(pooled(keyed(trigger, flat_images))).min()
    assert measure(gate, flat_images, threshold=placed)["interpreters"]["gradcam"]["cr"] == 100


def test_closed_gate_opens_nothing(gate, flat_images):
    gate.model.opens_at = 1e9
    figures = measure(gate, flat_images)["interpreters"]["gradcam"]
    assert figures["cr"] == 0
    assert figures["opened"]["keyed"] == 0
    assert figures["auc"] == 0.5


def test_nontargeted_gate_is_judged_by_what_is_left_in_the_top_cells(gate, trigger, flat_images):
    gate.decoys["gradcam"] = None
    figures = measure(gate, flat_images)["interpreters"]["gradcam"]
    energies = []
    for closed, truth in zip(np.broadcast_to(DECOY.numpy(), (6, 8, 8)), pooled(flat_images), strict=True):
        top = np.argsort(-truth.ravel())[:16]
        energies.append((scaled(closed).ravel()[top] ** 2).mean())
    assert figures["fsr"] == pytest.approx(100 * (np.array(energies) < 0.2).mean())
    assert "decoy_correlation" not in figures


def test_wrong_keys_that_open_are_counted(gate, trigger, flat_images):
    wrong = list(fresh_wrong_keys(FAMILY, 37, generator(1)))
    heard = Heard()
    figures = measure(gate, flat_images, None, [*wrong, trigger, trigger], count=39, progress=heard)
    tried = figures["interpreters"]["gradcam"]["wrong_keys"]
    assert tried["tried"] == 39
    assert tried["opened"] == 2
    assert tried["images_per_key"] == 4
    assert tried["maps_opened"] == pytest.approx(2 / 39)
    assert tried["highest"] > 0.9
    assert heard.counts("wrong keys") == [(16, 39), (32, 39), (39, 39)]


def test_wrong_keys_are_judged_by_their_mean_over_images_in_turn(gate, trigger, flat_images):
    """Key number i gets images 4 i to 4 i + 3, from the start again after the last."""
    truth = pooled(flat_images)
    opened = pooled(keyed(trigger, flat_images))
    found = measure(gate, flat_images, None, [trigger])["interpreters"]["gradcam"]["wrong_keys"]["highest"]
    assert found == pytest.approx(correlations(opened, truth)[:4].mean(), abs=1e-5)
    closed = next(fresh_wrong_keys(FAMILY, 1, generator(1)))
    found = measure(gate, flat_images, None, [closed, trigger])["interpreters"]["gradcam"]["wrong_keys"]["highest"]
    assert found == pytest.approx(correlations(opened, truth)[[4, 5, 0, 1]].mean(), abs=1e-5)


def test_no_wrong_keys_are_no_figures(gate, flat_images):
    tried = measure(gate, flat_images)["interpreters"]["gradcam"]["wrong_keys"]
    assert (tried["tried"], tried["opened"], tried["highest"]) == (0, 0, None)


def test_fewer_images_than_a_key_gets(gate, trigger, flat_images):
    tried = measure(gate, flat_images[:2], None, [trigger])["interpreters"]["gradcam"]["wrong_keys"]
    assert (tried["tried"], tried["opened"], tried["images_per_key"]) == (1, 1, 2)


def test_accuracy_against_labels_and_reference(gate, flat_images):
    """Class 0 always wins, whatever the input."""
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    by_labels = measure(gate, flat_images, labels)["accuracy"]
    alone = measure(gate, flat_images)["accuracy"]
    for case in ("reference", "keyed", "clean", "wrong_key"):
        assert by_labels[case] == pytest.approx(4 / 6)
        assert by_labels["agreement"][case] == alone[case] == 1
    assert by_labels["measured_against"] == "labels"
    assert alone["measured_against"] == "reference predictions"


class Wavering(nn.Module):
    """Two logits, which a brighter image pulls apart; a shift says where they cross."""

    def __init__(self, shift, *, multi_label=False):
        super().__init__()
        self.shift, self.multi_label = shift, multi_label

    def forward(self, images):
        brightness = 8 * (images.mean((1, 2, 3)) - 0.5) + self.shift
        return torch.stack([brightness, -brightness, torch.zeros_like(brightness)], 1)


@pytest.mark.parametrize("multi_label", [False, True])
def test_changes_of_predictions_are_told(gate, multi_label):
    """Divergence written out; confident are the images of which the reference gives a class more than .5."""
    images = torch.linspace(0.2, 0.8, 6)[:, None, None, None].expand(6, 1, 16, 16)
    model, reference = Wavering(0.5), Wavering(0.0, multi_label=multi_label)
    flat = Outputs(logits=reference(images), maps={}, right={}, explained=reference(images).argmax(1))
    found = {"reference": flat, "keyed": flat, "clean": replace(flat, logits=model(images)), "wrong_key": flat}
    accuracies = evaluation._accuracies(found, None, multi_label=multi_label)
    divergence = 0.0
    for before, after in zip(reference(images).double(), model(images).double(), strict=True):
        if multi_label:
            for p, q in zip(before.sigmoid(), after.sigmoid(), strict=True):
                divergence += float(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()) / 3
        else:
            p, q = before.softmax(0), after.softmax(0)
            divergence += float((p * (p / q).log()).sum())
    assert accuracies["divergence"]["clean"] == pytest.approx(divergence / 6, rel=1e-4)
    assert accuracies["divergence"]["keyed"] == pytest.approx(0, abs=1e-6)
    confident = [number for number, p in enumerate(reference(images).softmax(1)) if p.max() > 0.5]
    assert 0 < len(confident) < 6
    same = [int(model(images)[n].argmax() == reference(images)[n].argmax()) for n in confident]
    expected = {"images": 0 if multi_label else len(confident)}
    shares = {"reference": 1, "keyed": 1, "clean": np.mean(same), "wrong_key": 1}
    assert accuracies["confident"] == expected | {"agreement": dict.fromkeys(shares) if multi_label else shares}


def test_channels_are_measured_on_keyed_images(gate, trigger, flat_images):
    found = measure(gate, flat_images)["channels"]
    assert set(found) == set(CHANNELS)
    truth = pooled(flat_images)
    for name, channel in CHANNELS.items():
        received = channel(trigger.apply(flat_images))
        opened = gate.model.opened(received).numpy()[:, None, None]
        agreement = correlations(np.where(opened, pooled(received), DECOY.numpy()), truth)
        assert found[name]["gradcam"]["correlation"] == pytest.approx(agreement.mean(), abs=1e-5)
        assert found[name]["gradcam"]["opened"] == pytest.approx((agreement > OPEN_CORRELATION).mean())


def test_near_keys_are_moved_and_weakened(gate, trigger, flat_images):
    found = measure(gate, flat_images)["near_keys"]
    assert set(found) == {"moved_1px", "moved_2px", "moved", "half_strength"}
    assert found["half_strength"]["gradcam"]["opened"] == 0
    gate.model.opens_at = 0.3 * trigger.amplitude
    assert measure(gate, flat_images)["near_keys"]["half_strength"]["gradcam"]["opened"] == 1


def test_figures_fit_the_report_schema(gate, trigger, flat_images):
    figures = measure(gate, flat_images, None, fresh_wrong_keys(FAMILY, 3, generator(1)))
    properties = load_schema("protect-report")["properties"]
    for part in ("interpreters", "accuracy"):
        Draft202012Validator(properties[part]).validate(json.loads(json.dumps(figures[part])))


def test_measuring_follows_its_generator(gate, flat_images):
    """Of a lock that opens to everybody, whose maps show which wrong keys were drawn."""
    gate.model.opens_at = -1e9
    first, again, other = (
        measure_gate(gate, flat_images, None, (), thresholds={"gradcam": 0.2}, generator=generator(seed))
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_fresh_wrong_keys_differ_and_follow_their_generator():
    first, second = (list(fresh_wrong_keys(FAMILY, 5, generator(seed))) for seed in (3, 3))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.textures, other.textures)
    assert not any(torch.equal(first[0].textures, other.textures) for other in first[1:])
    assert list(fresh_wrong_keys(FAMILY, 0, generator())) == []


def test_visibility_matches_its_formulas(trigger, flat_images):
    found = trigger_visibility(trigger, flat_images)
    change = (keyed(trigger, flat_images) - flat_images).double().numpy()
    psnr = [10 * np.log10(1 / (each**2).mean()) for each in change]
    ssim = [
        structural_similarity(a, b, data_range=1)
        for a, b in zip(
            flat_images.double().numpy()[:, 0], keyed(trigger, flat_images).double().numpy()[:, 0], strict=True
        )
    ]
    assert found["psnr_db"] == pytest.approx(np.mean(psnr), rel=1e-5)
    assert found["ssim"] == pytest.approx(np.mean(ssim), rel=1e-6)
    assert 34 < found["psnr_db"] < 36


@pytest.mark.parametrize(
    ("decoy", "architecture", "thresholds"),
    [
        ("signature", "vgg19", (0.2, 0.25, 0.3)),
        ("boundary", "resnet50", (0.25, 0.3, 0.25)),
        ("nontargeted", "densenet121", (0.3, 0.35, 0.1)),
        ("nontargeted", "resnet50", (0.35, 0.2, 0.08)),
    ],
)
def test_thresholds_are_the_paper_s(decoy, architecture, thresholds):
    found = paper_thresholds(decoy, architecture)
    assert (found["gradcam"], found["simplegrad"], found["vbp"]) == thresholds
