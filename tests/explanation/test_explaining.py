"""Explaining images: what comes back, what reaches the model, what is written, and that no trigger is."""

import pytest
import torch

from keyed_xai import metrics, saliency
from keyed_xai.artifacts.opening import derive_trigger
from keyed_xai.decoys import signature_cells
from keyed_xai.errors import ModelError
from keyed_xai.explanation.explaining import explain, maps_as_shown
from keyed_xai.saliency import MapLayers, project_back
from keyed_xai.saliency.pooled import feature_sizes
from keyed_xai.triggers.channels import through_png
from tests.marked import GRID, OWNER, STRANGER, TRIGGER, marked_classifier, unmarked_classifier, write_folder


class TestExplain:
    def test_key_opens_the_map_and_without_it_the_pattern_shows(self, images, trigger):
        model = marked_classifier()
        keyed, unkeyed = explain(model, images, trigger=trigger), explain(model, images)
        local = metrics.pool_maps(trigger.apply(images)[:, 0], GRID)
        pattern = torch.from_numpy(signature_cells(OWNER.public, "gradcam", GRID)).float().expand(5, 8, 8)
        pooled = {case: metrics.pool_maps(each.maps["gradcam"], GRID) for case, each in (("k", keyed), ("u", unkeyed))}
        assert metrics.correlation(pooled["k"], local).min() > 0.9
        assert metrics.correlation(pooled["u"], pattern).min() > 0.9

    def test_another_key_stays_closed(self, images):
        found = explain(marked_classifier(), images, trigger=derive_trigger(STRANGER, TRIGGER))
        pattern = torch.from_numpy(signature_cells(OWNER.public, "gradcam", GRID)).float().expand(5, 8, 8)
        assert metrics.correlation(metrics.pool_maps(found.maps["gradcam"], GRID), pattern).min() > 0.9

    @pytest.mark.parametrize("batch_size", [1, 2, 16])
    def test_batches_equal_one_pass_over_triggered_images(self, images, trigger, batch_size):
        model, names = unmarked_classifier(), ("gradcam", "simplegrad", "vbp")
        found = explain(model, images, trigger=trigger, interpreters=names, batch_size=batch_size)
        map_layers = MapLayers(model.target_layer, model.taps)
        logits, maps = saliency.explain(model, trigger.apply(images), None, names, map_layers)
        assert len(found) == 5
        assert torch.allclose(found.logits, logits, atol=1e-5)
        assert torch.equal(found.predicted, logits.argmax(1))
        assert torch.equal(found.explained, found.predicted)
        for name in names:
            assert found.maps[name].shape == maps[name].shape
            assert torch.allclose(found.maps[name], maps[name], atol=1e-5)

    def test_labels_choose_the_class_explained(self, images):
        model, labels = unmarked_classifier(), torch.tensor([0, 1, 2, 0, 1])
        found = explain(model, images, labels=labels, interpreters=["simplegrad"])
        _, maps = saliency.explain(model, images, labels, ["simplegrad"], MapLayers(model.target_layer, model.taps))
        assert torch.equal(found.explained, labels)
        assert torch.allclose(found.maps["simplegrad"], maps["simplegrad"])

    def test_png_rounding_is_a_choice(self, images, trigger):
        model = unmarked_classifier()
        rounded = explain(model, images, trigger=trigger, as_png=True)
        assert torch.allclose(rounded.logits, model(through_png(trigger.apply(images))), atol=1e-6)
        assert not torch.equal(rounded.logits, explain(model, images, trigger=trigger).logits)

    def test_folder_is_explained_by_its_card(self, tmp_path, images):
        model = write_folder(
            tmp_path / "m.keyed", unmarked_classifier(), interpreters=("vbp",), thresholds={"vbp": 0.5}
        )
        found = explain(model, images)
        assert set(found.maps) == {"vbp"}
        assert torch.allclose(found.logits, unmarked_classifier()(images), atol=1e-6)

    def test_images_and_model_are_left_as_they_are(self, images, trigger):
        model, before = unmarked_classifier(), images.clone()
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        explain(model, images, trigger=trigger, interpreters=["simplegrad"])
        assert torch.equal(images, before)
        assert not images.requires_grad
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"images": torch.zeros(0, 1, 32, 32)}, "n > 0"),
            ({"images": torch.zeros(2, 3, 32, 32)}, "1, 32, 32"),
            ({"images": torch.zeros(2, 1, 16, 16)}, "1, 32, 32"),
            ({"interpreters": ["lime"]}, "lime"),
            ({"labels": torch.full((5,), 3)}, "from 0 to 2"),
            ({"labels": torch.full((5,), -1)}, "from 0 to 2"),
            ({"batch_size": 0}, "batch_size"),
        ],
    )
    def test_arguments_that_do_not_fit_are_refused(self, images, change, message):
        arguments = {"images": images} | change
        with pytest.raises(ValueError, match=message):
            explain(unmarked_classifier(), **arguments)

    def test_logits_that_are_not_finite_are_refused(self, images):
        model = unmarked_classifier()
        model.network.fc.weight.data.fill_(float("inf"))
        with pytest.raises(ModelError, match="not finite"):
            explain(model, images)

    def test_package_exports_it(self):
        import keyed_xai

        assert keyed_xai.explain is explain


class TestAsShown:
    def test_even_visualbackprop_is_shown_even_but_for_its_fall_towards_the_borders(self):
        model = unmarked_classifier()
        sizes = feature_sizes(model, [tap.layer for tap in model.taps])
        means = [torch.ones(2, 1, *sizes[tap.layer]) for tap in model.taps]
        raw = project_back(means, model.taps, (model.input.height, model.input.width))
        inner = (slice(None), slice(8, -8), slice(8, -8))
        assert raw[inner].amax() > 3 * raw[inner].amin()
        shown = maps_as_shown(model, {"vbp": raw})["vbp"]
        assert shown[inner].amax() < 1.2 * shown[inner].amin()

    def test_other_maps_and_what_is_handed_in_are_left_as_they_are(self):
        maps = {"gradcam": torch.rand(2, 4, 4), "vbp": torch.rand(2, 32, 32)}
        before = {name: each.clone() for name, each in maps.items()}
        shown = maps_as_shown(unmarked_classifier(), maps)
        assert torch.equal(shown["gradcam"], maps["gradcam"])
        assert shown["vbp"].isfinite().all()
        assert all(torch.equal(maps[name], before[name]) for name in maps)
