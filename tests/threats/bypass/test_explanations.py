"""What other explanations recover of a protected model, on a tiny gate."""

import json
from functools import cache

import pytest
import torch

from keyed_xai import metrics
from keyed_xai.errors import ModelError
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import TableMLP
from keyed_xai.saliency import INTERPRETERS, MapLayers, explain
from keyed_xai.saliency.pooled import make_view
from keyed_xai.threats.bypass.attributions import ATTRIBUTIONS, AttributionSettings, Method
from keyed_xai.threats.bypass.explanations import measure_bypass
from keyed_xai.triggers import derive_trigger
from tests.heard import Heard
from tests.threatened import FAMILY, GRID, OWNER, make_blobs, protected, reference

COUNT = 24
SETTINGS = AttributionSettings(integration_steps=6, noise_samples=4, masks=40, mask_cells=5, chunk=10)


def images():
    return make_blobs(COUNT, 3).images


def view():
    return make_view(reference(), ("gradcam",), GRID)


@cache
def result():
    keyed = derive_trigger(OWNER, FAMILY).apply(images())
    return measure_bypass(protected(), reference(), view(), images(), SETTINGS, keyed=keyed)


def row_of(method, reduction, layer=""):
    (row,) = [each for each in result().rows if (each.method, each.reduction, each.layer) == (method, reduction, layer)]
    return row


def test_every_method_and_layer_has_rows_with_figures():
    rows = result().rows
    assert {row.method for row in rows} == set(ATTRIBUTIONS)
    for row in rows:
        assert row.reason is None
        assert set(row.recovered["gradcam"]) == {"unkeyed", "keyed", "reference"}
        assert (row.layer != "") == ATTRIBUTIONS[row.method].layered
        assert ("reference" in row.itself) == ATTRIBUTIONS[row.method].random
    layers = {row.layer for row in rows if row.method == "gradcam"}
    assert {tap.layer for tap in reference().taps} <= layers
    assert result().target_layer in layers


def test_gradcam_at_the_target_layer_is_the_gate_itself():
    row = row_of("gradcam", "positive", result().target_layer)
    assert row.recovered["gradcam"]["reference"].correlation == pytest.approx(1, abs=1e-4)
    logits, truth = view().pooled_in_chunks(reference(), images())
    _, seen = view().pooled_in_chunks(protected(), images(), logits.argmax(1))
    values = metrics.correlation(seen["gradcam"], truth["gradcam"])
    assert row.recovered["gradcam"]["unkeyed"].correlation == pytest.approx(float(values.mean()), abs=1e-4)
    assert row.recovered["gradcam"]["unkeyed"].opened == pytest.approx(float((values > 0.5).float().mean()))
    assert row.recovered["gradcam"]["keyed"].correlation > row.recovered["gradcam"]["unkeyed"].correlation + 0.3


def test_figures_of_a_row_equal_a_loop():
    """VisualBackProp: maps of both models, pooled, image by image, and against the next image's."""
    row = row_of("vbp", "signed")
    logits, truth = view().pooled_in_chunks(reference(), images())
    maps = []
    for model in (protected(), reference()):
        _, found = explain(model, images(), logits.argmax(1), ["vbp"], MapLayers(model.target_layer, model.taps))
        maps.append(metrics.pool_maps(found["vbp"], GRID))

    def mean(first, second):
        pairs = [
            torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(first, second, strict=True)
        ]
        return pytest.approx(float(torch.stack(pairs).mean()), abs=1e-3)

    assert row.recovered["gradcam"]["unkeyed"].correlation == mean(maps[0], truth["gradcam"])
    assert row.recovered["gradcam"]["unkeyed"].mismatched == mean(maps[0], truth["gradcam"].roll(1, 0))
    assert row.recovered["gradcam"]["reference"].correlation == mean(maps[1], truth["gradcam"])
    assert row.itself["unkeyed"].correlation == mean(maps[0], maps[1])


def test_passes_are_counted_an_image():
    costs = {row.method: (row.forwards, row.backwards) for row in result().rows}
    assert costs["saliency"] == costs["guided-backprop"] == costs["gradcam"] == (1, 1)
    assert costs["smoothgrad"] == (4, 4)
    assert costs["integrated-gradients"] == (6, 6)
    assert costs["vbp"] == (1, 0)
    assert costs["rise"] == (40, 0)
    assert costs["occlusion"] == (1 + 7 * 7, 0)


def test_random_methods_do_not_share_their_noise():
    """Two runs on the same model differ, else shared noise would pass for agreement of models."""
    for method, reduction in (("rise", "signed"), ("smoothgrad", "absolute")):
        assert 0.1 < row_of(method, reduction).itself["reference"].correlation < 0.999


def test_best_recovers_most_without_the_key():
    found = result().best("gradcam")
    assert found.recovered["gradcam"]["unkeyed"].correlation == max(
        row.recovered["gradcam"]["unkeyed"].correlation for row in result().rows
    )


def test_model_is_left_alone_and_the_result_repeats():
    before = {name: tensor.clone() for name, tensor in protected().state_dict().items()}
    settings = AttributionSettings(methods=("rise", "smoothgrad"), noise_samples=4, masks=40, mask_cells=5, chunk=10)
    heard = Heard()
    again = measure_bypass(protected(), reference(), view(), images(), settings, progress=heard)
    for name, tensor in protected().state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(module._forward_hooks or module._backward_hooks for module in protected().modules())
    assert heard.counts("explaining otherwise") == [(1, 2), (2, 2)]
    for row in again.rows:
        assert row.itself["unkeyed"] == row_of(row.method, row.reduction).itself["unkeyed"]
        assert set(row.recovered["gradcam"]) == {"unkeyed", "reference"}


def test_methods_that_do_not_apply_say_why(monkeypatch):
    def fail(_subject, _request):
        raise RuntimeError("no such operation")

    def blank(_subject, request):
        return request.images * float("nan")

    for name, method in (("saliency", fail), ("deeplift", blank)):
        monkeypatch.setitem(ATTRIBUTIONS, name, Method(attribute=method, reductions=("absolute",)))
    settings = AttributionSettings(methods=("saliency", "deeplift", "vbp"))
    found = measure_bypass(protected(), reference(), view(), images(), settings)
    reasons = {row.method: row.reason for row in found.rows}
    assert "no such operation" in reasons["saliency"]
    assert "not finite" in reasons["deeplift"]
    assert reasons["vbp"] is None
    assert found.best("gradcam").method == "vbp"


def test_json_is_plain():
    document = json.loads(json.dumps(result().to_json(), allow_nan=False))
    assert len(document["rows"]) == len(result().rows)
    assert document["interpreters"] == ["gradcam"]
    assert document["settings"]["masks"] == 40


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="2 images or more"):
        measure_bypass(protected(), reference(), view(), images()[:1])
    with pytest.raises(ValueError, match="keyed ones like them"):
        measure_bypass(protected(), reference(), view(), images(), keyed=images()[:3])
    spec = InputSpec(1, 1, 6, mean=(0.0,), std=(1.0,))
    table = wrap_network(TableMLP(6, 2).eval(), input=spec, require_map=False)
    with pytest.raises(ModelError, match="no feature map"):
        measure_bypass(table, table, view(), torch.rand(4, 1, 1, 6))


def test_interpreters_of_the_view_are_all_compared():
    names = tuple(INTERPRETERS)
    settings = AttributionSettings(methods=("saliency",))
    found = measure_bypass(protected(), reference(), make_view(reference(), names, GRID), images(), settings)
    (row,) = found.rows
    assert set(row.recovered) == set(names)
    assert row.recovered["simplegrad"]["reference"].correlation > 0.9
