"""`keyed-xai explain`: options, exit codes, files and words."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from keyed_xai.artifacts.documents import validate
from keyed_xai.keys import write_owner_key
from keyed_xai_cli import main as cli
from tests.marked import OWNER, STRANGER, unmarked_classifier, write_folder


@pytest.fixture
def place(tmp_path):
    """A protected model, two keys, and a folder with two images."""
    write_folder(
        tmp_path / "m.keyed",
        unmarked_classifier(),
        interpreters=("gradcam", "vbp"),
        thresholds={"gradcam": 0.5, "vbp": 0.5},
        label_names=("cat", "dog", "cow"),
    )
    write_owner_key(tmp_path / "k.pem", OWNER)
    write_owner_key(tmp_path / "other.pem", STRANGER)
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for name in ("one.png", "two.png"):
        Image.fromarray(generator.integers(50, 200, (40, 32, 3), np.uint8)).save(tmp_path / "photos" / name)
    return tmp_path


def run(place, *arguments, model="m.keyed"):
    command = ["explain", place / model, *arguments, "-o", place / "out", "--device", "cpu"]
    return CliRunner().invoke(cli.main, [str(argument) for argument in command])


def test_key_opens_the_maps_of_files_and_folders(place):
    before = (place / "photos" / "one.png").read_bytes()
    result = run(place, place / "photos", "--key-file", place / "k.pem", "--json", place / "e.json")
    assert result.exit_code == 0, result.output
    document = json.loads((place / "e.json").read_text())
    validate(document, "explain", origin="it")
    assert document["key_id"] == OWNER.public.key_id
    assert [entry["interpreters"] for entry in document["images"]] == [["gradcam", "vbp"]] * 2
    assert {path.name for path in (place / "out").iterdir()} == {
        f"{stem}.{ending}" for stem in ("one", "two") for ending in ("npz", "png")
    }
    assert "Pictures and maps of 2 images" in result.output
    assert OWNER.public.key_id[:16] in result.output
    assert (place / "photos" / "one.png").read_bytes() == before


def test_what_was_done_to_a_file_of_weights_is_said(place):
    classifier = unmarked_classifier()
    networks = {"model": classifier, "model_ema": unmarked_classifier()}
    states = {
        key: {f"module.{name}": t for name, t in each.network.state_dict().items()} for key, each in networks.items()
    }
    torch.save(states, place / "w.pt")
    result = run(place, place / "photos", model="w.pt")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[:2] == [
        "The weights under model are used; the file also has model_ema (averaged), which --weights ema takes.",
        f"Taken as {classifier.architecture}: the prefix module. was taken off.",
    ]
    chosen = run(place, place / "photos", "--weights", "ema", model="w.pt")
    assert "The averaged weights (EMA) under model_ema are used" in chosen.stderr
    refused = run(place, place / "photos", "--weights", "teacher", model="w.pt")
    assert refused.exit_code == 1
    assert "no weights called 'teacher'" in refused.stderr


def test_key_changes_the_maps(place):
    found = []
    for options in ([], ["--key-file", place / "k.pem"]):
        run(place, place / "photos" / "one.png", *options, "--interpreter", "gradcam")
        with np.load(place / "out" / "one.npz") as arrays:
            found.append({name: arrays[name] for name in arrays.files})
    assert set(found[0]) == {"gradcam", "logits", "target"}
    assert not np.allclose(found[0]["logits"], found[1]["logits"])


def test_without_a_key_it_says_that_maps_are_a_decoy(place):
    result = run(place, place / "photos" / "one.png", "--json", "-")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["key_id"] is None
    assert "a decoy, not an explanation" in result.stderr


def test_keyed_image_and_target(place):
    result = run(
        place, place / "photos" / "one.png", "--key-file", place / "k.pem", "--interpreter", "gradcam", "--write-keyed",
        "--target", "COW",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in (place / "out").iterdir()} == {"one.npz", "one.png", "one.keyed.png"}
    with np.load(place / "out" / "one.npz") as arrays:
        assert int(arrays["target"]) == 2
    assert "cow (." in result.output


def test_unknown_class_is_told_the_names_near_it(place):
    result = run(place, place / "photos", "--target", "cot")
    assert result.exit_code == 2
    assert "cow (2), cat (0)" in result.stderr


def test_folders_of_two_models_do_not_meet(place, monkeypatch):
    torch.save(unmarked_classifier().network.state_dict(), place / "m.pt")
    for model in ("m.pt", "m.keyed"):
        arguments = ["explain", str(place / model), str(place / "photos" / "one.png")]
        assert CliRunner().invoke(cli.main, arguments).exit_code == 0
    monkeypatch.chdir(place / "m.keyed")
    assert CliRunner().invoke(cli.main, ["explain", ".", str(place / "photos" / "two.png")]).exit_code == 0
    assert {path.name for path in (place / "m.keyed.maps").iterdir()} == {"one.npz", "one.png", "two.npz", "two.png"}
    assert {path.name for path in (place / "m.pt.maps").iterdir()} == {"one.npz", "one.png"}


def test_help_warns_of_keyed_images():
    result = CliRunner().invoke(cli.main, ["explain", "--help"])
    assert result.exit_code == 0
    assert "bearer credential" in result.output


def test_key_that_the_licence_does_not_name_is_refused(place):
    result = run(place, place / "photos", "--key-file", place / "other.pem")
    assert result.exit_code == 1
    assert "maps stay closed" in result.stderr
    assert not (place / "out").exists()
    allowed = run(place, place / "photos", "--key-file", place / "other.pem", "--allow-other-key")
    assert allowed.exit_code == 0
    assert "Warning" in allowed.stderr


def test_broken_image_is_1_with_the_others_done(place):
    (place / "photos" / "broken.jpg").write_bytes(b"\xff\xd8\xff no")
    result = run(place, place / "photos")
    assert result.exit_code == 1
    assert "broken.jpg" in result.stderr
    assert (place / "out" / "two.npz").exists()


def test_changed_model_is_refused(place):
    (place / "m.keyed" / "report.json").write_text("{}")
    result = run(place, place / "photos")
    assert result.exit_code == 1
    assert "changed after the licence was signed" in result.stderr


def test_interpreter_that_was_not_protected_gets_a_note(place):
    result = run(place, place / "photos" / "one.png", "--interpreter", "simplegrad")
    assert result.exit_code == 0
    assert "simplegrad was not protected" in result.output


def test_bare_file_of_weights_is_explained_too(place):
    torch.save(unmarked_classifier().network.state_dict(), place / "m.pt")
    result = run(place, place / "photos" / "one.png", model="m.pt")
    assert result.exit_code == 0, result.output
    assert (place / "out" / "one.png").exists()
    keyed = run(place, place / "photos" / "one.png", "--key-file", place / "k.pem", model="m.pt")
    assert "default trigger" in keyed.stderr


def test_many_images_get_a_bar_only_on_a_terminal(place):
    for number in range(6):
        (place / "photos" / f"{number}.png").write_bytes((place / "photos" / "one.png").read_bytes())
    result = run(place, place / "photos")
    assert result.exit_code == 0
    assert result.stderr == ""


@pytest.mark.parametrize(
    "options",
    [["--write-keyed"], ["--allow-other-key"], ["--target", "3"], ["--target", "-1"], ["/no/such.png"]],
    ids=str,
)
def test_usage_error_is_2(place, options):
    assert run(place, place / "photos", *options).exit_code == 2
