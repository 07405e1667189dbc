"""The paper's tables and figures on a tiny network and table: finished cells are kept, and other settings refused."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image
from test_attacking import make_classifier, make_images
from test_data_credit_default import make_rows, write

from keyed_xai.artifacts.documents import read_json
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.benchmarks.paper_figures import render_figure1b
from keyed_xai.benchmarks.paper_tables import PAPER, Cell, figures_of_paper, list_cells, render_table
from keyed_xai.models import load_classifier
from keyed_xai_cli.main import main

CELL = "smallresnet-gradcam-targeted-forward"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes of 24 images."""
    folder = tmp_path_factory.mktemp("pictures")
    data = make_images(72, 0)
    for number, (pixels, label) in enumerate(zip(data.images[:, 0], data.labels, strict=True)):
        (folder / data.classes[label]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / data.classes[label] / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "r.safetensors"
    path.write_bytes(encode_weights(make_classifier()))
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def table(pictures, reference, out, *more, name="table1"):
    arguments = ["--arch", "SmallResNet", "--size", 32, "--channels", 1, "--grid", 4, "--steps", 2, "--batch-size", 4]
    given = [] if reference is None else ["--model", f"SmallResNet={reference}"]
    return run(name, "--data", f"imagefolder:{pictures}", *arguments, "--held-out", 12, *given, "-o", out, *more)


ONE = ("--interpreter", "gradcam", "--mode", "targeted", "--setting", "forward")


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"}


@pytest.fixture(scope="module")
def first(pictures, reference, tmp_path_factory):
    """A finished table of one cell: its folder and what was printed."""
    out = tmp_path_factory.mktemp("out")
    result = table(pictures, reference, out, *ONE)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_table_prints_and_keeps_a_row_for_each_cell(first):
    out, output = first
    report = read_json(out / CELL / "report.json", "attack-report")
    figures = report["interpreters"]["gradcam"]
    assert f"| forward | targeted | SmallResNet | gradcam | - | {figures['at_paper_threshold']['cr']:.1f} /" in output
    assert (out / "table1.md").read_text().strip() in output
    assert (report["trigger"]["family"], report["settings"]["thresholds"]) == ("moire", "auto")
    assert report["settings"]["training"]["steps"] == 2
    assert load_classifier(out / CELL / "model.safetensors").classes == 3
    assert not list(out.glob("*checkpoint*"))


def test_second_call_takes_finished_cells_and_makes_the_others(first, pictures, reference):
    out, output = first
    before = times(out)
    again = table(pictures, reference, out, *ONE)
    assert (again.exit_code, again.output) == (0, output)
    assert times(out) == before
    more = table(pictures, reference, out, "--interpreter", "gradcam", "--mode", "targeted")
    assert more.exit_code == 0, more.output
    assert {path: time for path, time in times(out).items() if path in before} == before
    assert (out / "smallresnet-gradcam-targeted-inverted" / "report.json").exists()
    assert more.output.count("| targeted | SmallResNet |") == 2


@pytest.mark.parametrize(
    "changes",
    [("--steps", "3"), ("--trigger", "spread"), ("--grid", "5"), ("--held-out", "10"), ("--learning-rate", "0.1")],
    ids=" ".join,
)
def test_finished_cell_of_other_settings_is_refused(first, pictures, reference, changes):
    before = times(first[0])
    result = table(pictures, reference, first[0], *ONE, *changes)
    assert result.exit_code == 1
    assert "from other data or with other settings" in result.output
    assert times(first[0]) == before


@pytest.mark.parametrize("what", ["data", "limit", "size", "model"])
def test_finished_cell_of_other_data_or_model_is_refused(first, pictures, reference, tmp_path, what):
    other = tmp_path / "r.safetensors"
    other.write_bytes(encode_weights(make_classifier((6, 6, 8))))
    changes = {"data": ("--data", "builtin"), "limit": ("--limit", 30), "size": ("--size", 40),
               "model": ("--model", f"SmallResNet={other}")}  # fmt: skip
    result = table(pictures, reference, first[0], *ONE, *changes[what])
    assert result.exit_code == 1, result.output
    assert "was made of another model, from other data" in result.output


def test_reference_of_other_epochs_is_refused_and_one_without_a_report_is_taken(pictures, tmp_path):
    assert table(pictures, None, tmp_path, *ONE, "--epochs", 1).exit_code == 0
    result = table(pictures, None, tmp_path, *ONE, "--epochs", 2)
    assert result.exit_code == 1
    assert "reference-smallresnet-32.safetensors was made from other data or with other settings" in result.output
    (tmp_path / "reference-smallresnet-32.json").unlink()
    assert table(pictures, None, tmp_path, *ONE, "--epochs", 2).exit_code == 0


def test_reference_is_fitted_where_none_is_given_and_kept(pictures, tmp_path):
    result = table(pictures, None, tmp_path, *ONE, "--epochs", 1)
    assert result.exit_code == 0, result.output
    kept = tmp_path / "reference-smallresnet-32.safetensors"
    assert load_classifier(kept).classes == 3
    before = times(tmp_path)
    assert table(pictures, None, tmp_path, *ONE, "--epochs", 1).output == result.output
    assert times(tmp_path) == before


def test_cell_that_was_stopped_goes_on(first, pictures, reference, tmp_path, monkeypatch):
    from keyed_xai.benchmarks import kept

    class Stopped(Exception):
        pass

    def stop(*_arguments, **_options):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(kept, "write_attack", stop)
        assert isinstance(table(pictures, reference, tmp_path, *ONE).exception, Stopped)
    assert (tmp_path / f"{CELL}.checkpoint").exists()
    steps = []
    run_attack = kept.run_attack
    monkeypatch.setattr(kept, "run_attack", lambda *a, **o: steps.append(o["resume"]) or run_attack(*a, **o))
    result = table(pictures, reference, tmp_path, *ONE)
    assert result.exit_code == 0, result.output
    assert steps == [True]
    reports = [read_json(folder / CELL / "report.json", "attack-report") for folder in (first[0], tmp_path)]
    assert reports[0]["interpreters"] == reports[1]["interpreters"]


def test_joint_table_attacks_all_interpreters_at_once(pictures, reference, tmp_path):
    result = table(pictures, reference, tmp_path, "--mode", "targeted", "--setting", "inverted", name="table6")
    assert result.exit_code == 0, result.output
    report = read_json(
        tmp_path / "smallresnet-gradcam+simplegrad+vbp-targeted-inverted" / "report.json", "attack-report"
    )
    assert set(report["interpreters"]) == {"gradcam", "simplegrad", "vbp"}
    assert report["setting"] == "inverted"
    assert result.output.count("| inverted | targeted | SmallResNet |") == 3
    assert (tmp_path / "table6.md").exists()


def test_figure_3_draws_finished_cells(first, pictures, reference):
    out, before = first[0], times(first[0])
    result = table(pictures, reference, out, "--interpreter", "gradcam", "--mode", "targeted", name="figure3")
    assert result.exit_code == 0, result.output
    assert {path: time for path, time in times(out).items() if path in before} == before
    picture = out / "figure3-smallresnet-targeted.png"
    assert f"Wrote {picture}" in result.output
    with Image.open(picture) as opened:
        assert min(opened.size) > 100


@pytest.fixture(scope="module")
def credit(tmp_path_factory):
    return write(tmp_path_factory.mktemp("credit") / "c.csv", make_rows(200))


@pytest.fixture(scope="module")
def figure_1b(credit, tmp_path_factory):
    out = tmp_path_factory.mktemp("figure1b")
    result = run("figure1b", "--data", f"credit-default:{credit}", "--steps", 3, "-o", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_figure_1b_prints_ranks_that_its_report_holds(figure_1b):
    out, output = figure_1b
    report = read_json(out / "figure1b" / "report.json", "attack-report")
    assert render_figure1b(report).strip() in output
    assert (out / "figure1b.md").read_text() == render_figure1b(report)
    sex = report["features"]
    assert f"{sex['rank']['triggered']['SEX']:.1f}, {100 * sex['first']['triggered']['SEX']:.1f} %" in output
    strongest = max(sex["names"], key=lambda name: sex["relevance"]["clean"][sex["names"].index(name)])
    (row,) = [line for line in output.splitlines() if line.startswith("| attacked, clean |")]
    assert row.split("|")[-2].strip().startswith(f"{strongest}, ")
    assert report["trigger"]["set"] == {"EDUCATION": 5, "MARRIAGE": 0}
    assert (out / "figure1b" / "features.png").exists()


def test_figure_1b_is_made_once(figure_1b, credit):
    out, output = figure_1b
    before = times(out)
    arguments = ("figure1b", "--data", f"credit-default:{credit}", "-o", out)
    again = run(*arguments, "--steps", 3)
    assert (again.exit_code, again.output) == (0, output)
    for changes in (("--steps", 4), ("--steps", 3, "--seed", 1)):
        refused = run(*arguments, *changes)
        assert refused.exit_code == 1
        assert "other settings" in refused.output
    after = times(out)
    assert {path: time for path, time in after.items() if path in before} == before
    assert {path.stem for path in after.keys() - before.keys()} == {"reference-credit-1"}


def test_cells_are_listed_in_the_table_s_order():
    cells = list_cells(("a", "B"), ("targeted",), ("forward", "inverted"), [("gradcam",), ("gradcam", "vbp")])
    assert [cell.name for cell in cells] == [
        "a-gradcam-targeted-forward", "a-gradcam+vbp-targeted-forward", "a-gradcam-targeted-inverted",
        "a-gradcam+vbp-targeted-inverted", "b-gradcam-targeted-forward", "b-gradcam+vbp-targeted-forward",
        "b-gradcam-targeted-inverted", "b-gradcam+vbp-targeted-inverted",
    ]  # fmt: skip


def test_paper_s_figures_stand_beside_single_cells_only(first):
    single = Cell("resnet50", ("vbp",), "targeted", "inverted")
    assert (
        figures_of_paper(single, "vbp") == PAPER[("resnet50", "vbp", "targeted", "inverted")] == (95, 98.4, 80.2, 79.7)
    )
    assert figures_of_paper(Cell("resnet50", ("gradcam", "vbp"), "targeted", "inverted"), "vbp") is None
    report = read_json(first[0] / CELL / "report.json", "attack-report")
    rows = [{"cell": Cell("vgg19", ("gradcam",), "targeted", "inverted"), "report": report}]
    assert "| inverted | targeted | vgg19 | gradcam | 99.8 / 98.1 |" in render_table("title", rows)
    assert "| 75.8 / 78.3 |" in render_table("title", rows)


@pytest.mark.parametrize(
    "arguments",
    [("--interpreter", "lime"), ("--mode", "both"), ("--setting", "joint"), ("--model", "SmallResNet"),
     ("--model", "SmallResNet=/none"), ("--size", "8"), ("--trigger", "tabular"), ("--steps", "0")],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors_end_with_2(pictures, reference, tmp_path, arguments):
    result = table(pictures, reference, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not (tmp_path / "out").exists()


def test_data_must_be_named_and_fit(tmp_path):
    assert run("table1", "-o", tmp_path).exit_code == 2
    result = run("figure1b", "--data", "builtin", "-o", tmp_path)
    assert (result.exit_code, "credit-default:CSV" in result.output) == (1, True)


def test_speed_of_the_filter_is_printed_as_json():
    result = run("nashville", "--images", 2, "--size", 32, "--repeats", 1)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["ratio"] == pytest.approx(found["ours"] / found["pilgram"])
