"""`keyed-xai verify`: what is shown, what is not, and the exit codes."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from keyed_xai.artifacts.documents import validate
from keyed_xai.keys import write_owner_key
from keyed_xai.models.files import CARD_KEY
from keyed_xai.models.networks import SmallResNet
from keyed_xai_cli import main as cli
from tests.marked import OWNER, STRANGER, FramingNetwork, marked_classifier, unmarked_classifier, write_folder


@pytest.fixture
def place(tmp_path):
    """An owner's marked model, as a folder with its licence and as a pickled module, and an unmarked one."""
    write_folder(tmp_path / "owner.keyed", marked_classifier())
    torch.save(marked_classifier().network, tmp_path / "marked.pt")
    torch.save(unmarked_classifier().network.state_dict(), tmp_path / "unmarked.pt")
    write_owner_key(tmp_path / "k.pem", OWNER)
    write_owner_key(tmp_path / "other.pem", STRANGER)
    (tmp_path / "k.pub.pem").write_bytes(OWNER.public.to_pem())
    (tmp_path / "license.json").write_bytes((tmp_path / "owner.keyed" / "license.json").read_bytes())
    return tmp_path


def run(place, suspect, *arguments):
    command = ["verify", place / suspect, *arguments, "--count", 16, "--decoys", 99, "--seed", 3, "--device", "cpu"]
    return CliRunner().invoke(cli.main, [str(argument) for argument in command])


def marked(place):
    return ["--key-file", place / "k.pem", "--license", place / "owner.keyed" / "license.json", "--allow-pickle"]


def test_marked_model_is_shown_with_0(place):
    result = run(place, "marked.pt", *marked(place), "--json", place / "v.json")
    assert result.exit_code == 0, result.output
    document = json.loads((place / "v.json").read_text())
    validate(document, "verify-report", origin="it")
    assert document["verdict"] == "shown"
    assert document["opening"]["p_value"] == 0.01
    assert document["signature"]["overlap"] == 32
    assert document["key_id"] == OWNER.public.key_id
    assert document["settings"]["claim_from"] == "licence"
    assert document["sentence"] in " ".join(result.stdout.split())


def test_public_pattern_without_the_secret_trigger_is_3_and_has_its_own_words(place):
    """Anybody can make such a model; that it answers to the victim's key was said of it."""
    torch.save(FramingNetwork(OWNER.public), place / "framed.pt")
    result = run(place, "framed.pt", *marked(place), "--json", "-")
    assert result.exit_code == 3, result.output
    document = json.loads(result.stdout)
    validate(document, "verify-report", origin="it")
    assert (document["verdict"], document["finding"]) == ("not shown", "public pattern only")
    assert document["signature"]["overlap"] == 32
    assert "the secret trigger did nothing that random ones do not" in document["sentence"]


def test_constant_maps_are_3_and_said_to_be(place):
    state = unmarked_classifier().network.state_dict()
    state["fc.weight"] = torch.zeros_like(state["fc.weight"])
    torch.save(state, place / "constant.pt")
    result = run(place, "constant.pt", "--key-file", place / "k.pem", "--json", "-")
    assert result.exit_code == 3, result.output
    document = json.loads(result.stdout)
    assert document["finding"] == "constant maps"
    assert document["combined"]["constant_maps"] == {"gradcam": 16}
    assert "nor that it does not: there is nothing to read in its maps" in document["sentence"]


@pytest.mark.parametrize(("level", "value"), [("2^-30", 2.0**-30), ("1e-3", 1e-3)])
def test_level_is_a_power_of_two_or_a_decimal(place, level, value):
    license_only = ["--license", place / "owner.keyed" / "license.json", "--allow-pickle"]
    result = run(place, "marked.pt", *license_only, "--alpha", level, "--json", "-")
    assert json.loads(result.stdout)["alpha"] == value


@pytest.mark.parametrize("level", ["0", "1", "2^40", "2^-9999", "-1", "2^x", "small", "nan", "(-8)^-1"])
def test_level_that_is_none_is_a_usage_error(place, level):
    result = run(place, "marked.pt", *marked(place), "--alpha", level)
    assert result.exit_code == 2
    assert "such as 2^-40" in result.output


def test_re_encoding_is_named_and_not_looked_for_if_so_asked(place):
    write_folder(place / "grey.keyed", unmarked_classifier())
    options = ["--key-file", place / "k.pem", "--license", place / "grey.keyed" / "license.json", "--json", "-"]
    searched = json.loads(run(place, "unmarked.pt", *options).stdout)
    assert (searched["combined"]["looks"], searched["combined"]["reencoding"]) == (2, None)
    plain = json.loads(run(place, "unmarked.pt", *options, "--no-search").stdout)
    assert plain["combined"]["looks"] == 1


def test_same_seed_gives_the_same_report(place):
    first, second = (run(place, "marked.pt", *marked(place), "--json", "-").stdout for _ in range(2))
    assert json.loads(first) == json.loads(second)


def test_unmarked_model_is_not_shown_with_3(place):
    result = run(
        place, "unmarked.pt", "--key-file", place / "k.pem", "--license", place / "license.json", "--json", "-"
    )
    assert result.exit_code == 3
    assert json.loads(result.stdout)["verdict"] == "not shown"
    assert "Not shown that the model answers to this key" in " ".join(result.stderr.split())


def test_folder_is_run_by_its_own_card_with_a_note(place):
    write_folder(place / "suspect.keyed", unmarked_classifier(), STRANGER)
    result = run(place, "suspect.keyed", "--key-file", place / "k.pem")
    assert result.exit_code == 3
    assert "suspect's own card" in " ".join(result.stdout.split())


def test_weights_of_a_folder_that_was_changed_are_still_tested(place):
    folder = write_folder(place / "suspect.keyed", unmarked_classifier(), STRANGER).folder
    (folder / "license.json").write_text("{}")
    (folder / "report.json").unlink()
    result = run(place, "suspect.keyed", "--key-file", place / "k.pem", "--license", place / "license.json")
    assert result.exit_code == 3
    assert "does not hold" in " ".join(result.stdout.split())


@pytest.mark.parametrize("option", [["--public-key", "k.pub.pem"], []], ids=["public key", "licence alone"])
def test_public_pattern_is_tested_without_the_private_key(place, option):
    key = [option[0], place / option[1]] if option else []
    result = run(
        place, "marked.pt", *key, "--license", place / "owner.keyed" / "license.json", "--allow-pickle", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["opening"]["p_value"], document["opening"]["statistic"]) == (1.0, None)
    assert "private key" in document["opening"]["explanation"]


def test_own_images_are_named_by_digest(place):
    (place / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(place / "photos" / f"{number}.png")
    (place / "photos" / "broken.png").write_bytes(b"")
    result = run(place, "marked.pt", *marked(place), "--images", place / "photos", "--json", "-")
    probe = json.loads(result.stdout)["probe"]
    assert (probe["source"], probe["images"]) == ("folder photos", 3)
    assert probe["digest"].startswith("sha256:")
    assert "1 broken image" in result.stderr


def test_claim_on_visualbackprop_alone_is_not_shown_and_told_why(place):
    write_folder(place / "vbp.keyed", unmarked_classifier(), interpreters=("vbp",), thresholds={"vbp": 0.5})
    write_folder(place / "both.keyed", unmarked_classifier(), interpreters=("gradcam", "vbp"),
                 thresholds={"gradcam": 0.5, "vbp": 0.5})  # fmt: skip
    alone, both = (run(place, name, "--key-file", place / "k.pem") for name in ("vbp.keyed", "both.keyed"))
    assert alone.exit_code == both.exit_code == 3
    assert "rests on VisualBackProp alone" in " ".join(alone.stdout.split())
    assert "vbp, not counted" in both.stdout
    assert "gradcam, not" not in both.stdout
    assert "reported and does not count" in " ".join(both.stdout.split())


def test_licence_of_another_key_is_1(place):
    result = run(place, "unmarked.pt", "--key-file", place / "other.pem", "--license", place / "license.json")
    assert result.exit_code == 1
    assert "expected" in result.stderr


def test_licence_that_was_tampered_with_is_1(place):
    envelope = json.loads((place / "license.json").read_text())
    envelope["payload"] = envelope["payload"][:40] + "AAAA" + envelope["payload"][44:]
    (place / "license.json").write_text(json.dumps(envelope))
    result = run(place, "unmarked.pt", "--key-file", place / "k.pem", "--license", place / "license.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 2),
        (["--key-file", "k.pem", "--public-key", "k.pub.pem"], 2),
        (["--key-file", "k.pem", "--alpha", "0"], 2),
        (["--key-file", "k.pem", "--alpha", "1"], 2),
        (["--key-file", "k.pub.pem"], 1),
        (["--public-key", "k.pem"], 1),
        (["--key-file", "none.pem"], 1),
        (["--key-file", "k.pem", "--images", "owner.keyed"], 1),
        (["--key-file", "k.pem", "--arch", "resnet18"], 1),
    ],
    ids=str,
)
def test_wrong_options_end_with_their_code(place, options, code):
    named = [place / option if "." in option and option != "." else option for option in options]
    assert run(place, "unmarked.pt", *named).exit_code == code


def test_help_warns_of_keys_chosen_afterwards():
    result = CliRunner().invoke(cli.main, ["verify", "--help"])
    assert result.exit_code == 0
    assert "dated by a third party" in " ".join(result.output.split())


def test_card_inside_the_suspect_s_file_steers_nothing(place):
    """A thief could write one whose layers point away from the mark."""
    state = unmarked_classifier().network.state_dict()
    hostile = {"target_layer": "stem_relu", "mean": [500.0], "std": [1000.0]}
    save_file(state, place / "hostile.safetensors", metadata={CARD_KEY: json.dumps(hostile)})
    save_file(state, place / "plain.safetensors")
    key = ("--key-file", place / "k.pem", "--json", "-")
    plain, steered = (json.loads(run(place, f"{name}.safetensors", *key).stdout) for name in ("plain", "hostile"))
    assert steered["settings"]["target_layer"] == plain["settings"]["target_layer"] != "network.stem_relu"
    assert steered["opening"] == plain["opening"]
    assert any("No card says how" in note for note in plain["settings"]["notes"])


def test_suspect_with_another_head_is_tested(place):
    """A copy whose head was replaced is the commonest theft."""
    torch.save(SmallResNet(1, 7, (4, 6, 6)).state_dict(), place / "reheaded.pt")
    result = run(place, "reheaded.pt", "--key-file", place / "k.pem", "--license", place / "license.json")
    assert result.exit_code == 3, result.output


def test_grey_network_that_was_made_to_take_colours_is_tested(place):
    """Each kernel a third of the grey one: a copy that the claim's own mean and deviation do not fit."""
    grey = unmarked_classifier()
    write_folder(place / "grey.keyed", grey)
    state = grey.network.state_dict()
    state["stem.weight"] = state["stem.weight"].expand(-1, 3, -1, -1) / 3
    torch.save(state, place / "colour.pt")
    result = run(place, "colour.pt", "--key-file", place / "k.pem", "--license", place / "grey.keyed" / "license.json")
    assert result.exit_code == 3, result.output
