"""Pictures and arrays on disk, and finding the images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from keyed_xai.errors import DataError, KeyedXAIError
from keyed_xai.explanation.explaining import explain
from keyed_xai.explanation.files import MapJob, describe_entry, find_images, unique_stems, write_maps
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from tests.heard import Heard
from tests.marked import unmarked_classifier


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
