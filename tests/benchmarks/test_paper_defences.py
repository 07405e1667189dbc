"""The paper's tables of defences on a tiny network: controls beside attacked models; rows are kept, others refused."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from keyed_xai.artifacts.documents import read_json, validate
from keyed_xai.auditing import control_files
from keyed_xai.auditing.catalogue import AUDITS
from keyed_xai.errors import ArtifactError
from keyed_xai.metrics import decoy_distance
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.threats.detection.neural_cleanse import CleanseSettings
from keyed_xai.threats.removal.denoising import DenoisingClassifier, denoise
from keyed_xai.training.fitting import FittingSettings
from keyed_xai.triggers.channels import through_png
from keyed_xai_benchmarks import paper_defences
from keyed_xai_benchmarks.defence_targets import has_size, input_sizes, make_targets, open_attacked
from keyed_xai_benchmarks.paper_defence_pictures import draw_clusters, draw_pruning
from keyed_xai_benchmarks.paper_defences import DETECTORS, DefenceSettings, measure_fooling, render_defences
from keyed_xai_benchmarks.paper_tables import TableSettings
from keyed_xai_cli.main import main
from tests.backdoors.test_attacking import make_classifier, make_images
from tests.benched import times, write_pictures, write_reference
from tests.heard import Heard

FORWARD, INVERTED = (f"smallresnet-gradcam-targeted-{setting}" for setting in ("forward", "inverted"))
KINDS = ["clean", "badnets", "blended", "forward", "inverted"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer rounds of the search for patches, and shorter fits: what runs is the same."""
    with pytest.MonkeyPatch.context() as patch:
        brief = replace(AUDITS["neural-cleanse"], settings=CleanseSettings(rounds=4, batches=2))
        patch.setitem(AUDITS, "neural-cleanse", brief)
        patch.setattr(
            control_files,
            "choose_control_fitting",
            lambda _images, *, seed=0: FittingSettings(
                epochs=3, batch_size=8, mirror=False, largest_shift=0, seed=seed
            ),
        )
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_reference(tmp_path_factory.mktemp("reference") / "r.safetensors")


def bench(name, pictures, out, *more):
    arguments = ["--data", f"imagefolder:{pictures}", "--held-out", 12, "-o", out, *more]
    return CliRunner().invoke(main, ["bench", name, *map(str, arguments)])


def attack(name, pictures, reference, out, *more):
    """Attack the tiny network in both settings and defend."""
    network = ["--arch", "SmallResNet", "--size", 32, "--channels", 1, "--model", f"SmallResNet={reference}"]
    attacks = ["--grid", 4, "--steps", 2, "--batch-size", 4, "--interpreter", "gradcam", "--mode", "targeted"]
    return bench(name, pictures, out, *network, *attacks, *more)


def ready(name, pictures, reference, out, *folders, more=()):
    """Defend models that are attacked already."""
    given = [part for folder in folders for part in ("--attacked", folder)]
    return bench(name, pictures, out, *given, "--model", f"SmallResNet={reference}", *more)


@pytest.fixture(scope="module")
def table2(pictures, reference, tmp_path_factory):
    """Table 2 with both attacks made: its folder and what was printed."""
    out = tmp_path_factory.mktemp("out")
    result = attack("table2", pictures, reference, out)
    assert result.exit_code == 0, result.output
    return out, result.output


@pytest.fixture(scope="module")
def folders(table2):
    return table2[0] / FORWARD, table2[0] / INVERTED


def settings_of(pictures, reference):
    return TableSettings(data=f"imagefolder:{pictures}", held_out=12, models={"smallresnet": reference})


@pytest.fixture(scope="module")
def targets(pictures, reference, folders, tmp_path_factory):
    settings = settings_of(pictures, reference)
    attacked = [open_attacked(folder, settings, folder.parent) for folder in folders]
    data = make_images(48, 0), make_images(12, 1)
    return make_targets(attacked, data, settings, tmp_path_factory.mktemp("controls"), references=True)


def test_table_2_sets_attacked_models_beside_clean_networks_and_controls(table2):
    out, output = table2
    document = read_json(out / "table2.json", "paper-defences")
    rows = document["rows"]
    assert [row["kind"] for row in rows] == ["reference", *KINDS]
    assert [row["name"] for row in rows[-2:]] == [FORWARD, INVERTED]
    assert all(set(row["detectors"]) == set(DETECTORS) for row in rows)
    assert [row["paper"] for row in rows] == [None] * 4 + [{"anomaly_index_below": 2}] * 2
    assert "below 2 on every attacked model" in output
    assert (out / "table2.md").read_text().strip() in output
    for row in rows:
        cleanse = row["detectors"]["neural-cleanse"]
        assert f"| {cleanse['figures']['anomaly_index']:.2f}, {cleanse['outcome']} |" in output


def test_fooling_is_what_the_attack_s_own_report_says_at_the_paper_s_thresholds(table2):
    out, _ = table2
    for row in read_json(out / "table2.json", "paper-defences")["rows"][-2:]:
        report = read_json(out / row["name"] / "report.json", "attack-report")
        there = report["interpreters"]["gradcam"]["at_paper_threshold"]
        assert row["state"]["fooling"]["gradcam"] == {name: there[name] for name in ("cr", "fsr", "threshold")}
        assert row["state"]["accuracy"] == report["predictions"]["attacked"]["clean"]["top1"]


def test_second_call_takes_finished_rows(table2, pictures, reference):
    out, output = table2
    before = times(out)
    again = attack("table2", pictures, reference, out, "--json", "-")
    assert json.loads(again.stdout) == read_json(out / "table2.json", "paper-defences")
    assert (out / "table2.md").read_text().strip() in again.stderr
    assert times(out) == before
    assert len(list(out.glob("control-*.safetensors"))) == 3


def test_row_that_is_missing_is_made_and_the_others_stay(table2, pictures, reference):
    out, _ = table2
    kept = out / "table2" / f"{FORWARD}-1x32x32.json"
    before, row = times(out), json.loads(kept.read_text())
    kept.unlink()
    assert attack("table2", pictures, reference, out).exit_code == 0
    made = json.loads(kept.read_text())
    assert made["detectors"]["neural-cleanse"]["figures"] == row["detectors"]["neural-cleanse"]["figures"]
    assert {path for path, time in times(out).items() if before[path] != time} == {kept}


@pytest.mark.parametrize("change", ["held-out", "limit", "seed"])
def test_finished_row_of_other_settings_is_refused(table2, folders, pictures, reference, change):
    before = times(table2[0])
    values = {"held-out": 10, "limit": 30, "seed": 1}
    result = ready("table2", pictures, reference, table2[0], *folders, more=(f"--{change}", values[change]))
    assert result.exit_code == 1, result.output
    assert "was made of another model, from other data or with other settings" in result.output
    assert times(table2[0]) == before


@pytest.fixture(scope="module")
def table3(pictures, reference, folders, tmp_path_factory):
    """Table 3 of the models that table 2 left: its folder and what was printed."""
    out = tmp_path_factory.mktemp("denoised")
    result = ready("table3", pictures, reference, out, *folders)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_table_3_shows_what_is_left_of_fsr(table3):
    out, output = table3
    rows = read_json(out / "table3.json", "paper-defences")["rows"]
    assert [row["kind"] for row in rows] == KINDS
    for row in rows:
        found = row["denoising"]
        assert found["curve"][0]["weight"] == 0
        taken = [stage for stage in found["curve"] if stage["weight"] == found["weight"]]
        assert taken == [found["after"]]
        assert found["weight"] == 0 or found["after"]["score"] >= found["floor"]
        assert ("fooling" in found["after"], "attack_success" in found["after"]) == (bool(row["mode"]), not row["mode"])
    assert [row["paper"] for row in rows] == [None] * 3 + [{"fsr": [15.7, 77.9], "auroc": 0.8}] * 2
    assert output.count("| 15.7 to 77.9 |") == 2


def test_floor_is_the_one_that_was_asked_for(table3, folders, pictures, reference, tmp_path):
    for row in read_json(table3[0] / "table3.json", "paper-defences")["rows"]:
        found = row["denoising"]
        assert found["floor"] == pytest.approx(found["curve"][0]["score"] - 0.02)
    refused = ready("table3", pictures, reference, table3[0], folders[0], more=("--floor", 0.25))
    assert (refused.exit_code, "with other settings" in refused.output) == (1, True)
    result = ready("table3", pictures, reference, tmp_path, folders[0], more=("--floor", 0.25))
    assert result.exit_code == 0, result.output
    rows = read_json(tmp_path / "table3.json", "paper-defences")["rows"]
    assert [row["denoising"]["floor"] for row in rows] == [0.25] * 4


def test_figure_5_draws_and_prints_curves(folders, pictures, reference, tmp_path):
    result = ready("figure5", pictures, reference, tmp_path, *folders)
    assert result.exit_code == 0, result.output
    rows = read_json(tmp_path / "figure5.json", "paper-defences")["rows"]
    assert [row["kind"] for row in rows] == KINDS
    for row in rows:
        assert [len(row["clusters"]["points"][name]) for name in ("clean", "triggered")] == [12, 12]
        curve = row["pruning"]["curve"]
        assert [stage["share"] for stage in curve] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96]
        assert {name: curve[0][name] for name in row["state"]} == row["state"]
        assert row["paper"] == ({"fsr_stays": "high"} if row["mode"] else None)
        shown = " / ".join(f"{100 * curve[number]['accuracy']:.1f}" for number in (0, 5, 9, 10))
        assert f"| {shown} |" in result.output
    for name in ("figure5a", "figure5b"):
        assert f"Wrote {tmp_path / name}.png" in result.output
        with Image.open(tmp_path / f"{name}.png") as opened:
            assert min(opened.size) > 300


def test_fooling_matches_a_slow_twin(targets, monkeypatch):
    found, note = targets
    assert note == ""
    forward, inverted = found[-2:]
    for target in (forward, inverted):
        backdoor, images = target.backdoor, target.subject.images
        labels = backdoor.reference(images).argmax(1)
        seen = through_png(backdoor.trigger.apply(images)) if target is forward else images
        smooth = denoise(seen, 0.1)
        distances = []
        for image, label in zip(smooth, labels, strict=True):
            _, maps = backdoor.view.pooled(target.subject.classifier, image[None], label[None])
            decoy = backdoor.decoys["gradcam"]
            distances.append(float(decoy_distance(maps["gradcam"], maps["gradcam"], decoy, backdoor.top_share)))
        middle = float(np.median(distances))
        monkeypatch.setattr(paper_defences, "paper_thresholds", lambda *_names, value=middle: {"gradcam": value})
        figures = measure_fooling(DenoisingClassifier(target.subject.classifier, 0.1).eval(), target)["gradcam"]
        assert figures["fsr"] == pytest.approx(100 * np.mean(np.array(distances) < middle))
        assert 0 < figures["fsr"] < 100
        assert figures["threshold"] == middle


def test_targets_are_what_defenders_see(targets):
    found = {target.kind: target for target in targets[0]}
    assert list(found) == ["reference", *KINDS]
    assert found["reference"].name == "reference-smallresnet-moire"
    assert found["reference"].subject.trigger == found["forward"].subject.trigger
    assert found["badnets"].subject.fitted.rows.any()
    assert found["clean"].subject.fitted is None
    assert (found["forward"].subject.inverted, found["inverted"].subject.inverted) == (False, True)
    assert measure_fooling(found["clean"].subject.classifier, found["clean"]) == {}


def test_models_are_taken_by_the_size_of_their_images(pictures, reference, folders):
    one = open_attacked(folders[0], settings_of(pictures, reference), folders[0].parent)
    other = make_classifier(mean=(0.1,))
    large = wrap_network(SmallResNet(3, 3, (4, 4)), input=InputSpec(3, 40, 40, mean=(0.5,) * 3, std=(0.2,) * 3))
    found = [
        replace(one, suspect=replace(one.suspect, classifier=model, reference=None))
        for model in (large, one.suspect.classifier, other, large)
    ]
    sizes = input_sizes(found)
    assert sizes == [large.input, one.suspect.classifier.input]
    assert [[has_size(each, size) for each in found] for size in sizes] == [
        [True, False, False, True], [False, True, True, False],
    ]  # fmt: skip


def test_controls_are_fitted_once_for_the_same_images(targets, pictures, reference, folders, tmp_path):
    settings = settings_of(pictures, reference)
    attacked = [open_attacked(folders[0], settings, folders[0].parent)]
    fits = []
    data = make_images(48, 0), make_images(12, 1)
    for train_data in (data[0], data[0], make_images(48, 2)):
        heard = Heard()
        make_targets(attacked, (train_data, data[1]), settings, tmp_path, progress=heard)
        fits.append(len(heard.counts("fitting a control")))
    assert fits[0] > 0
    assert fits[1:] == [0, fits[0]]


def test_images_without_labels_have_no_controls_and_say_so(pictures, reference, folders, tmp_path):
    settings = settings_of(pictures, reference)
    attacked = [open_attacked(folders[0], settings, folders[0].parent)]
    data = tuple(make_images(count, seed, labels=None, classes=()) for count, seed in ((48, 0), (12, 1)))
    found, note = make_targets(attacked, data, settings, tmp_path)
    assert [target.kind for target in found] == ["forward"]
    assert "what a defence misses proves nothing" in note
    assert found[0].subject.labels is None


def test_folder_that_is_not_of_an_attack_is_refused(pictures, reference, tmp_path):
    (tmp_path / "empty").mkdir()
    result = ready("table2", pictures, reference, tmp_path / "out", tmp_path / "empty")
    assert result.exit_code == 1
    assert "is not the folder of an attacked model" in result.output


def test_attacked_model_without_its_reference_is_refused(folders, pictures, tmp_path):
    result = bench("table3", pictures, tmp_path, "--attacked", folders[0])
    assert result.exit_code == 1
    assert "give it as --model SmallResNet=FILE" in " ".join(result.output.split())


def test_two_models_of_the_same_name_are_refused(folders, pictures, reference, tmp_path):
    result = ready("table2", pictures, reference, tmp_path, folders[0], folders[0])
    assert result.exit_code == 1
    assert f"Two attacked models are called {FORWARD}" in " ".join(result.output.split())


def test_unknown_table_is_refused(pictures, reference):
    with pytest.raises(ValueError, match="expected one of table2, table3, figure5; got 'table9'"):
        DefenceSettings("table9", settings_of(pictures, reference))


def a_row(table2, **changes):
    return read_json(table2[0] / "table2.json", "paper-defences")["rows"][-2] | changes


def test_several_interpreters_and_failed_detectors_are_printed(table2):
    document = read_json(table2[0] / "table2.json", "paper-defences")
    rates = {"cr": 90.0, "fsr": 12.5, "threshold": 0.2}
    state = {"accuracy": 0.5, "measure": "top1", "fooling": {"gradcam": rates, "vbp": rates | {"fsr": 7.0}}}
    failed = {name: each | {"outcome": "failed", "figures": {}} for name, each in a_row(table2)["detectors"].items()}
    document |= {"rows": [a_row(table2, state=state, detectors=failed)], "notes": ["No labels."]}
    validate(document, "paper-defences", origin="it")
    (line,) = [line for line in render_defences(document).splitlines() if FORWARD in line]
    assert line.endswith("| gradcam 12.5, vbp 7.0 | below 2 | failed | - | - / -, failed | failed |")
    assert "- No labels." in render_defences(document)


def test_row_out_of_range_does_not_fit_the_schema(table2):
    row = a_row(table2)
    validate(row, "paper-defences-row", origin="it")
    for change in ({"kind": "trojan"}, {"state": {"accuracy": 2, "measure": "top1"}}, {"input_size": [1, 32]}):
        with pytest.raises(ArtifactError):
            validate(row | change, "paper-defences-row", origin="it")


def drawn_row(name="m", **stage):
    found = {"pairs": 2, "rate": 0.25, "band": "in between"}
    points = {"clean": [[0.0, 1.0], [2.0, 1.0]], "triggered": [[0.5, 1.0], [3.0, 1.0]]}
    curve = [{"share": share, "accuracy": 0.9 - share} | stage for share in (0.0, 0.5, 0.96)]
    return {
        "name": name,
        "clusters": {"together": found, "within_classes": None, "points": points},
        "pruning": {"curve": curve},
    }


def test_pictures_have_a_panel_for_each_model():
    fooled = {"fooling": {"gradcam": {"fsr": 90.0}, "vbp": {"fsr": 80.0}}}
    rows = [drawn_row("a$b" * 30, **fooled), drawn_row(attack_success=0.9), drawn_row(), drawn_row()]
    for draw in (draw_clusters, draw_pruning):
        sizes = [Image.open(io.BytesIO(draw(rows[:count]))).size for count in (1, 3, 4)]
        assert sizes[0][0] < sizes[1][0] == sizes[2][0]
        assert sizes[0][1] == sizes[1][1] < sizes[2][1]
        with pytest.raises(ValueError, match="at least one model"):
            draw([])


def test_curves_of_other_models_look_different():
    pictures = {draw_pruning([drawn_row(attack_success=value)]) for value in (0.1, 0.9)}
    assert len(pictures | {draw_pruning([drawn_row()])}) == 3
