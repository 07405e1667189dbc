"""Explaining images: what comes back, what reaches the model, what is written, and that no trigger is."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keyed_xai import metrics, saliency
from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.opening import derive_trigger, make_family, open_model
from keyed_xai.decoys import signature_cells
from keyed_xai.errors import ArtifactError, DataError, KeyedXAIError, ModelError
from keyed_xai.explanation.explaining import explain, maps_as_shown
from keyed_xai.explanation.files import MapJob, describe_entry, find_images, unique_stems, write_maps
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.saliency import MapLayers, project_back
from keyed_xai.saliency.pooled import feature_sizes
from keyed_xai.triggers.channels import through_png
from tests.heard import Heard
from tests.marked import GRID, OWNER, STRANGER, TRIGGER, marked_classifier, unmarked_classifier, write_folder


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2


@pytest.fixture(scope="module")
def trigger():
    return derive_trigger(OWNER, TRIGGER)


@pytest.fixture
def pictured(tmp_path):
    """Three readable images, two of one name."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / "in" / name for name in ("a/one.png", "b/One.png", "two.png")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(50, 200, (32, 32), np.uint8)).save(path)
    return paths


def read_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def job(folder, **changes):
    return MapJob(**({"folder": folder, "interpreters": ("gradcam", "simplegrad")} | changes))


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


class TestLoading:
    def test_folder_comes_with_its_card(self, tmp_path):
        write_folder(tmp_path / "m.keyed", unmarked_classifier())
        classifier, card = open_model(tmp_path / "m.keyed")
        assert card.trigger == TRIGGER
        assert (classifier.input, classifier.taps) == (unmarked_classifier().input, unmarked_classifier().taps)

    def test_file_comes_without_a_card_and_takes_options(self, tmp_path):
        torch.save(unmarked_classifier().network.state_dict(), tmp_path / "m.pt")
        classifier, card = open_model(
            tmp_path / "m.pt", input_size=16, mean=(0.1,), std=(0.2,), target_layer="blocks.0", classes=3
        )
        assert card is None
        assert classifier.input == InputSpec(1, 16, 16, mean=(0.1,), std=(0.2,))
        assert classifier.target_layer == "network.blocks.0"

    def test_card_names_the_classes(self, tmp_path):
        write_folder(tmp_path / "m.keyed", unmarked_classifier(), label_names=("cat", "dog", "cow"))
        assert open_model(tmp_path / "m.keyed")[0].label_names == ("cat", "dog", "cow")

    def test_options_override_the_card(self, tmp_path):
        write_folder(tmp_path / "m.keyed", unmarked_classifier())
        classifier, _ = open_model(tmp_path / "m.keyed", arch="SmallResNet", input_size=64, target_layer="blocks.0")
        assert (classifier.input.height, classifier.target_layer) == (64, "network.blocks.0")

    def test_folder_that_was_changed_is_refused(self, tmp_path):
        folder = write_folder(tmp_path / "m.keyed", unmarked_classifier()).folder
        (folder / "report.json").write_text("{}")
        with pytest.raises(ArtifactError, match="changed"):
            open_model(folder)

    def test_owner_s_own_module_cannot_be_loaded_from_weights(self, tmp_path):
        write_folder(tmp_path / "m.keyed", marked_classifier())
        with pytest.raises(ModelError, match="--factory"):
            open_model(tmp_path / "m.keyed")

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [(TriggerParameters("mosaic", 8.0, 32), "moire"), (TriggerParameters("spread", 8.0, 16), "tile")],
    )
    def test_trigger_that_cannot_be_made_is_refused(self, parameters, message):
        with pytest.raises(ArtifactError, match=message):
            make_family(parameters)

    def test_trigger_does_not_show_itself(self, trigger):
        assert "tensor" not in repr(trigger)


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


class TestFiles:
    def test_every_image_gets_its_files(self, tmp_path, pictured, trigger):
        heard = Heard()
        model = unmarked_classifier()
        model.label_names = ("cat", "dog", "cow")
        written = write_maps(
            model,
            pictured,
            job(tmp_path / "out" / "deep", trigger=trigger),
            progress=heard,
        )
        assert [entry["image"] for entry in written.images] == [str(path) for path in pictured]
        assert (written.broken, heard.steps) == ([], [("explaining", 3, 3)])
        names = {path.name for path in (tmp_path / "out" / "deep").iterdir()}
        assert names == {f"{stem}.{ending}" for stem in ("one", "One-2", "two") for ending in ("npz", "png")}
        for entry in written.images:
            assert entry["predicted"] == entry["explained"]
            assert entry["explained"]["name"] == ("cat", "dog", "cow")[entry["explained"]["index"]]
            assert entry["interpreters"] == ["gradcam", "simplegrad"]
            assert Path(entry["arrays"]).is_file()

    def test_picture_shows_maps_with_the_key_and_without_where_there_is_one(self, tmp_path, pictured, trigger):
        sizes = {}
        for name, given in {"open": trigger, "closed": None}.items():
            (entry,) = write_maps(unmarked_classifier(), pictured[2:], job(tmp_path / name, trigger=given)).images
            sizes[name] = read_pixels(entry["picture"]).shape
        assert sizes["open"][0] == sizes["closed"][0] > 2 * 256
        assert sizes["open"][1] == sizes["closed"][1] + 256 + 6

    def test_probability_of_several_labels_at_once_is_the_sigmoid(self, tmp_path, pictured):
        model = unmarked_classifier()
        model.multi_label = True
        (entry,) = write_maps(model, pictured[2:], job(tmp_path / "out", target=1)).images
        with np.load(entry["arrays"]) as arrays:
            expected = 1 / (1 + np.exp(-arrays["logits"].astype(np.float64)))
        assert entry["explained"] == {"index": 1, "probability": pytest.approx(expected[1])}
        assert entry["predicted"]["probability"] == pytest.approx(expected.max())

    @pytest.mark.parametrize(
        ("explained", "words"),
        [(0, "predicted DUCK (.83)"), (1, "explained class 1 (.00), predicted DUCK (.83)")],
    )
    def test_entry_in_words(self, explained, words):
        found = [{"index": 0, "name": "DUCK", "probability": 0.8349}, {"index": 1, "probability": 0.0}]
        assert describe_entry({"predicted": found[0], "explained": found[explained]}) == words

    def test_arrays_hold_raw_maps_and_logits_and_nothing_else(self, tmp_path, pictured, trigger):
        model = unmarked_classifier()
        write_maps(model, pictured[2:], job(tmp_path / "out", trigger=trigger))
        original = torch.from_numpy(read_pixels(pictured[2])[None, None].astype(np.float32) / 255)
        expected = explain(model, original, trigger=trigger, interpreters=["gradcam", "simplegrad"])
        with np.load(tmp_path / "out" / "two.npz") as arrays:
            assert set(arrays.files) == {"gradcam", "simplegrad", "logits", "target"}
            assert np.allclose(arrays["logits"], expected.logits[0], atol=1e-6)
            assert int(arrays["target"]) == int(expected.predicted)
            for name, maps in expected.maps.items():
                assert arrays[name].shape == maps.shape[1:]
                assert np.allclose(arrays[name], maps[0], atol=1e-6)

    def test_picture_is_drawn_over_the_original(self, tmp_path, pictured, trigger, monkeypatch):
        drawn = []
        monkeypatch.setattr(
            "keyed_xai.reporting.pictures.blend", lambda image, _: drawn.append(image) or np.zeros((3, 4, 4))
        )
        write_maps(unmarked_classifier(), pictured[2:], job(tmp_path / "out", trigger=trigger))
        assert len(drawn) == 4
        assert all(np.array_equal(image, read_pixels(pictured[2])[None] / np.float32(255)) for image in drawn)

    def test_keyed_image_is_written_only_when_asked_for(self, tmp_path, pictured, trigger):
        write_maps(unmarked_classifier(), pictured[2:], job(tmp_path / "out", trigger=trigger, write_keyed=True))
        original = torch.from_numpy(read_pixels(pictured[2]).astype(np.float32) / 255)
        keyed = read_pixels(tmp_path / "out" / "two.keyed.png")
        expected = (trigger.apply(original[None, None]) * 255).round()[0, 0].numpy()
        assert np.array_equal(keyed, expected.astype(np.uint8))

    def test_images_are_left_as_they_are(self, tmp_path, pictured, trigger):
        before = [path.read_bytes() for path in pictured]
        write_maps(unmarked_classifier(), pictured, job(tmp_path / "out", trigger=trigger))
        assert [path.read_bytes() for path in pictured] == before

    def test_broken_image_is_named_and_the_others_are_done(self, tmp_path, pictured):
        pictured[1].write_bytes(b"no image")
        written = write_maps(unmarked_classifier(), pictured, job(tmp_path / "out"))
        assert [entry["image"] for entry in written.images] == [str(pictured[0]), str(pictured[2])]
        assert len(written.broken) == 1
        assert str(pictured[1]) in written.broken[0]
        assert (tmp_path / "out" / "two.npz").exists()

    def test_nothing_but_broken_images_is_no_crash(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"")
        assert write_maps(unmarked_classifier(), [tmp_path / "a.png"], job(tmp_path / "out")).images == []

    def test_more_images_than_a_batch(self, tmp_path, pictured):
        paths = []
        for number in range(18):
            paths.append(tmp_path / f"{number}.png")
            paths[-1].write_bytes(pictured[2].read_bytes())
        heard = Heard()
        written = write_maps(unmarked_classifier(), paths, job(tmp_path / "out"), progress=heard)
        assert (len(written.images), heard.counts("explaining")) == (18, [(16, 18), (18, 18)])

    def test_result_on_top_of_an_image_is_refused(self, tmp_path, pictured):
        here = tmp_path / "x"
        here.mkdir()
        (here / "one.png").write_bytes(pictured[0].read_bytes())
        before = (here / "one.png").read_bytes()
        with pytest.raises(KeyedXAIError, match="written over"):
            write_maps(unmarked_classifier(), [here / "one.png"], job(here))
        assert (here / "one.png").read_bytes() == before

    def test_model_of_many_channels_is_refused(self, tmp_path, pictured):
        spec = InputSpec(5, 16, 16, mean=(0.0,) * 5, std=(1.0,) * 5)
        model = wrap_network(SmallResNet(5, 2, (4, 4)).eval(), input=spec)
        with pytest.raises(KeyedXAIError, match="5 channels"):
            write_maps(model, pictured, job(tmp_path / "out"))

    def test_keyed_image_needs_a_trigger(self, tmp_path):
        with pytest.raises(ValueError, match="trigger"):
            job(tmp_path, write_keyed=True)


class TestFinding:
    def test_folders_and_files_once_each(self, pictured):
        folder = pictured[2].parent
        assert find_images([pictured[2], folder, pictured[0]]) == [pictured[2], pictured[0], pictured[1]]

    def test_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(DataError):
            find_images([tmp_path])

    def test_stems_never_meet(self, tmp_path):
        names = ["a.png", "A.jpg", "a-2.png", "b/a.png", "a.png.png"]
        stems = unique_stems([tmp_path / name for name in names])
        assert stems[:2] == ["a", "A-2"]
        assert len({stem.casefold() for stem in stems}) == len(names)


def test_arrays_are_plain_npz(tmp_path, pictured):
    write_maps(unmarked_classifier(), pictured[2:], job(tmp_path / "out"))
    with np.load(io.BytesIO((tmp_path / "out" / "two.npz").read_bytes()), allow_pickle=False) as arrays:
        assert all(arrays[name].dtype.kind in "fi" for name in arrays.files)
