"""Exporting: the file, what it says about itself, and what is refused when it is read; the command line."""

import hashlib
import json
from base64 import b64encode

import numpy as np
import onnx
import pytest
import torch

from keyed_xai.array_triggers.spread import SpreadSettings, derive_texture
from keyed_xai.artifacts.documents import validate
from keyed_xai.artifacts.onnx_file import read_onnx, write_onnx
from keyed_xai.errors import ArtifactError, KeyedXAIError, ModelError
from keyed_xai.export.building import ExportSettings
from keyed_xai.export.exporting import Provenance, check_onnx, export_onnx, settings_of
from keyed_xai.export.parity import open_session, random_images
from keyed_xai.export.triton import require_target
from keyed_xai.keys import ByteStream
from tests.exported import altered, export_model, make_classifier, run
from tests.marked import OWNER, STRANGER, card_of, unmarked_classifier, write_folder

OWNER_BYTES = bytes([1]) * 32
SEED = OWNER.derive_seed("spread")
TEXTURE = derive_texture(ByteStream(SEED), SpreadSettings())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("export"))


def secrets_in(data):
    """What of the owner's secrets stands in a file, however it may be written: key, seed, or some of the texture."""
    texts = [write(each) for each in (OWNER_BYTES, SEED) for write in (bytes.hex, lambda raw: b64encode(raw).decode())]
    rows = [row[start : start + 4] for row in TEXTURE for start in range(0, 32, 4)]
    floats = [row.astype(kind).tobytes() for kind in (np.float16, np.float32, np.float64) for row in rows]
    return [each for each in (OWNER_BYTES, SEED, *map(str.encode, texts), *floats) if each in data]


def last_layer(model):
    return next(each for each in model.graph.initializer if list(each.dims) == [3, 8])


class TestFile:
    def test_metadata_hold_card_licence_and_parity(self, exported):
        folder, classifier, _ = exported
        said = read_onnx(folder / "m.onnx").metadata
        assert said["card"] == card_of(classifier).to_json()
        assert said["license_sha256"] == hashlib.sha256((folder / "m.keyed" / "license.json").read_bytes()).hexdigest()
        assert said["interpreters"] == ["gradcam"]
        assert {(each["images"], each["batch"]) for each in said["parity"]} == {
            (kind, batch) for kind in ("random", "real") for batch in (1, 3, 8)
        }
        assert all(each["largest"] < 1e-3 for each in said["parity"])

    def test_file_holds_no_key_material(self, exported):
        assert not secrets_in((exported[0] / "m.onnx").read_bytes())

    def test_texture_among_the_weights_would_be_found(self, exported):
        def hide(model):
            weight = last_layer(model)
            values = onnx.numpy_helper.to_array(weight).copy()
            values[0] = TEXTURE[5, 8:16]
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

        assert secrets_in(altered(read_onnx(exported[0] / "m.onnx"), hide))

    def test_settings_come_back(self, tmp_path):
        settings = ExportSettings(interpreters=("vbp",), normalised=True, eight_bits=True, precision="int8")
        result = export_onnx(unmarked_classifier(), tmp_path / "m.onnx", settings)
        assert settings_of(read_onnx(tmp_path / "m.onnx")) == settings
        assert result.file.sha256 == hashlib.sha256((tmp_path / "m.onnx").read_bytes()).hexdigest()
        assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]

    def test_file_runs_as_it_stands(self, exported):
        folder, classifier, _ = exported
        file = read_onnx(folder / "m.onnx")
        images = random_images(classifier, torch.Generator().manual_seed(0))[:2]
        logits, maps = open_session(file.data)({"image": images.numpy()})
        np.testing.assert_allclose(logits, classifier(images).detach(), rtol=1e-4, atol=1e-5)
        assert maps.shape[0] == 2

    def test_nothing_is_written_when_parity_fails(self, tmp_path):
        classifier = unmarked_classifier()
        with torch.no_grad():
            classifier.network.fc.weight.zero_()  # every map is empty, and so shows nothing
        with pytest.raises(ModelError, match="zero everywhere"):
            export_onnx(classifier, tmp_path / "m.onnx")
        assert not list(tmp_path.iterdir())

    def test_file_that_is_there_is_kept(self, tmp_path):
        (tmp_path / "m.onnx").write_text("mine")
        with pytest.raises(ArtifactError, match="--force"):
            export_onnx(make_classifier("SmallResNet"), tmp_path / "m.onnx")
        assert (tmp_path / "m.onnx").read_text() == "mine"

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_no_file_is_left_half_written(self, error, exported, tmp_path, monkeypatch):
        file = read_onnx(exported[0] / "m.onnx")
        (tmp_path / "m.onnx").write_text("old")

        def fail(_handle):
            raise error

        monkeypatch.setattr("os.fsync", fail)  # by then the bytes are in the draft
        with pytest.raises(ArtifactError if isinstance(error, OSError) else KeyboardInterrupt):
            write_onnx(tmp_path / "m.onnx", file)
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.onnx", "old")]

    def test_too_few_real_images_are_refused(self, tmp_path):
        classifier = make_classifier("SmallResNet")
        with pytest.raises(ValueError, match="expected 12"):
            export_onnx(classifier, tmp_path / "m.onnx", images=torch.zeros(3, 3, 32, 32), provenance=Provenance())


class TestCheck:
    def test_file_still_agrees(self, exported):
        folder, classifier, _ = exported
        assert check_onnx(folder / "m.onnx", classifier).parity

    def test_other_weights_are_refused(self, exported):
        folder, classifier, _ = exported
        other = make_classifier("SmallResNet")
        with pytest.raises(ArtifactError, match="other weights"):
            check_onnx(folder / "m.onnx", other)

    def test_changed_graph_is_caught(self, exported, tmp_path):
        folder, classifier, _ = exported

        def change(model):
            weight = max(model.graph.initializer, key=lambda each: np.prod(each.dims))
            values = onnx.numpy_helper.to_array(weight)
            weight.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(1.1), weight.name))

        (tmp_path / "m.onnx").write_bytes(altered(read_onnx(folder / "m.onnx"), change))
        with pytest.raises(ModelError, match="disagree"):
            check_onnx(tmp_path / "m.onnx", classifier)

    def test_copy_in_a_model_repository_is_checked_too(self, exported, tmp_path):
        folder, classifier, _ = exported
        (tmp_path / "copy.onnx").write_bytes(require_target(read_onnx(folder / "m.onnx")))
        assert len(check_onnx(tmp_path / "copy.onnx", classifier).parity) == 12  # two outputs, two kinds, three sizes

    @pytest.mark.parametrize("part", ["input", "output"])
    def test_graph_that_its_metadata_contradict_is_refused(self, part, exported, tmp_path):
        folder, classifier, _ = exported

        def rename(model):
            old = getattr(model.graph, part)[0].name
            for node in model.graph.node:
                names = getattr(node, part)
                for place, name in enumerate(names):
                    if name == old:
                        names[place] = "other"
            getattr(model.graph, part)[0].name = "other"

        (tmp_path / "other.onnx").write_bytes(altered(read_onnx(folder / "m.onnx"), rename))
        with pytest.raises(KeyedXAIError, match="other|cannot load"):
            check_onnx(tmp_path / "other.onnx", classifier)

    def test_one_changed_weight_is_found_on_the_command_line(self, exported, tmp_path):
        folder = exported[0]

        def change(model):
            weight = last_layer(model)
            values = onnx.numpy_helper.to_array(weight).copy()
            values[0, 0] += 0.1
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

        (tmp_path / "m.onnx").write_bytes(altered(read_onnx(folder / "m.onnx"), change))
        result = run("export", folder / "m.keyed", "--check", tmp_path / "m.onnx")
        assert result.exit_code == 1
        assert "disagree in logits" in result.output


class TestCommand:
    def test_document_fits_and_names_the_file(self, exported):
        folder, _, result = exported
        document = json.loads((folder / "m.json").read_text())
        validate(document, "export", origin="it")
        assert document["sha256"] == hashlib.sha256((folder / "m.onnx").read_bytes()).hexdigest()
        assert not document["checked"]
        assert "saliency_gradcam: largest relative difference" in result.output

    def test_check_finds_the_model_beside_the_file(self, exported):
        result = run("export", "--check", exported[0] / "m.onnx")
        assert result.exit_code == 0, result.output
        assert "still agrees" in result.output

    def test_check_of_another_model_fails(self, exported, tmp_path):
        write_folder(tmp_path / "other.keyed", make_grey_twin(), owner=STRANGER)
        result = run("export", tmp_path / "other.keyed", "--check", exported[0] / "m.onnx")
        assert result.exit_code == 1
        assert "other weights" in result.output

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [((), "MODEL"), (("--check", "m.onnx"), "Name the model"), (("--check", "m.onnx", "-o", "n.onnx"), "-o")],
    )
    def test_wrong_usage_is_2(self, arguments, complaint, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "m.onnx").write_bytes(b"")
        result = run("export", *arguments)
        assert result.exit_code == 2
        assert complaint in result.output


def make_grey_twin():
    classifier = unmarked_classifier()
    with torch.no_grad():
        classifier.network.fc.bias[0] += 1
    return classifier
