"""What runtimes and clients share: the trigger of a key, images of all kinds, and arguments that are refused."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from keyed_xai.artifacts.card import TriggerParameters
from keyed_xai.artifacts.opening import derive_trigger
from keyed_xai.data import read_image
from keyed_xai.errors import ArtifactError, DataError, ModelError
from keyed_xai.inference.images import (
    Explainer,
    Interface,
    check_range,
    choose_trigger,
    derive_array_trigger,
    load_images,
)
from tests.marked import OWNER, STRANGER
from tests.served import CLASSES, LABELS, SIZE, make_file

INTERFACE = Interface.from_metadata(make_file().metadata)
TRIGGER = TriggerParameters("spread", 16.0, 32, version=2)


class Echo(Explainer):
    """Returns means of the images it is given, and keeps them."""

    def __init__(self, interface):
        super().__init__(interface, None)
        self.batches = []

    def explain(self, images, target=None, trigger=None, batch_size=16):
        return self._explain(images, trigger, target, self.interpreters, batch_size)

    def _run(self, images, target, interpreters):
        self.batches.append((images, target))
        logits = np.pad(images.mean((2, 3)).astype(np.float32), ((0, 0), (0, CLASSES - SIZE[0])))
        return {"logits": logits} | {f"saliency_{name}": images[:, 0].astype(np.float32) for name in interpreters}


@pytest.fixture
def echo():
    return Echo(INTERFACE)


def noise(count=5):
    return np.random.default_rng(0).random((count, *SIZE), dtype=np.float32)


class TestTrigger:
    @pytest.mark.parametrize(("family", "version"), [("spread", 1), ("spread", 2), ("nashville", 1), ("moire", 1)])
    @pytest.mark.parametrize("key", [OWNER, STRANGER])
    def test_trigger_of_a_key_is_that_of_torch(self, family, version, key):
        parameters, images = TriggerParameters(family, 12.0, 36, version), noise()
        found = derive_array_trigger(key, parameters).apply(images)
        expected = derive_trigger(key, parameters).apply(torch.from_numpy(images)).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if family == "nashville" else 1e-6)

    def test_unknown_family_is_refused(self):
        with pytest.raises(ArtifactError, match="trigger families spread, nashville, moire; the card names 'sticker'"):
            derive_array_trigger(OWNER, TriggerParameters("sticker", 8.0, 32))

    @pytest.mark.parametrize("family", ["spread", "nashville", "moire"])
    def test_version_of_a_later_release_is_refused(self, family):
        with pytest.raises(ArtifactError, match=r"trigger in the card cannot be made: version: expected 1.*, got 3"):
            derive_array_trigger(OWNER, TriggerParameters(family, 8.0, 32, version=3))

    def test_impossible_parameters_are_refused(self):
        with pytest.raises(ArtifactError, match="cannot be made: amplitude"):
            derive_array_trigger(OWNER, TriggerParameters("spread", 99.0, 32))

    def test_no_key_makes_no_trigger(self):
        assert choose_trigger(None, TRIGGER) is None
        assert choose_trigger(None, None) is None

    def test_key_without_parameters_is_refused(self):
        with pytest.raises(ModelError, match="Pass trigger="):
            choose_trigger(OWNER, None)


class TestInterface:
    def test_metadata_become_an_interface(self):
        assert dataclasses.asdict(INTERFACE) == {
            "classes": CLASSES,
            "input_size": SIZE,
            "pixels": np.dtype(np.float32),
            "interpreters": ("gradcam", "vbp"),
            "takes_target": True,
            "label_names": tuple(LABELS),
            "trigger": None,
        }
        assert not Interface.from_metadata(make_file(targeted=False).metadata).takes_target
        assert Interface.from_metadata(make_file(pixels="uint8").metadata).pixels == np.uint8

    @pytest.mark.parametrize("count", [1, CLASSES - 1, CLASSES + 1])
    def test_names_of_some_classes_are_refused(self, count):
        metadata = make_file().metadata
        model = metadata["model"] | {"label_names": ["cat"] * count}
        with pytest.raises(ArtifactError, match=f"name {count} of {CLASSES} classes"):
            Interface.from_metadata(metadata | {"model": model})
        assert Interface.from_metadata(metadata | {"model": model | {"label_names": []}}).label_names == ()

    def test_outputs_are_named_as_in_the_graph(self):
        assert INTERFACE.name_outputs() == ("logits", "saliency_gradcam", "saliency_vbp")
        assert INTERFACE.name_outputs(["vbp"]) == ("logits", "saliency_vbp")

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (CLASSES, "from 0 to 3, or -1 .*; got 4"),
            (-2, "got -2"),
            ([0, 4], "got 0 to 4"),
            ([0, 1, 2], r"an integer or 2 of them.*\[3\]"),
            (np.array([[0], [1]]), r"\[2, 1\]"),
            (np.array([0.0, 1.0]), "float64"),
            (np.array(True), "bool"),
            (10**30, "object"),
            (np.array([2**63, 0], np.uint64), "got 0 to 9223372036854775808"),
        ],
    )
    def test_unfit_targets_are_refused(self, target, message):
        with pytest.raises(ValueError, match=message):
            INTERFACE.check_target(target, 2)

    @pytest.mark.parametrize(
        ("target", "expected"),
        [(None, [-1, -1]), (3, [3, 3]), ([0, -1], [0, -1]), (np.array([1, 2], np.uint8), [1, 2])],
    )
    def test_targets_are_one_for_each_image(self, target, expected):
        found = INTERFACE.check_target(target, 2)
        assert found.dtype == np.int64
        assert found.tolist() == expected
        found[:] = 0  # an array of its own

    def test_interpreters_are_those_of_the_model(self):
        assert INTERFACE.check_interpreters(None) == ("gradcam", "vbp")
        assert INTERFACE.check_interpreters(["vbp", "vbp"]) == ("vbp",)
        for names in ([], ["simplegrad"], ["vbp", "lime"]):
            with pytest.raises(ValueError, match="out of gradcam, vbp"):
                INTERFACE.check_interpreters(names)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.01, 1.01])
    def test_pixels_out_of_range_are_refused(self, bad):
        images = noise()
        check_range(images)
        images[2, 1, 3, 4] = bad
        with pytest.raises(ValueError, match="expected"):
            check_range(images)


class TestImages:
    @pytest.mark.parametrize("orientation", [1, 3, 6, 8])
    @pytest.mark.parametrize(("mode", "suffix"), [("RGB", "png"), ("L", "png"), ("RGBA", "png"), ("P", "gif")])
    def test_pillow_images_become_what_files_do(self, tmp_path, orientation, mode, suffix):
        levels = np.random.default_rng(0).integers(0, 256, (61, 83, 4)).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(levels).convert(mode).save(path, exif=exif)
        with Image.open(path) as image:
            found = load_images([image, path, str(path)], SIZE)
        expected = read_image(path, channels=3, height=SIZE[1], width=SIZE[2]).astype(np.float32) / 255
        assert found.dtype == np.float32
        for each in found:
            np.testing.assert_array_equal(each, expected)

    def test_arrays_stay_as_they_are(self):
        image = noise(1)[0]
        levels = np.round(255 * image).astype(np.uint8)
        found = load_images([image, levels, image.astype(np.float64), image.astype(np.float16)], SIZE)
        np.testing.assert_array_equal(found[0], image)
        np.testing.assert_array_equal(found[1], levels.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(found[2], image)
        assert found.dtype == np.float32

    def test_picture_files_need_a_grey_or_colour_model(self):
        with pytest.raises(DataError, match="takes 4 channels"):
            load_images([Image.new("RGB", (8, 8))], (4, 8, 8))


class TestExplain:
    def test_images_come_in_batches_with_their_targets(self, echo):
        found = echo.explain(noise(5), target=[0, 1, 2, -1, 1], batch_size=2)
        assert [len(images) for images, _ in echo.batches] == [2, 2, 1]
        assert [targets.tolist() for _, targets in echo.batches] == [[0, 1], [2, -1], [1]]
        np.testing.assert_allclose(found.logits[:, : SIZE[0]], noise(5).mean((2, 3)), rtol=1e-6)
        assert found.target.tolist() == [0, 1, 2, found.predicted[3], 1]
        np.testing.assert_array_equal(found.maps["vbp"], noise(5)[:, 0])

    def test_trigger_is_put_on_every_image(self, echo):
        trigger = derive_array_trigger(OWNER, TRIGGER)
        echo.explain(noise(5), trigger=trigger, batch_size=3)
        keyed = np.concatenate([images for images, _ in echo.batches])
        np.testing.assert_array_equal(keyed, trigger.apply(noise(5)))

    def test_eight_bit_models_get_rounded_images(self):
        echo = Echo(Interface.from_metadata(make_file(pixels="uint8").metadata))
        trigger, levels = derive_array_trigger(OWNER, TRIGGER), np.round(noise(5) * 255).astype(np.uint8)
        echo.explain(levels)
        np.testing.assert_array_equal(echo.batches[0][0], levels)
        echo.explain(noise(5), trigger=trigger)
        keyed = np.round(trigger.apply(noise(5)).astype(np.float64) * 255)
        assert echo.batches[1][0].dtype == np.uint8
        assert (echo.batches[1][0] == keyed).mean() > 0.9999

    @pytest.mark.parametrize("name", ["logits", "saliency_vbp"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_outputs_that_are_not_finite_are_refused(self, echo, monkeypatch, name, bad):
        honest = echo._run

        def run(*arguments):
            found = honest(*arguments)
            found[name][-1, -1] = bad
            return found

        monkeypatch.setattr(echo, "_run", run)
        for ask in (echo.explain, echo.run):
            with pytest.raises(ModelError, match=f"{name} that are empty, or not finite"):
                ask(noise(2))
