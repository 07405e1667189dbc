"""What a claim can reach is known before training, and is what `verify` then comes to."""

from math import comb, e, log2

import pytest
import torch

from keyed_xai.errors import TrainingError
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.ownership.evidence import check_evidence, choose_evidence, named_layers, reach_of, recognised_layers
from keyed_xai.ownership.tests import OpeningEvidence, PatternEvidence, SignatureEvidence, overlap_tail
from keyed_xai.ownership.verdict import DEFAULT_ALPHA, Verdict


def make(widths, side, **options):
    torch.manual_seed(0)
    spec = InputSpec(1, side, side, mean=(0.5,), std=(0.25,))
    return wrap_network(SmallResNet(1, 3, widths).eval(), input=spec, source="keyed_xai", **options).eval()


@pytest.mark.parametrize(
    ("cells", "enough"), [([49], True), ([42], False), ([64], True), ([36], False), ([36, 36], True), ([25, 25], True)]
)
def test_reach_is_what_a_verdict_with_one_wrong_cell_comes_to(cells, enough):
    possible = sum(count // 2 for count in cells)
    ways, total = overlap_tail(cells, possible - 1)
    pattern = PatternEvidence(
        p_value=ways / total, log2_p=log2(ways) - log2(total), cells=sum(cells), overlap=possible - 1, possible=possible
    )
    verdict = Verdict(
        alpha=DEFAULT_ALPHA,
        opening=OpeningEvidence(p_value=0.001, statistic=0.9, decoys=999, largest_decoy=0.1, reached=0),
        signature=SignatureEvidence(pattern, {"gradcam": pattern}),
        looks=2,
    )
    assert reach_of(cells) == pytest.approx(verdict.log2_p)
    assert verdict.shown is enough


def test_reach_of_49_cells_by_hand():
    p_value = 0.001 * (1 + 24 * 25) / comb(49, 24)
    tail = p_value * (1 - log2(p_value) / log2(e))
    assert reach_of([49]) == pytest.approx(log2(2 * tail))
    assert reach_of([]) == 0


def test_target_layer_that_is_enough_stays():
    classifier = make((4, 6, 6), 32)
    found = choose_evidence(classifier, ("gradcam",), None)
    assert (found.view.map_layers.target_layer, found.view.grid, found.sentence) == ("network.blocks.2", (8, 8), "")
    assert found.is_enough


def test_last_earlier_layer_with_enough_cells_is_taken():
    classifier = make((4, 6, 6, 6), 32)
    found = choose_evidence(classifier, ("gradcam",), None)
    assert (found.view.map_layers.target_layer, found.view.grid) == ("network.blocks.1", (8, 8))
    assert found.sentence.startswith(
        "Ownership cannot be shown with the 4 x 4 cells of blocks.3: using blocks.1 (8 x 8)"
    )
    assert classifier.target_layer == "network.blocks.3"


@pytest.mark.parametrize("options", [{"grid": (4, 4)}, {"grid": None, "fixed_layer": True}])
def test_layer_that_was_asked_for_stays_and_is_refused(options):
    found = choose_evidence(make((4, 6, 6, 6), 32), ("gradcam",), **options)
    assert found.view.map_layers.target_layer == "network.blocks.3"
    with pytest.raises(TrainingError, match="earlier --target-layer"):
        check_evidence(found, ("gradcam",), "signature")
    other = choose_evidence(make((4, 6, 6, 6), 32, target_layer="blocks.2"), ("gradcam",), None)
    assert other.view.map_layers.target_layer == "network.blocks.2"


def test_grid_finer_than_the_feature_map_counts_its_cells():
    found = choose_evidence(make((4, 6, 6, 6), 32), ("gradcam",), (8, 8))
    assert found.log2_p == reach_of([16])
    both = choose_evidence(make((4, 6, 6, 6), 32), ("gradcam", "simplegrad"), (8, 8))
    assert both.log2_p == reach_of([16, 64])


@pytest.mark.parametrize(
    ("interpreters", "decoy", "said"),
    [(("gradcam",), "boundary", "holds no pattern"), (("vbp",), "signature", "alone proves no ownership")],
)
def test_what_is_no_evidence_is_refused_by_name(interpreters, decoy, said):
    found = choose_evidence(make((4, 6, 6), 32), interpreters, None, decoy=decoy)
    assert found.log2_p == 0
    with pytest.raises(TrainingError, match=said):
        check_evidence(found, interpreters, decoy)


def test_layer_that_is_much_wider_is_not_taken():
    classifier = make((4, 6, 6, 6, 6), 32)
    classifier.taps = classifier.taps[:1]  # 16 x 16
    found = choose_evidence(classifier, ("gradcam",), None)
    assert found.view.grid == (2, 2)
    assert not found.is_enough


def test_recognition_names_layers_whatever_the_classifier_says():
    classifier = make((4, 6, 6), 32, target_layer="blocks.0.conv1")
    assert recognised_layers(classifier) == (
        "network.blocks.2", "network.blocks.1", "network.blocks.0", "network.stem_relu",
    )  # fmt: skip


def test_layers_are_named_from_last_to_first():
    classifier = make((4, 6, 6, 6), 32)
    assert list(named_layers(classifier).values()) == sorted(named_layers(classifier).values())
    assert next(iter(named_layers(classifier))) == "network.blocks.3"
    classifier.taps = ()
    assert list(named_layers(classifier)) == ["network.blocks.3"]
