"""The paper's tables and figures on a tiny network and table: finished cells are kept, and other settings refused."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from keyed_xai.artifacts.documents import read_json, validate
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.errors import ArtifactError
from keyed_xai.models import load_classifier
from keyed_xai.training.fitting import FittingSettings
from keyed_xai.training.references import plan_for_images
from keyed_xai_benchmarks import paper_tables
from keyed_xai_benchmarks.cached import cached_reference
from keyed_xai_benchmarks.paper_tables import (
    PAPER,
    Cell,
    Result,
    describe_table,
    figures_of_paper,
    list_cells,
    render_table,
)
from keyed_xai_cli.main import main
from tests.backdoors.test_attacking import make_classifier, make_images, make_table_classifier
from tests.benched import times, write_pictures, write_reference
from tests.data.test_credit_default import make_rows, write
from tests.heard import StopAt

CELL = "smallresnet-gradcam-targeted-forward"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_reference(tmp_path_factory.mktemp("reference") / "r.safetensors")


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def table(pictures, reference, out, *more, name="table1"):
    arguments = ["--arch", "SmallResNet", "--size", 32, "--channels", 1, "--grid", 4, "--steps", 2, "--batch-size", 4]
    given = [] if reference is None else ["--model", f"SmallResNet={reference}"]
    return run(name, "--data", f"imagefolder:{pictures}", *arguments, "--held-out", 12, *given, "-o", out, *more)


ONE = ("--interpreter", "gradcam", "--mode", "targeted", "--setting", "forward")


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


def test_table_says_what_it_was_measured_with(first, pictures):
    _, output = first
    lines = output.splitlines()
    start = lines.index("### Table 1: one interpreter at a time")
    assert lines[start + 2 : start + 7] == [
        f"- data: learned from 47 (imagefolder:{pictures.name} (train)), measured on 12 "
        f"(imagefolder:{pictures.name} (held-out))",
        "- network input: 1 x 32 x 32",
        "- trigger: moire",
        "- attack: 2 steps of 4 triggered and 4 clean inputs, seed 0",
        "- reference: SmallResNet given",
    ]
    assert '"paper" figures are of CUB-200-2011' in lines[-3]


def test_table_is_written_as_json_too(first, pictures, reference):
    out, _ = first
    document = read_json(out / "table1.json", "paper-table")
    report = read_json(out / CELL / "report.json", "attack-report")
    (row,) = document["rows"]
    assert (document["table"], document["data"], document["trigger"]) == ("table1", report["data"], {"family": "moire"})
    assert (row["architecture"], row["mode"], row["setting"], row["folder"]) == (
        "SmallResNet", "targeted", "forward", CELL,
    )  # fmt: skip
    assert (row["input_size"], row["reference_epochs"], row["steps"], row["seed"]) == ([1, 32, 32], None, 2, 0)
    assert (row["identity"], row["predictions"]) == (report["identity"], report["predictions"])
    figures, ours = report["interpreters"]["gradcam"], row["interpreters"]["gradcam"]["ours"]
    assert ours == {name: figures[name] for name in ours}
    assert set(ours) == {"cr", "fsr", "threshold", "at_paper_threshold", "auc", "correlation"}
    assert row["interpreters"]["gradcam"]["paper"] is None
    result = table(pictures, reference, out, *ONE, "--json", "-")
    assert json.loads(result.stdout) == document
    assert (out / "table1.md").read_text().strip() in result.stderr


def test_predictions_compared_with_the_reference_s_say_so(first):
    report = read_json(first[0] / CELL / "report.json", "attack-report")
    cell = Cell(architecture="SmallResNet", interpreters=("gradcam",), mode="targeted", setting="forward")
    for against, end in (("labels", ""), ("reference predictions", " (vs reference)")):
        changed = report | {"predictions": report["predictions"] | {"measured_against": against}}
        result = Result(cell=cell, folder=CELL, input=make_classifier().input, epochs=None, report=changed)
        (row,) = [line for line in render_table("title", [result]).splitlines() if line.startswith("| forward")]
        assert row.endswith(f"{100 * report['predictions']['attacked']['triggered']['top1']:.1f}{end} |")


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
    [
        ("--steps", "3"),
        ("--trigger", "spread"),
        ("--grid", "5"),
        ("--held-out", "10"),
        ("--learning-rate", "0.1"),
        ("--seed", "1"),
    ],
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
    assert "reference-smallresnet-1x32.safetensors was made from other data or with other settings" in result.output
    assert table(pictures, None, tmp_path, *ONE, "--epochs", 1, "--seed", 1).exit_code == 1
    (tmp_path / "reference-smallresnet-1x32.json").unlink()
    taken = table(pictures, None, tmp_path, *ONE, "--epochs", 2)
    assert taken.exit_code == 0
    assert "- reference: SmallResNet given" in taken.output


def test_reference_is_fitted_where_none_is_given_and_kept(pictures, tmp_path):
    result = table(pictures, None, tmp_path, *ONE, "--epochs", 1)
    assert result.exit_code == 0, result.output
    kept = tmp_path / "reference-smallresnet-1x32.safetensors"
    assert load_classifier(kept).classes == 3
    assert "- reference: SmallResNet fitted for 1 epochs" in result.output
    assert read_json(tmp_path / "table1.json", "paper-table")["rows"][0]["reference_epochs"] == 1
    before = times(tmp_path)
    assert table(pictures, None, tmp_path, *ONE, "--epochs", 1).output == result.output
    assert times(tmp_path) == before
    for more in (("--channels", 3), ("--size", 40)):
        other = table(pictures, None, tmp_path, *ONE, "--epochs", 1, *more)
        assert "was made of another model" in other.output
    references = {path.name for path in tmp_path.glob("reference-*.safetensors")}
    assert references == {f"reference-smallresnet-{size}.safetensors" for size in ("1x32", "1x40", "3x32")}


def test_cell_that_was_stopped_goes_on(first, pictures, reference, tmp_path, monkeypatch):
    from keyed_xai_benchmarks import cached

    class Stopped(Exception):
        pass

    def stop(*_arguments, **_options):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(cached, "write_attack", stop)
        assert isinstance(table(pictures, reference, tmp_path, *ONE).exception, Stopped)
    assert (tmp_path / f"{CELL}.checkpoint").exists()
    steps = []
    run_attack = cached.run_attack
    monkeypatch.setattr(cached, "run_attack", lambda *a, **o: steps.append(o["resume"]) or run_attack(*a, **o))
    result = table(pictures, reference, tmp_path, *ONE)
    assert result.exit_code == 0, result.output
    assert steps == [True]
    reports = [read_json(folder / CELL / "report.json", "attack-report") for folder in (first[0], tmp_path)]
    assert reports[0]["interpreters"] == reports[1]["interpreters"]


def quick(epochs=1):
    return lambda classifier: FittingSettings(epochs=epochs, batch_size=16, learning_rate=0.01, noise=0.0)


SMALL = plan_for_images(channels=1, side=32, widths=(4, 4))


def brightened(data):
    images = data.images.copy()
    images[0, 0, 0, 0] ^= 1
    return replace(data, images=images)


def test_reference_is_known_by_its_data_and_not_by_what_it_is_measured_on(tmp_path):
    file, data, held_out = tmp_path / "r.safetensors", make_images(48, 0), make_images(16, 1)
    first = cached_reference(file, SMALL, (data, held_out), quick())
    assert first.epochs == 1
    again = cached_reference(file, SMALL, (data, brightened(held_out)), quick())
    assert again.classifier.label_names == data.classes
    for name in ("images", "labels"):
        other = brightened(data) if name == "images" else replace(data, labels=np.roll(data.labels, 1))
        with pytest.raises(ArtifactError, match="r.safetensors was made from other data"):
            cached_reference(file, SMALL, (other, held_out), quick())
    with pytest.raises(ArtifactError, match="other settings"):
        cached_reference(file, SMALL, (data, held_out), quick(), seed=1)


def test_checkpoint_of_another_reference_is_named(tmp_path):
    class Stopped(Exception):
        pass

    file, data = tmp_path / "r.safetensors", (make_images(48, 0), make_images(16, 1))
    with pytest.raises(Stopped):
        cached_reference(file, SMALL, data, quick(2), progress=StopAt(4, Stopped, "fitting a reference"))
    with pytest.raises(ArtifactError, match=r"left .*r\.safetensors\.checkpoint.*delete the file, or .* -o"):
        cached_reference(file, SMALL, data, quick(3))
    assert not file.exists()
    assert cached_reference(file, SMALL, data, quick(2)).epochs == 2


def test_checkpoint_of_another_attack_is_named(pictures, reference, tmp_path, monkeypatch):
    from keyed_xai_benchmarks import cached

    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cached, "write_attack", stop)
    assert table(pictures, reference, tmp_path, *ONE).exit_code == 130
    checkpoint = tmp_path / f"{CELL}.checkpoint"
    whole = checkpoint.read_bytes()
    for content, more in ((whole, ("--steps", 3)), (whole[:100], ())):
        checkpoint.write_bytes(content)
        result = table(pictures, reference, tmp_path, *ONE, *more)
        assert result.exit_code == 1
        assert f"{checkpoint}, and this one cannot go on with it" in result.output
        assert "delete the file, or name another folder with -o" in result.output
        assert checkpoint.read_bytes() == content


def test_images_are_read_once_for_a_size(pictures, tmp_path, monkeypatch):
    read = []
    load = paper_tables.load_images
    monkeypatch.setattr(
        paper_tables,
        "load_images",
        lambda *spec, **options: read.append((options["split"], options["limit"])) or load(*spec, **options),
    )
    one = ("--interpreter", "gradcam", "--mode", "targeted", "--epochs", 1)
    assert table(pictures, None, tmp_path, *one).exit_code == 0
    assert read == [("train", None), ("held-out", 12)]
    assert table(pictures, None, tmp_path, *one, name="figure3").exit_code == 0
    assert read[2:] == [("train", None), ("held-out", 12), ("held-out", 4)]


def test_joint_table_attacks_all_interpreters_at_once(pictures, reference, tmp_path):
    result = table(pictures, reference, tmp_path, "--mode", "targeted", "--setting", "inverted", name="table6")
    assert result.exit_code == 0, result.output
    report = read_json(
        tmp_path / "smallresnet-gradcam+simplegrad+vbp-targeted-inverted" / "report.json", "attack-report"
    )
    assert set(report["interpreters"]) == {"gradcam", "simplegrad", "vbp"}
    assert report["setting"] == "inverted"
    assert result.output.count("| inverted | targeted | SmallResNet |") == 3
    (row,) = read_json(tmp_path / "table6.json", "paper-table")["rows"]
    assert set(row["interpreters"]) == set(report["interpreters"])
    assert (tmp_path / "table6.md").exists()


def test_figure_3_draws_finished_cells(first, pictures, reference):
    out, before = first[0], times(first[0])
    result = table(pictures, reference, out, "--interpreter", "gradcam", "--mode", "targeted", name="figure3")
    assert result.exit_code == 0, result.output
    assert {path: time for path, time in times(out).items() if path in before} == before
    picture = out / "figure3-smallresnet-targeted.png"
    assert f"Wrote {picture}" in result.output
    assert read_json(out / "figure3.json", "paper-table")["rows"][0]["folder"] == CELL
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
    assert (out / "figure1b.md").read_text().strip() in output
    assert "- network input: 1 x 1 x 33\n- trigger: tabular (EDUCATION 5, MARRIAGE 0)" in output
    assert "- reference: TableMLP fitted for 15 epochs" in output
    sex = report["features"]
    assert f"{sex['rank']['triggered']['SEX']:.1f}, {100 * sex['first']['triggered']['SEX']:.1f} %" in output
    strongest = max(sex["names"], key=lambda name: sex["relevance"]["clean"][sex["names"].index(name)])
    (row,) = [line for line in output.splitlines() if line.startswith("| attacked, clean |")]
    assert row.split("|")[-2].strip().startswith(f"{strongest}, ")
    assert report["trigger"]["set"] == {"EDUCATION": 5, "MARRIAGE": 0}
    assert (out / "figure1b" / "features.png").exists()
    (row,) = read_json(out / "figure1b.json", "paper-table")["rows"]
    assert (row["folder"], row["features"], row["identity"]) == ("figure1b", report["features"], report["identity"])
    assert set(row["interpreters"]) == {"simplegrad"}


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
    assert times(out) == before
    assert not (out / "figure1b.checkpoint").exists()
    with_json = run(*arguments, "--steps", 3, "--json", "-")
    assert json.loads(with_json.stdout) == read_json(out / "figure1b.json", "paper-table")


def test_cells_are_listed_in_the_table_s_order():
    cells = list_cells(("a", "B"), ("targeted",), ("forward", "inverted"), [("gradcam",), ("gradcam", "vbp")])
    assert [cell.name for cell in cells] == [
        "a-gradcam-targeted-forward", "a-gradcam+vbp-targeted-forward", "a-gradcam-targeted-inverted",
        "a-gradcam+vbp-targeted-inverted", "b-gradcam-targeted-forward", "b-gradcam+vbp-targeted-forward",
        "b-gradcam-targeted-inverted", "b-gradcam+vbp-targeted-inverted",
    ]  # fmt: skip


def test_paper_s_figures_stand_beside_single_cells_only(first):
    single = Cell(architecture="resnet50", interpreters=("vbp",), mode="targeted", setting="inverted")
    assert (
        figures_of_paper(single, "vbp") == PAPER[("resnet50", "vbp", "targeted", "inverted")] == (95, 98.4, 80.2, 79.7)
    )
    assert (
        figures_of_paper(
            Cell(architecture="resnet50", interpreters=("gradcam", "vbp"), mode="targeted", setting="inverted"), "vbp"
        )
        is None
    )
    report = read_json(first[0] / CELL / "report.json", "attack-report")
    cell = Cell(architecture="VGG19", interpreters=("gradcam",), mode="targeted", setting="inverted")
    results = [Result(cell=cell, folder=cell.name, input=make_classifier().input, epochs=7, report=report)]
    assert "| inverted | targeted | VGG19 | gradcam | 99.8 / 98.1 |" in render_table("title", results)
    assert "| 75.8 / 78.3 |" in render_table("title", results)
    document = describe_table("table1", results)
    validate(document, "paper-table", origin="it")
    paper = {"cr": 99.8, "fsr": 98.1, "clean": 75.8, "triggered": 78.3}
    assert document["rows"][0]["interpreters"]["gradcam"]["paper"] == paper


@pytest.mark.parametrize(
    "arguments",
    [("--interpreter", "lime"), ("--mode", "both"), ("--setting", "joint"), ("--model", "SmallResNet"),
     ("--model", "SmallResNet=/none"), ("--size", "8"), ("--trigger", "tabular"), ("--steps", "0"),
     ("--seed", "-1")],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors_end_with_2(pictures, reference, tmp_path, arguments):
    result = table(pictures, reference, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert not (tmp_path / "out").exists()


def test_model_of_a_network_that_is_not_in_the_table_is_refused(pictures, reference, tmp_path):
    result = table(pictures, reference, tmp_path / "out", "--model", f"resnet18={reference}")
    assert result.exit_code == 2
    assert "--model names resnet18, expected a network out of SmallResNet." in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_model_of_a_table_is_no_reference_of_images(pictures, tmp_path):
    mlp = tmp_path / "t.safetensors"
    mlp.write_bytes(encode_weights(make_table_classifier()))
    more = ("--arch", "TableMLP", "--model", f"TableMLP={mlp}")
    result = run("table1", "--data", f"imagefolder:{pictures}", *more, "-o", tmp_path)
    assert result.exit_code == 1
    assert "TableMLP cannot take images" in result.output


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table6", "figure1b", "figure3", "figure5"])
def test_help_names_the_options_and_does_not_load_torch(name):
    code = (
        "import sys\n"
        "from keyed_xai_cli.main import main\n"
        "try:\n"
        f"    main(['bench', '{name}', '--help'])\n"
        "except SystemExit:\n"
        "    assert 'torch' not in sys.modules\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--seed" in found.stdout
    assert "--json" in found.stdout


def test_data_must_be_named_and_fit(tmp_path):
    assert run("table1", "-o", tmp_path).exit_code == 2
    result = run("figure1b", "--data", "builtin", "-o", tmp_path)
    assert (result.exit_code, "credit-default:CSV" in result.output) == (1, True)


def test_speed_of_the_filter_is_printed_as_json():
    result = run("nashville", "--images", 2, "--size", 32, "--repeats", 1)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["ratio"] == pytest.approx(found["ours"] / found["pilgram"])
