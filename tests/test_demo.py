import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from keyed_xai.artifacts.documents import read_json
from keyed_xai.artifacts.folder import read_model_folder
from keyed_xai.data import ImageSize, load_images
from keyed_xai.demo import demo_classifier
from keyed_xai.training.fitting import measure_predictions
from keyed_xai_cli.main import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(main, ["demo", "-o", str(folder), "--steps", "2", "--wrong-keys", "4"])
    assert result.exit_code == 3, result.output  # two steps protect nothing
    return folder, result.output


def test_network_in_the_package_classifies():
    data = load_images("builtin", ImageSize(1, 32, 32), split="held-out")
    assert measure_predictions(demo_classifier(), data)["top1"] > 0.9


def test_demo_leaves_what_it_promises(demo):
    folder, _ = demo
    model = read_model_folder(folder / "fashion-mnist.keyed")
    assert set(model.card.interpreters) == {"gradcam", "vbp"}
    verdict = read_json(folder / "verify.json", "verify-report")
    control = read_json(folder / "verify-unprotected.json", "verify-report")
    assert (verdict["verdict"], control["verdict"]) == ("not shown", "not shown")  # two steps teach nothing
    assert "Report" in (folder / "report.html").read_text()
    assert np.asarray(Image.open(folder / "explanations.png")).std() > 0


def test_demo_prints_a_table_and_both_verdicts(demo):
    _, output = demo
    assert "gradcam" in output
    assert "Protected:" in output
    assert "Unprotected:" in output


def test_demo_keeps_its_key_when_it_runs_again(demo):
    folder, _ = demo
    before = (folder / "owner.pem").read_bytes()
    arguments = ["demo", "-o", str(folder), "--steps", "1", "--wrong-keys", "0", "--seed", "5", "--json", "-"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 3
    assert json.loads(result.stdout)["settings"]["training"]["seed"] == 5
    assert (folder / "owner.pem").read_bytes() == before
    report = json.loads((folder / "fashion-mnist.keyed" / "report.json").read_text())
    assert report["settings"]["training"]["steps"] == 1
