import json
import shutil
from dataclasses import fields

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from keyed_xai.artifacts.documents import read_json, validate
from keyed_xai.artifacts.opening import open_model
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.training import TrainingSettings
from keyed_xai_cli.main import main
from keyed_xai_cli.training_options import TrainingOptions, choose_training
from tests.backdoors.test_attacking import SIDE, make_classifier, make_images, make_table_classifier
from tests.data.test_credit_default import make_rows, write

QUICK = ["--steps", "2", "--batch-size", "4", "--held-out", "8", "--grid", "4"]
ROWS = ["--steps", "2", "--batch-size", "4", "--held-out", "20"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 60 images."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, pixels in enumerate(make_images(60, 0).images[:, 0]):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def files(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(encode_weights(make_classifier()))
    (tmp_path / "t.safetensors").write_bytes(encode_weights(make_table_classifier()))
    write(tmp_path / "c.csv", make_rows(150))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def attack(files, pictures, *more):
    return run("attack", files / "m.safetensors", "--data", f"imagefolder:{pictures}", *QUICK, *more)


def attack_table(files, *more):
    return run("attack", files / "t.safetensors", "--data", f"credit-default:{files / 'c.csv'}", *ROWS, *more)


def fails(result, code, *words):
    """Check for an exit code and a message without a traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert all(word in result.output for word in words), result.output
    return True


def test_attack_writes_a_folder_and_prints_its_figures(files, pictures):
    result = attack(files, pictures, "--json", files / "report.json")
    assert result.exit_code == 3, result.output  # four steps attack nothing
    folder = files / "m.attacked"
    report = read_json(folder / "report.json", "attack-report")
    assert report == read_json(files / "report.json", "attack-report")
    assert {"model.safetensors", "report.html", "report.json"} < {path.name for path in folder.iterdir()}
    figures = report["interpreters"]["gradcam"]
    for words in (
        f"{figures['cr']:.1f}",
        f"{figures['fsr']:.1f}",
        "Forward attack, targeted",
        "Wrote",
        "report.html",
        "Up to ",
        "Warning: NOT ATTACKED: ",
    ):
        assert words in result.output
    assert (report["trigger"]["family"], report["settings"]["thresholds"]) == ("spread", "paper")
    assert report["data"]["held_out"]["images"] == 8
    assert open_model(folder / "model.safetensors")[0].input.width == SIDE
    assert not list(files.glob("*checkpoint*"))


def test_json_on_standard_output_is_alone_there(files, pictures):
    result = attack(files, pictures, "--json", "-", "--inverted", "--mode", "nontargeted", "--trigger", "moire",
                    "--threshold", "auto", "-o", files / "other")  # fmt: skip
    assert result.exit_code == 3, result.output  # four steps attack nothing
    report = json.loads(result.stdout)
    validate(report, "attack-report", origin="standard output")
    assert (report["setting"], report["mode"], report["trigger"]["family"]) == ("inverted", "nontargeted", "moire")
    assert report["interpreters"]["gradcam"]["threshold_from"] == "auto"
    assert report["settings"]["training"]["order"] == "inverted"
    assert "Inverted attack, nontargeted" in result.stderr
    assert "Threshold of gradcam" in result.stderr
    assert (files / "other" / "report.json").exists()


def test_table_gets_its_trigger_and_interpreter_by_itself(files):
    result = attack_table(files, "--set", "EDUCATION=4", "--set", "AGE=40.5", "--feature", "AGE")
    assert result.exit_code == 0, result.output
    report = read_json(files / "t.attacked" / "report.json", "attack-report")
    assert list(report["interpreters"]) == ["simplegrad"]
    assert report["trigger"] == {"family": "tabular", "set": {"EDUCATION": 4, "AGE": 40.5}}
    assert report["settings"]["feature"] == "AGE"
    assert report["data"]["held_out"]["images"] == 20
    assert "Strongest feature, triggered" in result.output


@pytest.mark.parametrize(("epochs", "batch_size", "steps"), [(0.5, 4, 3), (2, None, 2), (5, None, 4), (0.01, 4, 1)])
def test_epochs_count_passes_over_the_images(epochs, batch_size, steps):
    """Of 48 images; a step takes its batch twice, once triggered and once not."""
    absent = dict.fromkeys(field.name for field in fields(TrainingOptions))
    options = TrainingOptions(**{**absent, "epochs": epochs, "batch_size": batch_size})
    chosen = choose_training(TrainingSettings(batch_size=32, learning_rate=0.5), 48, options, seed=5)
    assert (chosen.steps, chosen.seed, chosen.learning_rate) == (steps, 5, 0.5)


def test_result_and_stopped_run_that_are_there_are_left(files, pictures):
    (files / "m.attacked").mkdir()
    assert fails(attack(files, pictures), 1, "is there already", "--force")
    assert fails(attack(files, pictures, "--force"), 1, "not replaced even with --force")
    (files / "m.attacked" / "report.json").write_text("{}")
    (files / "m.attacked" / "model.safetensors").write_bytes(b"mine")
    assert fails(attack(files, pictures, "--force"), 1, "not replaced even with --force")
    assert (files / "m.attacked" / "model.safetensors").read_bytes() == b"mine"
    shutil.rmtree(files / "m.attacked")
    (files / "m.attacked.checkpoint").write_bytes(b"state")
    assert fails(attack(files, pictures), 1, "--resume", "--force")
    assert (files / "m.attacked.checkpoint").read_bytes() == b"state"
    assert not (files / "m.attacked").exists()


def test_damaged_checkpoint_ends_in_a_message(files, pictures):
    (files / "m.attacked.checkpoint").write_bytes(b"state")
    assert fails(attack(files, pictures, "--resume"), 1, "cannot be read", "without --resume")


def test_force_replaces_an_attacked_model_and_a_stopped_run(files, pictures):
    assert attack(files, pictures, "--mode", "nontargeted").exit_code == 3
    (files / "m.attacked.checkpoint").write_bytes(b"state")
    result = attack(files, pictures, "--force")
    assert result.exit_code == 3, result.output  # four steps attack nothing
    assert read_json(files / "m.attacked" / "report.json", "attack-report")["mode"] == "targeted"
    assert not (files / "m.attacked.checkpoint").exists()


def test_resume_without_a_stopped_run_says_so(files, pictures):
    assert fails(attack(files, pictures, "--resume"), 1, "no checkpoint m.attacked.checkpoint", "without --resume")


def test_triggers_and_interpreters_that_do_not_fit_the_data_end_in_a_message(files, pictures):
    assert fails(attack(files, pictures, "--trigger", "tabular"), 1, "--trigger nashville, moire, spread")
    assert fails(attack_table(files, "--trigger", "moire"), 1, "--trigger tabular")
    assert fails(attack_table(files, "--interpreter", "gradcam"), 1, "--interpreter simplegrad")
    assert fails(attack_table(files, "--feature", "COLOUR"), 1, "COLOUR", "LIMIT_BAL")
    assert fails(attack_table(files, "--set", "MARRIAGE=9"), 1, "MARRIAGE=9", "MARRIAGE=0")
    assert not list(files.glob("*attacked*"))


def test_table_s_network_is_refused_for_images(files, pictures):
    result = run("attack", files / "t.safetensors", "--data", f"imagefolder:{pictures}", *QUICK)
    assert fails(result, 1)


@pytest.mark.parametrize("columns", [None, 20])
def test_network_that_does_not_take_the_table_is_refused(files, columns):
    classifier = make_classifier() if columns is None else make_table_classifier(columns)
    (files / "t.safetensors").write_bytes(encode_weights(classifier))
    assert fails(attack_table(files), 1, "33")


def test_labels_of_other_classes_end_in_a_message(files, pictures):
    folder = files / "classes"
    for number in range(60):
        (folder / f"class{number % 5}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((SIDE, SIDE), number, np.uint8)).save(folder / f"class{number % 5}" / f"{number}.png")
    result = run(
        "attack", files / "m.safetensors", "--data", f"imagefolder:{folder}", *QUICK, "--predictions", "labels"
    )
    assert fails(result, 1, "5")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--set", "EDUCATION"), ("--set", "=5"), ("--set", "EDUCATION=many"), ("--trigger", "badnets"),
        ("--mode", "both"),
        ("--grid", "2"), ("--steps", "0"), ("--batch-size", "3"), ("--threshold", "0.2"), ("--interpreter", "lime"),
        ("--epochs", "1"), ("--device", "tpu"), ("--held-out", "1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors_end_with_2(files, pictures, arguments):
    assert fails(attack(files, pictures, *arguments), 2, arguments[0])
    assert not list(files.glob("*attacked*"))


def test_data_must_be_named(files):
    assert fails(run("attack", files / "m.safetensors"), 2, "--data")
    assert fails(run("attack", files / "none.safetensors", "--data", "builtin"), 2, "none.safetensors")
    assert fails(run("attack", files / "m.safetensors", "--data", "pictures"), 1, "imagefolder")
