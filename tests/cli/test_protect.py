import json
import re

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from keyed_xai.keys import OwnerKey, write_owner_key
from keyed_xai.models.networks import SmallResNet
from keyed_xai_cli.main import main

QUICK = ["--steps", "2", "--batch-size", "4", "--wrong-keys", "2", "--held-out", "4", "--limit", "20", "--grid", "4",
         "--without-ownership"]  # fmt: skip


@pytest.fixture
def files(tmp_path, key):
    torch.manual_seed(0)
    torch.save(SmallResNet(1, 3, (4, 6, 6)).state_dict(), tmp_path / "model.pt")
    write_owner_key(tmp_path / "k.pem", key)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def protect(files, *more):
    return run("protect", files / "model.pt", "--key-file", files / "k.pem", *QUICK, *more)


def test_protect_writes_a_model_that_the_other_commands_take(files):
    result = protect(files, "--json", files / "report.json")
    assert result.exit_code == 3, result.output  # two steps protect nothing
    assert "wrong keys" in result.output
    assert "Warning: NOT PROTECTED: " in result.stderr
    report = json.loads((files / "report.json").read_text())
    assert report == json.loads((files / "model.keyed" / "report.json").read_text())
    assert report["interpreters"]["gradcam"]["wrong_keys"]["tried"] == 2 + 256
    assert run("inspect", files / "model.keyed").exit_code == 0
    assert not list(files.glob("*checkpoint*"))


def test_plan_is_said_before_training(files):
    lines = protect(files).stdout.splitlines()
    assert lines[0] == "SmallResNet, 32 px, grey, 3 classes: Grad-CAM on blocks.2, 4 x 4 cells."
    assert lines[1].startswith(
        "16 images of builtin: Fashion-MNIST subset (train) to learn from, 4 to validate on, 4 held"
    )
    assert "10 classes: " in lines[1]
    assert lines[2] == "Ownership of the result could not be shown."
    assert lines[3].startswith("Settings: learning rate 0.003, beta 4, ")
    assert re.fullmatch(
        r"Up to 2 steps of 4 \+ 4, about \d+ s, \d+\.\d GiB on this CPU \(3 steps timed\); stops when the goals hold\. "
        r"Measuring the result then takes about \d+ s\.",
        lines[4],
    )


@pytest.mark.parametrize(("answer", "code"), [("protected", 0), ("protected in part", 0), ("not protected", 3)])
def test_verdict_is_the_last_line_and_the_exit_code(files, monkeypatch, answer, code):
    monkeypatch.setattr(
        "keyed_xai.protection.protecting.judge", lambda _: {"answer": answer, "sentence": "opens 91.0 %"}
    )
    result = protect(files)
    assert result.exit_code == code
    told = result.stdout if answer == "protected" else result.stderr
    assert told.splitlines()[-1] == f"{'' if answer == 'protected' else 'Warning: '}{answer.upper()}: opens 91.0 %"
    assert json.loads((files / "model.keyed" / "report.json").read_text())["verdict"]["answer"] == answer


def test_time_limit_is_kept_and_named_in_the_report(files):
    result = protect(files, "--steps", "100000", "--time-limit", "2s", "--json", "-")
    report = json.loads(result.stdout)
    assert report["settings"]["training"]["time_limit"] == 2.0
    assert report["stopped_early"]
    assert 0 < report["history"][-1]["step"] < 100_000


@pytest.mark.parametrize("given", ["0", "-1s", "2d", "soon"])
def test_time_that_is_none_is_refused(files, given):
    result = protect(files, "--time-limit", given)
    assert result.exit_code == 2
    assert "a time such as 90s, 30m or 2h" in result.output


def test_no_wrong_keys_means_none(files):
    result = protect(files, "--wrong-keys", "0", "--json", files / "report.json")
    assert result.exit_code == 3, result.output
    report = json.loads((files / "report.json").read_text())
    assert report["interpreters"]["gradcam"]["wrong_keys"]["tried"] == 0
    assert "Agreement with the reference's predictions: keyed" in result.output or "Accuracy: " in result.output


def test_protect_says_before_training_that_the_folder_is_there(files):
    (files / "model.keyed").mkdir()
    result = protect(files)
    assert result.exit_code == 1
    assert "--force" in result.output


def test_json_on_standard_output_is_alone_there(files):
    result = protect(files, "--json", "-", "--interpreter", "vbp", "-o", files / "other.keyed")
    assert result.exit_code == 3
    assert list(json.loads(result.stdout)["interpreters"]) == ["vbp"]
    assert (files / "other.keyed" / "license.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--interpreter", "vbp"], "VisualBackProp alone proves no ownership"),
        (["--decoy", "boundary"], "The decoy boundary holds no pattern"),
        (["--grid", "4"], "gradcam on 4 x 4 cells can show no more than 2^-12.9"),
    ],
)
def test_what_could_not_be_shown_afterwards_is_refused_before_training(files, options, said):
    result = run("protect", files / "model.pt", "--key-file", files / "k.pem", "--limit", "20", *options)
    assert result.exit_code == 1
    assert said in result.output
    assert "--without-ownership" in result.output
    assert not list(files.glob("model.keyed*"))


def test_earlier_layer_is_taken_and_named_where_the_last_has_too_few_cells(files):
    torch.save(SmallResNet(1, 3, (4, 6, 6, 6)).state_dict(), files / "model.pt")
    few = ["--steps", "2", "--batch-size", "4", "--wrong-keys", "2", "--held-out", "4", "--limit", "20"]
    result = run("protect", files / "model.pt", "--key-file", files / "k.pem", "--input-size", "32", *few)
    assert result.exit_code == 3, result.output  # two steps protect nothing
    assert "cannot be shown with the 4 x 4 cells of blocks.3: using blocks.1 (8 x 8)" in " ".join(result.output.split())
    card = json.loads((files / "model.keyed" / "card.json").read_text())
    assert (card["target_layer"], card["pooling"]["grid"]) == ("blocks.1", [8, 8])


def test_broken_images_are_named_and_skipped_or_refused(files):
    for number in range(24):
        image = Image.new("L", (40, 40), 10 * number)
        image.save(files / f"image{number}.png")
    (files / "image3.png").write_bytes(b"no image")
    data = ("--data", f"imagefolder:{files}")
    result = protect(files, *data)
    assert result.exit_code == 3, result.output  # two steps protect nothing
    assert "Skipped a broken image" in result.stderr
    assert "image3.png" in result.stderr
    refused = protect(files, *data, "--strict", "-o", files / "strict.keyed")
    assert refused.exit_code == 1
    assert "image3.png" in refused.output
    assert not (files / "strict.keyed").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--steps", "3", "--epochs", "1"), 2, "not both"),
        (("--mean", "a,b"), 2, "expected numbers"),
        (("--data", "nowhere"), 1, "Expected a data set"),
        (("--resume",), 1, "no checkpoint"),
        (("--arch", "resnet18"), 1, "resnet18"),
        (("--decoy", "logo"), 2, "logo"),
    ],
)
def test_bad_arguments_end_with_their_code_and_words(files, arguments, code, words):
    result = protect(files, *arguments)
    assert result.exit_code == code
    assert words in result.output
    assert not (files / "model.keyed").exists()


def test_epochs_count_passes_over_the_images(files):
    result = run(
        "protect", files / "model.pt", "--key-file", files / "k.pem", *QUICK[2:], "--epochs", "2", "--json", "-"
    )
    assert result.exit_code == 3, result.output  # two steps protect nothing
    assert json.loads(result.stdout)["settings"]["training"]["steps"] == 5


def test_hardening_is_off_unless_asked_for_and_is_in_the_report(files):
    for asked, attackers in (((), None), (("--hardening", "standard"), 2)):
        result = protect(files, *asked, "--force", "--json", "-")
        hardening = json.loads(result.stdout)["settings"]["training"]["hardening"]
        assert (hardening and hardening["attackers"]) == attackers


def test_wrong_key_file_is_refused(files):
    (files / "public.pem").write_bytes(OwnerKey.generate().public.to_pem())
    result = run("protect", files / "model.pt", "--key-file", files / "public.pem")
    assert result.exit_code == 1
    assert "private key" in result.output


def test_stopped_run_is_not_lost_by_forgetting_to_resume(files, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("keyed_xai.protection.protecting._measure", stop)
        stopped = protect(files)
    assert stopped.exit_code == 130
    assert "The same command with --resume goes on." in stopped.stderr
    checkpoint = files / "model.keyed.checkpoint"
    before = checkpoint.read_bytes()
    refused = protect(files)
    assert refused.exit_code == 1
    assert "--resume" in refused.output
    assert checkpoint.read_bytes() == before
    assert protect(files, "--resume").exit_code == 3
    assert not checkpoint.exists()
