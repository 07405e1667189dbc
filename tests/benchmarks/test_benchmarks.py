import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from keyed_xai.artifacts.documents import read_json, validate
from keyed_xai.data import ImageSize, load_images
from keyed_xai.errors import DataError
from keyed_xai_benchmarks.main_job import count_false_claims, fit_unmarked_models, make_case, render_rows
from keyed_xai_cli.main import main


@pytest.fixture(scope="module")
def radiographs(tmp_path_factory):
    """A folder in the layout of the chest X-ray data: 80 + 12 grey images of two classes."""
    folder = tmp_path_factory.mktemp("chest-xray")
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 6)):
        for label, name in enumerate(("NORMAL", "PNEUMONIA")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 100, (96, 96)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


def test_bench_main_fits_a_reference_and_prints_a_row_that_it_keeps(radiographs, tmp_path):
    arguments = ["bench", "main", "--case", "chest-xray", "--data", f"imagefolder:{radiographs}", "--row", "gradcam"]
    arguments += ["--steps", "2", "--batch-size", "4", "--wrong-keys", "0", "--held-out", "8", "-o", str(tmp_path)]
    arguments += ["--keys", "2", "--json", str(tmp_path / "figures.json")]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0, first.output
    figures = read_json(tmp_path / "figures.json", "bench-figures")
    assert [row["row"] for row in figures["rows"]] == ["gradcam"] * 2
    assert len({row["key"] for row in figures["rows"]}) == 2
    assert (tmp_path / "chest-xray.safetensors").exists()
    written = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.iterdir()
        if path.suffix != ".md" and path.name != "figures.json"
    }
    again = CliRunner().invoke(main, arguments)
    assert again.output == first.output
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_cases_say_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="--data imagefolder:DIR"):
        make_case("chest-xray", tmp_path, data=None, model=None)
    with pytest.raises(DataError, match="--model"):
        make_case("pretrained", tmp_path, data=None, model=None)


def test_false_claims_on_unmarked_models_are_as_rare_as_chance():
    data = load_images("builtin", ImageSize(1, 32, 32), split="train", limit=128)
    models = fit_unmarked_models(data, 2, 1)
    images, _ = data.batch(np.arange(2))
    found = count_false_claims(models, images, keys=20, decoys=19, generator=torch.Generator().manual_seed(0))
    assert found["claims"] == 40
    assert found["signature"]["1e-06"] == 0
    assert found["opening"]["0.05"] <= 8  # of 40 at a level of .05: more than 8 has probability under 1e-4
    assert found["both"]["0.05"] <= 8
    assert found["search"]["0.05"] <= 8
    assert found["smallest"]["opening"] >= 1 / 20


def test_false_claims_command_prints_json():
    arguments = ["bench", "false-claims", "--models", "1", "--keys", "2", "--decoys", "3", "--epochs", "1"]
    result = CliRunner().invoke(main, [*arguments, "--images", "2", "--json", "-"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    validate(document, "bench-figures", origin="standard output")
    assert (document["bench"], document["rows"][0]["claims"]) == ("false-claims", 2)
    assert document["settings"]["keys"] == 2


def test_rows_of_several_keys_give_the_median_and_the_worst():
    def entry(number):
        interpreter = {
            "correlation": {"keyed": 0.9 - 0.1 * number, "clean": 0.1 * number, "wrong_key": 0.2},
            "decoy_correlation": {"reference": 0.05, "clean": 0.95 - 0.1 * number},
            "wrong_keys": {"opened": number // 2, "tried": 7},
            "cr": 100 - number, "fsr": 98.0,
        }  # fmt: skip
        report = {
            "interpreters": {"vbp": interpreter},
            "channels": {"png": {"vbp": {"opened": 1.0}}, "jpeg75": {"vbp": {"opened": 0.9 - 0.1 * number}}},
            "accuracy": {"reference": 0.9, "keyed": 0.89 - 0.01 * number, "clean": 0.9, "wrong_key": 0.9},
            "trigger": {"psnr_db": 39.0 + number, "ssim": 0.98},
            "seconds": 100 * number,
        }
        evidence = {"opening": {"p_value": 0.001}, "signature": {"log2_p": -60.0 + number, "interpreters": {}}}
        return {"row": "vbp", "report": report, "verify": evidence}

    lines = render_rows("case", [entry(number) for number in (0, 1, 2)]).splitlines()
    assert lines[4] == (
        "| vbp | vbp | 0.800, 0.700 | 0.100, 0.200 | 0.200 | 0.050 | 0.850, 0.750 | 0, 1 of 7 | 99.0, 98.0 / 98.0 "
        "| 100.0 / 80.0, 70.0 | 0.0 |"
    )
    assert lines[-1] == (
        "| vbp | 0.900 / 0.880, 0.870 / 0.900 / 0.900 | 0.001 | -59.0, -58.0 | 40.0, 39.0 | 0.980 | 100, 200 |"
    )


def test_no_rows_make_headings_only():
    assert render_rows("case", []).count("\n| ") == 2
