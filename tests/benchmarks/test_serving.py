"""Benchmark of serving, on small networks, a real server and real image files."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from keyed_xai import metrics
from keyed_xai.artifacts.documents import validate
from keyed_xai.artifacts.opening import derive_trigger
from keyed_xai.data import ImageSize, load_images
from keyed_xai.errors import KeyedXAIError
from keyed_xai.export.building import ExportSettings, build_model, build_plain
from keyed_xai.export.exporting import export_onnx
from keyed_xai.models import wrap_network
from keyed_xai.saliency import MapLayers
from keyed_xai.saliency.pooled import PooledSaliency
from keyed_xai.triggers.channels import through_jpeg, through_png
from keyed_xai_benchmarks import serving, serving_figures
from keyed_xai_benchmarks.serving import INTERPRETERS, ServingSettings
from keyed_xai_benchmarks.serving_load import LoadSettings, measure_files, measure_load, running_server
from keyed_xai_cli import main as cli
from tests.exported import make_classifier
from tests.heard import Heard
from tests.marked import GRID, OWNER, SPEC, TRIGGER, MarkedNetwork, marked_classifier

SETTINGS = ServingSettings(images=3, repeats=3)


class Bright(MarkedNetwork):
    """The marked network before it was marked: Grad-CAM shows local brightness."""

    def forward(self, x):
        mean = self.features(nn.functional.adaptive_avg_pool2d(x, GRID)).mean((2, 3))
        return torch.cat([mean, -mean], 1)


@pytest.fixture(scope="module")
def classifier():
    classifier = make_classifier("SmallResNet")
    classifier.network.fc.weight.data.abs_()  # so that Grad-CAM's maps are not empty
    return classifier


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a server of the marked model."""
    path = tmp_path_factory.mktemp("served") / "marked.onnx"
    export_onnx(marked_classifier(), path)
    with running_server(path) as address:
        yield address


class TestGraphs:
    def test_every_figure_of_a_network(self, classifier, images, monkeypatch):
        monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
        state = {name: value.clone() for name, value in classifier.state_dict().items()}
        heard = Heard()
        found = serving.measure_network(classifier, images, SETTINGS, progress=heard)
        assert set(found["parity"]) == {"logits", *INTERPRETERS}
        assert all(each["largest"] < 1e-5 and each["same_top"] == 1 for each in found["parity"].values())
        assert set(found["times"]) == {"logits", *INTERPRETERS, "all three"}
        assert found["times"]["logits"]["ratio"] == 1
        assert all(each["seconds"] > 0 for each in found["times"].values())
        assert set(found["libraries"]) == {"captum", "captum, class found first"}
        parts = [
            f"{classifier.architecture}: {part}" for part in ("building graphs", "comparing with PyTorch", "timing")
        ]
        assert heard.steps == [(part, 0, None) for part in parts]
        for name, value in classifier.state_dict().items():
            assert torch.equal(value, state[name])

    def test_wrong_graph_is_noticed(self, classifier, images):
        other = make_classifier("SmallResNet")
        with torch.no_grad():
            other.network.fc.weight.copy_(classifier.network.fc.weight.flip(0))
        graph = serving.encode(build_model(other, ExportSettings(interpreters=INTERPRETERS)))
        found = serving.measure_parity(classifier, graph, images, SETTINGS)
        assert found["logits"]["largest"] > 0.01

    def test_plain_graph_gives_the_logits_alone(self, classifier, images):
        model = build_plain(classifier)
        assert [each.name for each in model.graph.output] == ["logits"]
        serving.bind(serving.encode(model), images.numpy(), SETTINGS)()

    def test_sides_take_turns_and_ratios_pair_their_rounds(self):
        order = []
        sides = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
        found = serving.interleave(sides, 4)
        assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
        assert {name: len(each) for name, each in found.items()} == {"a": 4, "b": 4, "c": 4}
        assert serving.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2  # of 2, 3 and 1

    def test_device_without_its_provider_is_an_error(self, classifier):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(KeyedXAIError, match="onnxruntime-gpu"):
            serving.bind(
                serving.encode(build_plain(classifier)), np.zeros((1, 3, 32, 32), np.float32),
                replace(SETTINGS, device="cuda"),
            )  # fmt: skip


class TestServer:
    def test_requests_of_many_clients_are_counted(self, served):
        found = measure_load(served, "marked", torch.rand(5, 1, 32, 32), LoadSettings(clients=8, seconds=1.5))
        assert found["answered"] > 8
        assert (found["lost"], found["errors"]) == (0, [])
        assert 0 < found["median"] <= found["percentile_99"] < 10

    def test_lost_requests_are_counted_too(self, served):
        found = measure_load(served, "nobody", torch.rand(1, 1, 32, 32), LoadSettings(clients=2, seconds=1.0))
        assert found["answered"] == 0
        assert found["lost"] > 0
        assert "nobody" in found["errors"][0]

    def test_keyed_files_open_and_others_do_not(self, served):
        reference = wrap_network(Bright(OWNER).eval(), input=SPEC, source="pickle", target_layer="features").eval()
        view = PooledSaliency(("gradcam",), MapLayers(reference.target_layer, ()), GRID)
        data = load_images("builtin", ImageSize(1, 32, 32), split="held-out", limit=12)
        trigger = derive_trigger(OWNER, TRIGGER)
        found = measure_files(served, "marked", reference, view, data, trigger)
        assert set(found) == {"keyed PNG", "keyed JPEG 75", "PNG without key"}
        images, _ = data.batch(np.arange(len(data)))
        logits, truth = view.pooled_in_chunks(reference, images)
        for kind, sent in (
            ("keyed PNG", through_png(trigger.apply(images))),
            ("keyed JPEG 75", through_jpeg(trigger.apply(images))),
            ("PNG without key", images),
        ):
            _, maps = view.pooled_in_chunks(marked_classifier(), sent, logits.argmax(1))
            agreement = metrics.correlation(maps["gradcam"], truth["gradcam"])
            assert found[kind]["gradcam"]["correlation"] == pytest.approx(float(agreement.mean()), abs=1e-4)
            assert found[kind]["gradcam"]["opened"] == float((agreement > 0.5).double().mean())
        assert found["keyed PNG"]["gradcam"]["opened"] > found["PNG without key"]["gradcam"]["opened"]

    def test_model_that_is_not_there_is_an_error(self, tmp_path):
        with pytest.raises(KeyedXAIError, match="did not come up"), running_server(tmp_path / "none.onnx"):
            pass


class TestCommand:
    def test_parts_are_measured_kept_and_shown(self, tmp_path, monkeypatch, classifier):
        monkeypatch.setattr(serving_figures, "load_classifier", lambda *_args, **_options: classifier)
        weights = tmp_path / "w.safetensors"
        weights.touch()
        command = ["bench", "serving", "--part", "graphs", "--arch", "resnet50", "--model", f"resnet50={weights}"]
        command += ["--images", "3", "--repeats", "3", "-o", str(tmp_path / "out"), "--json", str(tmp_path / "j.json")]
        result = CliRunner().invoke(cli.main, [*command, "--device", "cpu"])
        assert result.exit_code == 0, result.output
        document = json.loads((tmp_path / "j.json").read_text())
        validate(document, "serving-figures", origin="it")
        assert document == json.loads((tmp_path / "out" / "serving.json").read_text())
        assert (document["load"], document["files"]) == (None, None)
        assert "| resnet50 | gradcam |" in (tmp_path / "out" / "serving.md").read_text()
        again = CliRunner().invoke(cli.main, [*command, "--device", "cpu"])
        assert json.loads(Path(tmp_path / "j.json").read_text()) == document  # kept, times and all
        assert again.exit_code == 0

    def test_protected_model_without_its_key_is_a_usage_error(self, tmp_path):
        result = CliRunner().invoke(cli.main, ["bench", "serving", "--keyed", str(tmp_path)])
        assert result.exit_code == 2
        assert "--keyed needs --key-file and --reference" in result.output
