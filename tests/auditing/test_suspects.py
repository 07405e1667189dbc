"""What is audited, and what is known about it: protected folders, attacked folders, files of weights."""

import json
from dataclasses import replace

import pytest

from keyed_xai.artifacts.opening import default_trigger
from keyed_xai.artifacts.weights import encode_weights
from keyed_xai.auditing.suspects import Suspect, open_suspect
from keyed_xai.backdoors.attacking import AttackSettings, run_attack, write_attack
from keyed_xai.errors import ArtifactError, KeyFormatError, ModelError
from keyed_xai.training import PAPER_SETTINGS
from keyed_xai.triggers.public import published_spread
from tests.backdoors.test_attacking import make_classifier, make_images
from tests.marked import OWNER, STRANGER, card_of, unmarked_classifier, write_folder
from tests.threatened import reference


@pytest.fixture
def place(tmp_path):
    classifier = unmarked_classifier()
    write_folder(tmp_path / "m.keyed", classifier)
    (tmp_path / "m.safetensors").write_bytes(encode_weights(classifier))
    (tmp_path / "other.safetensors").write_bytes(encode_weights(make_classifier()))
    (tmp_path / "small.safetensors").write_bytes(encode_weights(reference()))
    return tmp_path


def test_protected_folder_is_opened_with_what_its_card_says(place):
    suspect = open_suspect(place / "m.keyed", key=OWNER, reference=place / "m.safetensors")
    card = card_of(unmarked_classifier())
    assert (suspect.name, suspect.kind, suspect.inverted, suspect.signature) == ("m.keyed", "keyed", True, True)
    assert (suspect.interpreters, suspect.grid) == (card.interpreters, card.grid)
    assert suspect.parameters == card.trigger
    assert suspect.trigger is not None
    assert suspect.reference.classes == suspect.classifier.classes
    for secret in (OWNER.derive_seed("spread").hex(), bytes([1]).hex() * 32, "textures"):
        assert secret not in repr(suspect)


def test_protected_folder_without_a_key_has_no_trigger(place):
    suspect = open_suspect(place / "m.keyed")
    assert (suspect.kind, suspect.key, suspect.trigger, suspect.reference) == ("keyed", None, None, None)


def test_decoy_that_is_no_signature_is_known(place):
    write_folder(place / "b.keyed", unmarked_classifier(), decoy="boundary")
    assert not open_suspect(place / "b.keyed", key=OWNER).signature


def test_another_owners_key_is_refused(place):
    with pytest.raises(KeyFormatError, match=rf"{STRANGER.public.key_id[:16]}.*Give the owner's"):
        open_suspect(place / "m.keyed", key=STRANGER)


def test_file_is_plain_or_with_a_key_protected_by_default_settings(place):
    assert open_suspect(place / "m.safetensors").kind == "plain"
    suspect = open_suspect(place / "m.safetensors", key=OWNER)
    assert (suspect.kind, suspect.parameters) == ("keyed", default_trigger(suspect.classifier.input))


def test_reference_of_another_task_is_refused(place):
    with pytest.raises(ModelError, match="of the same task"):
        open_suspect(place / "m.safetensors", reference=place / "small.safetensors")
    with pytest.raises(ModelError, match="surrogate"):
        open_suspect(place / "m.safetensors", surrogate=place / "small.safetensors")


@pytest.mark.parametrize("inverted", [False, True])
def test_attacked_folder_is_opened_with_its_public_trigger(place, inverted):
    training = replace(PAPER_SETTINGS, steps=2, batch_size=4, order="inverted" if inverted else "forward")
    settings = AttackSettings(inverted=inverted, grid=(4, 4), training=training, held_out_images=8)
    attack = run_attack(make_classifier(), make_images(30, 0), make_images(8, 1), settings)
    write_attack(attack, place / "m.attacked")
    suspect = open_suspect(place / "m.attacked", reference=place / "other.safetensors")
    assert (suspect.kind, suspect.inverted, suspect.grid) == ("attacked", inverted, (4, 4))
    assert suspect.interpreters == ("gradcam",)
    images, _ = make_images(2, 3).batch([0, 1])
    assert (suspect.trigger.apply(images) == published_spread().apply(images)).all()
    with pytest.raises(KeyFormatError, match="leave out the key"):
        open_suspect(place / "m.attacked", key=OWNER)


@pytest.mark.parametrize("grid", [["4", 4], [4, 10**6], [4], [True, 4], "4x4"])
def test_attacked_folder_with_an_odd_grid_is_refused(place, grid):
    training = replace(PAPER_SETTINGS, steps=2, batch_size=4, order="forward")
    settings = AttackSettings(grid=(4, 4), training=training, held_out_images=8)
    attack = run_attack(make_classifier(), make_images(30, 0), make_images(8, 1), settings)
    write_attack(attack, place / "m.attacked")
    report = json.loads((place / "m.attacked" / "report.json").read_text())
    report["settings"]["grid"] = grid
    (place / "m.attacked" / "report.json").write_text(json.dumps(report))
    with pytest.raises(ArtifactError, match="grid as rows and columns from 1 to 64"):
        open_suspect(place / "m.attacked")


def test_kind_is_one_of_three():
    with pytest.raises(ValueError, match="kind"):
        Suspect(name="m", kind="odd", classifier=unmarked_classifier())
