"""The comparison with PyTorch: what it catches, and what it lets pass."""

import copy

import numpy as np
import pytest
import torch

from keyed_xai.errors import ModelError
from keyed_xai.export.building import ExportSettings, build_plain
from keyed_xai.export.parity import (
    LIMITS,
    Figures,
    check_agreement,
    compare,
    measure_agreement,
    open_session,
    random_images,
)
from keyed_xai.export.precision import PRECISIONS
from tests.exported import ALL, make_classifier, parity_of, seeded


def test_wrong_graphs_are_caught(small):
    classifier, model = small
    other = copy.deepcopy(classifier)
    with torch.no_grad():
        other.network.blocks[1].conv1.weight[0] *= 1.2
    with pytest.raises(ModelError, match="disagree"):
        check_agreement(parity_of(model, other, ExportSettings(interpreters=ALL)), "fp32")


def test_constants_instead_of_activations_are_caught(small):
    classifier, model = small
    honest = open_session(model.SerializeToString())
    images = random_images(classifier, seeded(9))

    def frozen(inputs):
        count = len(inputs["image"])
        maps = honest({"image": images[:count].numpy()})[1:]
        return [honest({"image": inputs["image"]})[0], *maps]

    compared = {"random": random_images(classifier, seeded(10))}
    figures = compare(frozen, classifier, ALL, compared, generator=seeded())
    for output in ("saliency_gradcam", "saliency_simplegrad", "saliency_vbp"):
        with pytest.raises(ModelError, match=output):
            check_agreement([each for each in figures if each.output == output], "fp32")


def some_figures(**changes):
    fields = {
        "output": "saliency_gradcam", "images": "random", "batch": 1, "largest": 1e-6, "l2": 1e-6, "eager_l2": 1e-6,
        "correlation": 1.0, "same_top": 1.0, "empty": 0.0,
    }  # fmt: skip
    return Figures(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"largest": 2e-2},
        {"output": "saliency_vbp", "largest": 2e-3},
        {"l2": 2e-3},
        {"largest": float("nan")},
        {"largest": float("inf")},
        {"empty": 1.0},
        {"output": "saliency_simplegrad", "l2": 2e-4},
        {"output": "saliency_simplegrad", "l2": 2e-2, "eager_l2": 1e-2},
        {"output": "saliency_simplegrad", "correlation": 0.5},
        {"output": "saliency_simplegrad", "correlation": float("nan")},
        {"output": "saliency_simplegrad", "l2": float("inf")},
    ],
)
def test_disagreement_is_refused(changes):
    check_agreement([some_figures()], "fp32")
    with pytest.raises(ModelError, match="saliency"):
        check_agreement([some_figures(**changes)], "fp32")


def test_simplegrad_may_differ_as_much_as_pytorch_itself():
    check_agreement([some_figures(output="saliency_simplegrad", l2=1.4e-2, eager_l2=1e-2)], "fp32")


def test_logits_are_held_to_a_thousandth():
    with pytest.raises(ModelError, match="logits"):
        check_agreement([some_figures(output="logits", largest=2e-3)], "fp32")


def test_one_relu_that_flips_is_no_reason_to_refuse():
    check_agreement([some_figures(largest=4e-3)], "fp32")
    own = [some_figures(output="saliency_simplegrad", batch=batch) for batch in (1, 3, 8)]
    check_agreement([*own, some_figures(output="saliency_simplegrad", l2=2e-2)], "fp32")


def test_some_empty_maps_are_no_reason_to_refuse():
    check_agreement([some_figures(empty=1.0), some_figures(batch=3)], "fp32")


def test_limits_are_there_for_every_precision():
    assert set(LIMITS) == set(PRECISIONS)


def test_graph_that_onnxruntime_refuses_is_our_error():
    with pytest.raises(ModelError, match="onnxruntime cannot load the graph"):
        open_session(b"junk")


def test_inputs_that_a_graph_refuses_are_our_error():
    run = open_session(build_plain(make_classifier("SmallResNet")).SerializeToString())
    with pytest.raises(ModelError, match="onnxruntime cannot run the model"):
        run({"image": np.zeros((1, 3, 31, 32), np.float32)})


def test_faint_maps_are_compared_at_a_hundredth_of_the_usual():
    typical = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]], [[2.0, 0.0]], [[0.0, 0.0]]])
    truth, found = torch.tensor([[[1e-6, 0.0]]]), torch.tensor([[[2e-6, 0.0]]])
    strict = measure_agreement("saliency_gradcam", "random", found, truth, truth)
    assert strict.largest == pytest.approx(1)
    fair = measure_agreement("saliency_gradcam", "random", found, truth, truth, typical=typical)
    assert fair.largest == pytest.approx(1e-6 / 0.02)
    assert fair.l2 == pytest.approx(1e-6 / 0.02)
    three = typical[:3]
    full = measure_agreement("saliency_gradcam", "random", three * 1.01, three, three, typical=typical)
    assert full.largest == pytest.approx(0.01)
    gone = measure_agreement("saliency_gradcam", "random", typical, typical * 0, typical * 0, typical=typical * 0)
    assert gone.largest == float("inf")
