"""Protecting a small network: what is written and reported, what is refused, and how a stopped run goes on."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.artifacts.documents import validate
from keyed_xai.artifacts.folder import read_model_folder
from keyed_xai.artifacts.opening import default_trigger, open_model
from keyed_xai.data import ImageData, ImageSize
from keyed_xai.errors import ArtifactError, TrainingError
from keyed_xai.keys import ByteStream, OwnerKey
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet
from keyed_xai.protection.protecting import ProtectSettings, choose_recipe, choose_trigger, protect, write_protection
from keyed_xai.training import TrainingSettings
from keyed_xai.training.batch_norm import batch_norms
from keyed_xai.triggers import Spread
from tests.heard import Heard, StopAt

QUICK = TrainingSettings(steps=6, batch_size=4, validate_every=3, warmup_steps=1)
SETTINGS = ProtectSettings(
    grid=(4, 4),
    ownership=False,
    training=QUICK,
    wrong_keys=3,
    flipped_keys=2,
    held_out_images=8,
    validation_images=4,
)


def make_images(count, seed, labelled=True):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 1, 24, 24), dtype=np.uint8)
    return ImageData(
        images=pixels,
        labels=np.arange(count) % 3 if labelled else None,
        classes=("a", "b", "c"),
        source=f"noise {seed}",
    )


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    spec = InputSpec(1, 24, 24, mean=(0.5,), std=(0.25,))
    network = SmallResNet(1, 3, (4, 6, 6)).eval()
    return wrap_network(network, input=spec, architecture="SmallResNet", source="keyed_xai").eval()


@pytest.fixture(scope="module")
def run(classifier):
    heard = Heard()
    train, held_out = make_images(24, 0), make_images(10, 1)
    return protect(classifier, OwnerKey.from_raw(bytes(range(32))), train, held_out, SETTINGS, progress=heard), heard


def test_report_fits_its_schema_and_counts_what_was_asked(run):
    protection, _ = run
    validate(protection.report, "protect-report", origin="the report")
    figures = protection.report["interpreters"]["gradcam"]
    assert figures["wrong_keys"]["tried"] == 5
    assert protection.report["data"]["held_out"]["images"] == 8
    assert protection.report["accuracy"]["measured_against"] == "reference predictions"  # its labels are noise
    assert protection.card.label_names == ()
    assert len(protection.report["history"]) == 2


def test_plan_steps_and_wrong_keys_are_told(run):
    _, heard = run
    assert heard.lines[0].startswith("SmallResNet,")
    assert heard.steps == [*(("training", step, 6) for step in range(1, 7)), ("wrong keys", 5, 5)]


def test_reference_is_left_as_it_was(classifier, run):
    protection, _ = run
    torch.manual_seed(0)
    fresh = SmallResNet(1, 3, (4, 6, 6)).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in classifier.network.state_dict().items())
    assert any(
        not torch.equal(tensor, fresh[name]) for name, tensor in protection.classifier.network.state_dict().items()
    )


def test_folder_loads_and_holds_no_secret(run, key, tmp_path):
    protection, _ = run
    write_protection(protection, tmp_path / "m.keyed", key)
    read_model_folder(tmp_path / "m.keyed", expected=key.public)
    loaded, card = open_model(tmp_path / "m.keyed")
    images = torch.rand(2, 1, 24, 24)
    assert torch.allclose(loaded(images), protection.classifier(images), atol=1e-6)
    assert card == protection.card
    seed = key.derive_seed("spread")
    texture = Spread().derive(ByteStream(seed)).textures.numpy()
    secrets = [seed, seed.hex().encode(), bytes(range(32)), texture.tobytes(), (texture * 8 / 255).tobytes()]
    for path in (tmp_path / "m.keyed").iterdir():
        assert not any(secret in path.read_bytes() for secret in secrets), path.name


def test_no_picture_shows_a_keyed_image(classifier, run, key, monkeypatch):
    shown, blended = [], []
    monkeypatch.setattr("keyed_xai.reporting.pictures.strip", lambda rows, **_: shown.extend(rows) or b"")
    monkeypatch.setattr("keyed_xai.reporting.pictures.blend", lambda image, each: blended.append(image) or each)
    held_out = make_images(10, 1)
    protect(classifier, key, make_images(24, 0), held_out, replace(SETTINGS, wrong_keys=0, flipped_keys=0))
    panels = [*blended, *(panel for _, row in shown for panel in row if panel.ndim == 3)]
    assert len(blended) == 4 * len(shown)
    clean, _ = held_out.batch(np.arange(len(held_out)))
    assert panels
    assert all(any(np.array_equal(panel, image) for image in clean.numpy()) for panel in panels)


def test_killed_run_resumes_to_the_same_weights(classifier, run, key, tmp_path):
    whole, _ = run
    checkpoint = tmp_path / "c"
    data = make_images(24, 0), make_images(10, 1)

    with pytest.raises(KeyboardInterrupt):
        protect(classifier, key, *data, SETTINGS, checkpoint=checkpoint, progress=StopAt(5, KeyboardInterrupt))
    assert checkpoint.exists()
    resumed = protect(classifier, key, *data, SETTINGS, checkpoint=checkpoint, resume=True)
    expected = whole.classifier.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.classifier.state_dict().items())
    assert checkpoint.exists()  # until the model is on the disk
    write_protection(resumed, tmp_path / "m.keyed", key, checkpoint=checkpoint)
    assert not checkpoint.exists()


def test_checkpoint_of_other_settings_is_refused(classifier, key, tmp_path):
    checkpoint = tmp_path / "c"
    data = make_images(24, 0), make_images(10, 1)

    with pytest.raises(KeyboardInterrupt):
        protect(classifier, key, *data, SETTINGS, checkpoint=checkpoint, progress=StopAt(4, KeyboardInterrupt))
    with pytest.raises(ArtifactError, match="another run"):
        protect(classifier, key, *data, replace(SETTINGS, amplitude=9.0), checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize("decoy", ["boundary", "nontargeted"])
def test_other_decoys_run(classifier, key, decoy):
    settings = replace(SETTINGS, decoy=decoy, interpreters=("vbp", "simplegrad"))
    protection = protect(
        classifier, key, make_images(24, 0, labelled=False), make_images(10, 1, labelled=False), settings
    )
    validate(protection.report, "protect-report", origin="the report")
    assert protection.card.decoy == decoy
    assert protection.report["accuracy"]["measured_against"] == "reference predictions"
    assert ("decoy_correlation" in protection.report["interpreters"]["vbp"]) == (decoy == "boundary")


@pytest.mark.parametrize("learnt_from", [("a", "b", "c"), (), ("v", "w", "x", "y", "z"), ("x", "y", "z")])
def test_labels_count_where_the_reference_agrees_with_them(classifier, key, learnt_from):
    """Whatever classes the images have that it is protected with: those need no labels."""
    train = replace(make_images(24, 0), classes=learnt_from, **({} if learnt_from else {"labels": None}))
    held_out = make_images(10, 1)
    images, _ = held_out.batch(np.arange(10))
    with torch.no_grad():
        predicted = classifier(images).argmax(1).numpy()
    agreeing = replace(held_out, labels=predicted)
    protection = protect(classifier, key, train, agreeing, replace(SETTINGS, wrong_keys=0, flipped_keys=0))
    assert protection.report["accuracy"]["measured_against"] == "labels"
    assert protection.report["accuracy"]["reference"] == 1
    assert protection.card.label_names == ("a", "b", "c")


def test_another_reference_does_not_go_on_with_a_checkpoint(classifier, key, tmp_path):
    checkpoint = tmp_path / "c"
    data = make_images(24, 0), make_images(10, 1)

    with pytest.raises(KeyboardInterrupt):
        protect(classifier, key, *data, SETTINGS, checkpoint=checkpoint, progress=StopAt(4, KeyboardInterrupt))
    spec = replace(classifier.input, mean=(0.1,))
    other = wrap_network(classifier.network, input=spec, architecture="SmallResNet", source="keyed_xai")
    with pytest.raises(ArtifactError, match="another run"):
        protect(other, key, *data, SETTINGS, checkpoint=checkpoint, resume=True)
    with pytest.raises(ArtifactError, match="another run"):
        protect(classifier, key, make_images(24, 5), data[1], SETTINGS, checkpoint=checkpoint, resume=True)


def test_what_cannot_work_is_refused_before_training(classifier, key):
    data = make_images(24, 0), make_images(10, 1)
    by_labels = replace(SETTINGS, training=replace(QUICK, predictions="labels"))
    two_classes = ImageData(images=data[0].images, labels=np.arange(24) % 2, classes=("a", "b"), source="noise")
    with pytest.raises(TrainingError, match="3 classes; these have 2 classes"):
        protect(classifier, key, two_classes, data[1], by_labels)
    with pytest.raises(TrainingError, match="no labels"):
        protect(classifier, key, make_images(24, 0, labelled=False), data[1], by_labels)
    with pytest.raises(TrainingError, match="--tile 32 or less"):
        protect(classifier, key, *data, replace(SETTINGS, tile=64))


def test_too_few_images_are_refused(classifier, key):
    with pytest.raises(TrainingError, match="at least 10 training images, got 6"):
        protect(classifier, key, make_images(6, 0), make_images(10, 1), SETTINGS)
    with pytest.raises(TrainingError, match="at least 2 held-out images, got 1"):
        protect(classifier, key, make_images(24, 0), make_images(1, 1), SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpreters": ()}, "got none"),
        ({"interpreters": ("gradcam", "lime")}, "interpreters: expected"),
        ({"interpreters": ("vbp", "vbp")}, "different names"),
        ({"decoy": "logo"}, "decoy: expected"),
        ({"trigger": "sepia"}, "trigger: expected"),
        ({"grid": (2, 8)}, "grid: expected"),
        ({"wrong_keys": -1}, "wrong_keys"),
        ({"held_out_images": 1}, "held_out_images"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_recipe_smooths_for_simplegrad_only(classifier):
    images = make_images(24, 0)
    assert choose_recipe(classifier, ("gradcam", "vbp"), images).smoothing is None
    assert choose_recipe(classifier, ("simplegrad",), images).smoothing == 8.0


@pytest.mark.parametrize(
    ("change", "side", "expected"),
    [
        ({}, 24, ("spread", 8.0, 32, 1)),
        ({}, 63, ("spread", 8.0, 32, 1)),
        ({}, 64, ("spread", 5.0, 32, 2)),
        ({"tile": 24}, 64, ("spread", 8.0, 24, 1)),
        ({"tile": 64}, 224, ("spread", 5.0, 64, 2)),
        ({"tile": 64}, 112, ("spread", 8.0, 64, 1)),
        ({"amplitude": 3.0}, 224, ("spread", 3.0, 32, 2)),
        ({"version": 1}, 224, ("spread", 8.0, 32, 1)),
        ({"version": 2}, 24, ("spread", 5.0, 32, 2)),
        ({"trigger": "moire"}, 224, ("moire", 5.0, 32, 1)),
    ],
)
def test_trigger_fits_the_images(change, side, expected):
    """Version 2 needs two tiles on either side, of 32 pixels at least."""
    size = ImageSize(3, side, side + 40)
    chosen = choose_trigger(replace(SETTINGS, **change), size)
    assert (chosen.family, chosen.amplitude, chosen.tile, chosen.version) == expected
    if not change:
        assert chosen == default_trigger(size)  # what a claim without a licence is tested by


def test_card_and_report_say_which_trigger_was_chosen(run):
    protection, _ = run
    assert protection.card.trigger == default_trigger(ImageSize(1, 24, 24))
    settings = protection.report["settings"]
    assert (settings["amplitude"], settings["version"], protection.report["trigger"]["amplitude"]) == (8.0, 1, 8.0)


def test_network_of_many_classes_or_of_other_images_is_changed_gently(classifier):
    classifier, images = copy.deepcopy(classifier), make_images(24, 0)
    usual, norms = TrainingSettings(), batch_norms(classifier)
    for norm in norms:
        norm.running_mean.fill_(9.0)  # as of images of another kind: no channel outlives it
        norm.momentum = None
    classifier.network.fc.weight.data *= -100 * classifier.network.fc.bias.sign()[:, None]
    gentle = choose_recipe(classifier, ("gradcam",), images)
    assert gentle.batch_norm == "frozen"
    assert gentle.learning_rate < usual.learning_rate / 10
    with torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
        classifier.train()(images.batch(np.arange(24))[0])
    assert choose_recipe(classifier.eval(), ("gradcam",), images) == usual
    without = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).eval()
    without = wrap_network(without, input=classifier.input, source="python")
    assert choose_recipe(without, ("gradcam",), images) == replace(gentle, batch_norm="mixture")
    classifier.classes = 1000
    assert choose_recipe(classifier, ("gradcam",), images) == replace(gentle, batch_norm="mixture")


def test_settings_in_the_report_are_plain_json(run):
    protection, _ = run
    assert json.loads(json.dumps(protection.report["settings"]))["training"]["steps"] == 6
