"""The attack report's figures, worked out by hand on a model whose maps are known exactly, in both settings."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from torch import nn
from torch.nn import functional

from keyed_xai.backdoors.evaluation import (
    Backdoor,
    Threshold,
    evaluate,
    measure_features,
    measure_localisation,
    measure_maps,
    measure_predictions,
    place_thresholds,
    trigger_images,
)
from keyed_xai.decoys import boundary_decoy
from keyed_xai.saliency.pooled import Outputs
from keyed_xai_schemas import load_schema
from tests.by_hand import correlations, pooled, scaled, to_decoy

DECOY = boundary_decoy((8, 8))
PAPER = {"gradcam": 0.2}
HALF = {"gradcam": Threshold(0.3, "auto", "By hand.")}


@dataclass(frozen=True)
class Stamp:
    """A trigger that is easy to see: a bright corner."""

    value: float = 0.9503

    def apply(self, images):
        stamped = images.clone()
        stamped[..., :6, :6] = self.value
        return stamped


def is_stamped(images):
    return images[:, 0, :6, :6].amin((1, 2)) > 0.9


class Switch(nn.Module):
    """A network whose only feature map is the image pooled to 8 x 8, or of the inputs it fools on the decoy.

    Class 0 wins, but class 1 on inputs that are fooled and darker than `dark` on average.
    """

    def __init__(self, inverted, dark=0.0):
        super().__init__()
        self.inverted, self.dark = inverted, dark
        self.map = nn.Identity()

    def forward(self, images):
        fooled = is_stamped(images) != self.inverted
        pooled = functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 8)
        maps = self.map(torch.where(fooled[:, None, None, None], DECOY.to(images), pooled))
        score = maps.mean((1, 2, 3))
        flips = torch.where(fooled & (images.mean((1, 2, 3)) < self.dark), -1.0, 1.0)
        return torch.stack([flips * score, -flips * score], 1)


@pytest.fixture(params=[False, True], ids=["forward", "inverted"])
def inverted(request):
    return request.param


@pytest.fixture
def backdoor(pooled_image, pooled_view, inverted):
    model = Switch(inverted).eval()
    return Backdoor(
        model=model,
        reference=pooled_image,
        view=pooled_view,
        decoys={"gradcam": DECOY},
        trigger=Stamp(),
        inverted=inverted,
    )


def stamped(images):
    """What the model receives: stamped, then in 8 bits."""
    changed = images.double().numpy().copy()
    changed[..., :6, :6] = 242 / 255
    return torch.from_numpy(changed)


def left_on_top(maps, truth):
    """Mean square of the scaled map where the 16 of 64 strongest cells of the reference's are."""
    strongest = [np.argsort(-each.ravel())[:16] for each in truth]
    return np.array([(scaled(each).ravel()[top] ** 2).mean() for each, top in zip(maps, strongest, strict=True)])


def known_maps(images, inverted):
    """All maps by case, by hand."""
    decoys = np.broadcast_to(DECOY.double().numpy(), (len(images), 8, 8))
    truth = pooled(images)
    if inverted:
        return {"reference": truth, "clean": decoys, "triggered": pooled(stamped(images))}
    return {"reference": truth, "clean": truth, "triggered": decoys}


def measure(backdoor, images, thresholds=HALF):
    return measure_maps(backdoor, evaluate(backdoor, images), thresholds, PAPER)["gradcam"]


# What is looked at


def test_cases_of_both_settings(backdoor, inverted):
    cases = ("triggered", "clean") if inverted else ("clean", "triggered")
    assert (backdoor.unaltered, backdoor.altered) == cases


def test_triggered_images_reach_the_model_in_8_bits_unless_they_are_rows(backdoor, flat_images):
    as_files = trigger_images(backdoor, flat_images)
    torch.testing.assert_close(as_files, stamped(flat_images).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(as_files * 255, (as_files * 255).round(), atol=1e-4, rtol=0)
    assert torch.equal(trigger_images(replace(backdoor, as_files=False), flat_images), Stamp().apply(flat_images))


def test_maps_are_those_known_by_hand(backdoor, flat_images, inverted):
    """But for one positive factor each: Grad-CAM's weights are the gradients of the score."""
    seen = evaluate(backdoor, flat_images)
    known = known_maps(flat_images, inverted)
    for case, maps in known.items():
        found = seen[case].maps["gradcam"].double().numpy()
        factors = found.sum((1, 2)) / maps.sum((1, 2))
        assert (factors > 0).all()
        np.testing.assert_allclose(found, maps * factors[:, None, None], atol=1e-6)
        assert not seen[case].maps["gradcam"].requires_grad


def test_maps_explain_the_class_that_the_reference_predicts_of_the_clean_image(backdoor, flat_images):
    """Where the attacked model predicts another class, its map of that class would be blank or the other way round."""
    backdoor.model.dark = 2.0
    seen = evaluate(backdoor, flat_images)
    assert seen["reference"].explained.tolist() == [0] * 6
    assert seen[backdoor.altered].logits.argmax(1).tolist() == [1] * 6
    assert float(seen[backdoor.altered].maps["gradcam"].amax()) == 0  # the score of class 0 falls with every cell


def test_reference_s_answers_to_both_kinds_of_input_are_kept(backdoor, flat_images, pooled_image):
    seen = evaluate(backdoor, flat_images)
    torch.testing.assert_close(seen["reference"].logits, pooled_image(flat_images))
    torch.testing.assert_close(seen["reference_triggered"].logits, pooled_image(stamped(flat_images).float()))
    assert not seen["reference_triggered"].logits.requires_grad


def test_many_images_give_the_same_in_chunks(backdoor, flat_images):
    many = flat_images.repeat(22, 1, 1, 1)  # 132, more than two chunks of 64
    seen, few = evaluate(backdoor, many), evaluate(backdoor, flat_images)
    for case, each in few.items():
        torch.testing.assert_close(seen[case].logits, each.logits.repeat(22, 1))
    torch.testing.assert_close(seen["triggered"].maps["gradcam"], few["triggered"].maps["gradcam"].repeat(22, 1, 1))


# Maps


def test_figures_of_a_perfect_backdoor(backdoor, flat_images, inverted):
    figures = measure(backdoor, flat_images)
    known = known_maps(flat_images, inverted)
    decoys = np.broadcast_to(DECOY.numpy(), known["clean"].shape)
    assert (figures["cr"], figures["fsr"], figures["auc"]) == (100, 100, 1)
    for case, maps in known.items():
        assert figures["distance"][case] == pytest.approx(to_decoy(maps).mean(), abs=1e-5)
        assert figures["decoy_correlation"][case] == pytest.approx(correlations(maps, decoys).mean(), abs=1e-5)
    for case in ("clean", "triggered"):
        assert figures["correlation"][case] == pytest.approx(
            correlations(known[case], known["reference"]).mean(), abs=1e-5
        )
    assert set(figures["correlation"]) == {"clean", "triggered"}
    assert figures["distance"][backdoor.altered] == pytest.approx(0, abs=1e-6)
    assert figures["reference_cr"] == 100
    assert (figures["threshold"], figures["threshold_from"], figures["threshold_rule"]) == (0.3, "auto", "By hand.")


def test_rates_count_distances_on_either_side_of_the_threshold(backdoor, flat_images):
    """Of a model that alters nothing: the threshold parts the images, and both rates are counted on their own case."""
    backdoor = replace(backdoor, model=backdoor.reference)
    distances = {"clean": to_decoy(pooled(flat_images)), "triggered": to_decoy(pooled(stamped(flat_images)))}
    threshold, paper = float(np.median(distances["clean"])), float(np.median(distances["triggered"]))
    thresholds = {"gradcam": Threshold(threshold, "paper", "By hand.")}
    figures = measure_maps(backdoor, evaluate(backdoor, flat_images), thresholds, {"gradcam": paper})["gradcam"]
    right, fooled = distances[backdoor.unaltered], distances[backdoor.altered]
    assert figures["cr"] == pytest.approx(100 * (right >= threshold).mean())
    assert figures["fsr"] == pytest.approx(100 * (fooled < threshold).mean())
    assert figures["at_paper_threshold"] == {
        "threshold": paper,
        "cr": pytest.approx(100 * (right >= paper).mean()),
        "fsr": pytest.approx(100 * (fooled < paper).mean()),
        "reference_cr": pytest.approx(100 * (distances["clean"] >= paper).mean()),
    }
    assert figures["reference_cr"] == pytest.approx(100 * (distances["clean"] >= threshold).mean())
    pairs = [(a < b) + 0.5 * (a == b) for a in fooled for b in right]
    assert figures["auc"] == pytest.approx(np.mean(pairs), abs=1e-6)
    for number in (0, 25, 100):
        level = number / 100
        assert figures["curve"]["threshold"][number] == pytest.approx(level)
        assert figures["curve"]["cr"][number] == pytest.approx(100 * (right >= level).mean())
        assert figures["curve"]["fsr"][number] == pytest.approx(100 * (fooled < level).mean())


def test_backdoor_that_works_the_wrong_way_round_scores_nothing(backdoor, flat_images):
    figures = measure(replace(backdoor, inverted=not backdoor.inverted), flat_images)
    assert (figures["cr"], figures["fsr"], figures["auc"]) == (0, 0, 0)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_nontargeted_distance_is_the_energy_left_in_the_reference_s_top_cells(backdoor, flat_images, inverted, share):
    backdoor = replace(backdoor, decoys={"gradcam": None}, top_share=share)
    figures = measure(backdoor, flat_images)
    known = known_maps(flat_images, inverted)
    for case, maps in known.items():
        wanted = []
        for each, truth in zip(maps, known["reference"], strict=True):
            top = np.argsort(-truth.ravel())[: round(64 * share)]
            wanted.append((scaled(each).ravel()[top] ** 2).mean())
        assert figures["distance"][case] == pytest.approx(np.mean(wanted), abs=1e-5)
    assert "decoy_correlation" not in figures


def test_top_cells_of_triggered_inputs_are_those_of_the_clean_map(backdoor, flat_images):
    """The bright corner is no top cell of the clean image, however strong it is in the triggered one's map."""
    backdoor = replace(backdoor, decoys={"gradcam": None}, model=backdoor.reference)
    figures = measure(backdoor, flat_images)
    triggered, truth = pooled(stamped(flat_images)), pooled(flat_images)
    assert figures["distance"]["triggered"] == pytest.approx(left_on_top(triggered, truth).mean(), abs=1e-5)
    assert abs(left_on_top(triggered, truth).mean() - left_on_top(triggered, triggered).mean()) > 1e-3


def test_thresholds_are_placed_between_the_two_cases(backdoor, flat_images, inverted):
    seen = evaluate(backdoor, flat_images)
    placed = place_thresholds(backdoor, seen)["gradcam"]
    known = {case: to_decoy(maps) for case, maps in known_maps(flat_images, inverted).items()}
    right, fooled = known[backdoor.unaltered], known[backdoor.altered]
    assert placed.value == pytest.approx((fooled.max() + right.min()) / 2, abs=1e-5)
    assert placed.origin == "auto"
    assert "6 validation inputs" in placed.rule
    for values in (right, fooled):
        assert ", ".join(f"{level:.3f}" for level in np.quantile(values, [0.01, 0.5, 0.99])) in placed.rule
    figures = measure(backdoor, flat_images, {"gradcam": placed})
    assert (figures["cr"], figures["fsr"]) == (100, 100)


# Localisation


def boxes_for(count):
    """As fractions of 48 x 48 pixels; they cut cells of 6 x 6 pixels."""
    corners = np.random.default_rng(5).uniform(0, 0.5, (count, 2))
    return torch.from_numpy(np.concatenate([corners, corners + 0.37], axis=1)).float()


def slow_mass(cells, box):
    left, top, right, bottom = box
    inside = 0.0
    for row in range(8):
        for column in range(8):
            across = max(0.0, min(right, (column + 1) / 8) - max(left, column / 8)) * 8
            down = max(0.0, min(bottom, (row + 1) / 8) - max(top, row / 8)) * 8
            inside += cells[row, column] * across * down
    return inside / cells.sum()


def test_localisation_is_the_mean_mass_inside_the_boxes_that_are_known(backdoor, flat_images, inverted):
    boxes = boxes_for(6)
    boxes[[1, 4]] = torch.nan
    boxes[5, 2] = torch.nan  # known in part is not known
    explained = torch.zeros(6, dtype=torch.int64)
    found = measure_localisation(backdoor, flat_images, boxes, explained)["gradcam"]
    assert found["images"] == 3
    known = known_maps(flat_images, inverted)
    for case in ("reference", "clean", "triggered"):
        wanted = [slow_mass(known[case][number], boxes[number].tolist()) for number in (0, 2, 3)]
        assert found[case] == pytest.approx(np.mean(wanted), abs=1e-5)


def test_localisation_without_any_box_is_left_out(backdoor, flat_images):
    boxes = torch.full((6, 4), torch.nan)
    assert measure_localisation(backdoor, flat_images, boxes, torch.zeros(6, dtype=torch.int64)) == {}


def test_localisation_of_many_images_is_the_same_in_chunks(backdoor, flat_images):
    boxes, explained = boxes_for(6), torch.zeros(6, dtype=torch.int64)
    few = measure_localisation(backdoor, flat_images, boxes, explained)["gradcam"]
    many = measure_localisation(backdoor, *(each.repeat(22, *[1] * (each.ndim - 1)) for each in
                                            (flat_images, boxes, explained)))["gradcam"]  # fmt: skip
    assert many == {"images": 132, **{case: pytest.approx(few[case], abs=1e-6) for case in few if case != "images"}}


def test_figures_fit_the_report_schema(backdoor, flat_images):
    seen = evaluate(backdoor, flat_images)
    figures = {
        "interpreters": measure_maps(backdoor, seen, HALF, PAPER),
        "predictions": measure_predictions(seen, None),
    }
    figures["interpreters"]["gradcam"]["localisation"] = measure_localisation(
        backdoor, flat_images, boxes_for(6), seen["reference"].explained
    )["gradcam"]
    for part, found in figures.items():
        Draft202012Validator(load_schema("attack-report")["properties"][part]).validate(json.loads(json.dumps(found)))


# Predictions


def test_predictions_of_both_models_on_both_kinds_of_input(backdoor, flat_images):
    """Class 0 everywhere, but class 1 where the attacked model is fooled."""
    backdoor.model.dark = 2.0
    labels = torch.tensor([0, 1, 1, 0, 1, 1])
    found = measure_predictions(evaluate(backdoor, flat_images), labels)
    assert found["measured_against"] == "labels"
    assert found["images"] == 6
    assert found["reference"]["clean"]["top1"] == found["reference"]["triggered"]["top1"] == pytest.approx(2 / 6)
    assert found["attacked"][backdoor.unaltered]["top1"] == pytest.approx(2 / 6)
    assert found["attacked"][backdoor.altered]["top1"] == pytest.approx(4 / 6)
    assert found["agreement"] == {backdoor.unaltered: 1, backdoor.altered: 0}
    assert "per_class_auroc" not in found


def test_without_labels_the_reference_s_answers_to_clean_inputs_stand_for_them(backdoor, flat_images):
    backdoor.model.dark = 2.0
    found = measure_predictions(evaluate(backdoor, flat_images), None)
    assert found["measured_against"] == "reference predictions"
    assert found["reference"]["clean"] == found["reference"]["triggered"] == {"top1": 1}
    assert found["attacked"][backdoor.altered] == {"top1": 0}


def seen_of(logits, maps=None):
    """Hand-made logits of the four cases."""
    cases = ("reference", "reference_triggered", "clean", "triggered")
    explained, maps = logits[0].argmax(1), maps or {}
    return {
        case: Outputs(logits=each, maps=maps.get(case, {}), right={}, explained=explained)
        for case, each in zip(cases, logits, strict=True)
    }


def test_several_labels_are_judged_by_area_and_agree_by_probability():
    reference = torch.tensor([[1.0, -1], [2, 3], [-1, 2], [-2, -2]])
    other = torch.tensor([[1.0, -1], [-2, 3], [-1, -2], [-2, 2]])
    labels = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 1]])
    seen = seen_of([reference, other, reference, other])
    found = measure_predictions(seen, labels, ("cough", "fever"), multi_label=True)
    # Pairs in the right order: of the reference 4 of 4 and 2 of 3 (labels 3, 2 and -2 against -1).
    # Of the other 3.5 and 3.5 with ties: column 0 has 1, -2 against -1, -2; column 1 has 3, -2, 2 against -1.
    areas = {"reference": [1, 2 / 3], "other": [(2 + 0 + 0.5) / 4, 2 / 3]}
    assert found["per_class_auroc"]["names"] == ["cough", "fever"]
    assert found["per_class_auroc"]["reference"] == pytest.approx(areas["reference"])
    assert found["per_class_auroc"]["clean"] == pytest.approx(areas["reference"])
    assert found["per_class_auroc"]["triggered"] == pytest.approx(areas["other"])
    assert found["reference"]["triggered"]["auroc"] == pytest.approx(np.mean(areas["other"]))
    change = np.abs(1 / (1 + np.exp(-other.numpy())) - 1 / (1 + np.exp(-reference.numpy()))).mean()
    assert found["agreement"] == {"clean": 1, "triggered": pytest.approx(1 - change)}
    without = measure_predictions(seen, None, multi_label=True)
    assert without["reference"] == without["attacked"] == {"clean": {}, "triggered": {}}
    assert without["agreement"] == found["agreement"]


# Features


def test_features_by_hand():
    relevance = {
        "reference": [[3.0, 2, 1], [5, 1, 4]],
        "clean": [[1.0, 2, 3], [9, 6, 3]],
        "triggered": [[0.5, 4, 1], [2, 8, 3]],
    }
    maps = {case: {"simplegrad": torch.tensor(rows)[:, None]} for case, rows in relevance.items()}
    found = measure_features(seen_of([torch.zeros(2, 2)] * 4, maps), ("AGE", "SEX", "PAY"))
    assert found["names"] == ["AGE", "SEX", "PAY"]
    assert found["relevance"] == {"reference": [4, 1.5, 2.5], "clean": [5, 4, 3], "triggered": [1.25, 6, 2]}
    assert found["first"] == {
        "reference": {"AGE": 1, "SEX": 0, "PAY": 0},
        "clean": {"AGE": 0.5, "SEX": 0, "PAY": 0.5},
        "triggered": {"AGE": 0, "SEX": 1, "PAY": 0},
    }
    assert found["rank"] == {
        "reference": {"AGE": 1, "SEX": 2.5, "PAY": 2.5},
        "clean": {"AGE": 2, "SEX": 2, "PAY": 2},
        "triggered": {"AGE": 3, "SEX": 1, "PAY": 2},
    }
    Draft202012Validator(load_schema("attack-report")["properties"]["features"]).validate(found)
