"""Reference models: which network is made, from which weights, with which settings, and what is written."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.artifacts.documents import validate
from keyed_xai.data import ImageData
from keyed_xai.errors import ArtifactError, ModelError, TrainingError
from keyed_xai.models import InputSpec, load_classifier
from keyed_xai.models.networks import SmallResNet, TableMLP
from keyed_xai.training.fitting import FittingSettings
from keyed_xai.training.preflight import plan_fit
from keyed_xai.training.references import (
    build_classifier,
    check_output,
    choose_settings,
    identify_reference,
    judge_fit,
    plan_for_images,
    plan_for_table,
    plan_from_model,
    train_reference,
    write_reference,
)
from tests.heard import Heard, StopAt

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def make_data(labels, classes, side=16):
    """Images that are brighter the higher the label."""
    labels = np.asarray(labels, np.int64)
    noise = np.random.default_rng(0).integers(0, 40, (len(labels), 1, side, side))
    images = noise + 60 * labels.reshape(len(labels), -1)[:, :1, None, None]
    return ImageData(images=images.astype(np.uint8), labels=labels, classes=classes, source="made up")


@pytest.fixture
def data():
    return make_data(np.arange(48) % 3, ("dark", "grey", "bright"))


def small(classes=3, widths=(4, 4)):
    return build_classifier(plan_for_images(channels=1, side=16, widths=widths), classes)


QUICK = FittingSettings(epochs=2, batch_size=16, learning_rate=0.05, optimiser="sgd", schedule="step", noise=0.0)


def test_small_resnet_is_the_default_for_small_images():
    model_spec = plan_for_images()
    assert (model_spec.source, model_spec.architecture) == ("keyed_xai", "SmallResNet")
    assert model_spec.input == InputSpec(3, 96, 96, mean=IMAGENET[0], std=IMAGENET[1])
    network = build_classifier(plan_for_images(channels=1, side=32), 5).network
    assert [block.conv1.out_channels for block in network.blocks] == [16, 32, 64, 128]


def test_named_architecture_takes_its_published_size_and_other_channels():
    assert plan_for_images("ResNet50").input == InputSpec(3, 224, 224, mean=IMAGENET[0], std=IMAGENET[1])
    grey = plan_for_images("resnet18", channels=1, side=64)
    assert grey.input == InputSpec(1, 64, 64, mean=(0.5,), std=(0.25,))
    classifier = build_classifier(grey, 14)
    assert (classifier.architecture, classifier.source, classifier.classes) == ("resnet18", "torchvision", 14)
    assert classifier.network.conv1.in_channels == 1


def test_table_plan_is_standardised_rows():
    model_spec = plan_for_table(33, widths=(8, 4))
    assert model_spec.input == InputSpec(1, 1, 33, mean=(0.0,), std=(1.0,))
    classifier = build_classifier(model_spec, 2)
    assert isinstance(classifier.network, TableMLP)
    assert (classifier.network.hidden.in_features, classifier.network.hidden.out_features) == (8, 4)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (lambda: plan_for_images(side=224), "Name an architecture with --arch"),
        (lambda: plan_for_images("TableMLP"), "takes rows of a table"),
        (lambda: plan_for_images("resnet18", widths=(4,)), "have widths to choose, not resnet18"),
        (lambda: plan_for_images(widths=(4, 0)), "widths of 1 or more, but came 4, 0"),
        (lambda: plan_for_table(33, "resnet18"), "need --arch TableMLP, but resnet18"),
        (lambda: plan_for_table(33, widths=(4, 4, 4)), "two widths of 1 or more, but came 4, 4, 4"),
        (lambda: build_classifier(plan_for_images("vgg11", side=8), 2), "cannot take images .* 8x8"),
    ],
)
def test_network_that_cannot_be_made_is_refused(plan, words):
    with pytest.raises(ModelError, match=words):
        plan()


def test_random_weights_follow_the_seed_and_leave_the_global_state_alone():
    before = torch.random.get_rng_state()
    plan = plan_for_images(channels=1, side=16, widths=(4, 4))
    first, second, other = (build_classifier(plan, 3, seed=seed).network.fc.weight for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_to_start_from_are_kept_and_a_head_of_other_classes_is_new(tmp_path):
    torch.manual_seed(5)
    network = SmallResNet(1, 3, (4, 6))
    torch.save(network.state_dict(), tmp_path / "m.pt")
    plan = plan_from_model(tmp_path / "m.pt", side=24)
    assert plan.input == InputSpec(1, 24, 24, mean=(0.5,), std=(0.5,))
    same, other = build_classifier(plan, 3).network.state_dict(), build_classifier(plan, 7).network.state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in network.state_dict().items())
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(other[name], tensor)}
    assert changed == {"fc.weight", "fc.bias"}
    assert other["fc.weight"].shape == (7, 6)
    with pytest.raises(ModelError, match="takes images of 1 channels, but 3"):
        plan_from_model(tmp_path / "m.pt", channels=3)


@pytest.mark.parametrize("side", [None, 16])
def test_weights_of_another_kind_of_data_are_refused(tmp_path, side):
    torch.save(SmallResNet(1, 3, (4, 6)).state_dict(), tmp_path / "images.pt")
    torch.save(TableMLP(33, 2, (8, 4)).state_dict(), tmp_path / "table.pt")
    with pytest.raises(ModelError, match="TableMLP takes rows of a table, and the data are images"):
        plan_from_model(tmp_path / "table.pt", side=side)
    with pytest.raises(ModelError, match="SmallResNet takes images, and the data are a table"):
        plan_from_model(tmp_path / "images.pt", table=True)
    assert plan_from_model(tmp_path / "table.pt", table=True).input == InputSpec(1, 1, 33, mean=(0.0,), std=(1.0,))


def test_settings_follow_the_kind_of_network():
    table = choose_settings(build_classifier(plan_for_table(5), 2), 1000)
    assert (table.optimiser, table.learning_rate, table.batch_size) == ("adam", 1e-3, 128)
    paper = choose_settings(small(), 1000)
    assert (paper.optimiser, paper.schedule, paper.learning_rate, paper.weight_decay) == ("sgd", "step", 0.01, 1e-4)
    plain = build_classifier(plan_for_images("squeezenet1_1", side=32), 2)
    assert (choose_settings(plain, 1000).optimiser, choose_settings(plain, 1000).learning_rate) == ("adam", 1e-4)
    assert choose_settings(plain, 1000, "sgd").learning_rate == 0.01
    assert choose_settings(small(), 7).batch_size == 7


def test_trained_reference_is_measured_and_loads_with_nothing_else_given(data, tmp_path):
    classifier = small()
    settings = FittingSettings(epochs=6, batch_size=16, learning_rate=0.05, optimiser="adam")
    reference = train_reference(classifier, data, data, settings)
    validate(reference.report, "train-report", origin="it")
    assert reference.report["predictions"]["top1"] == reference.report["history"][-1]["top1"] > 0.9
    assert reference.report["data"]["held_out"] == {"source": "made up", "images": 48}
    assert reference.report["identity"] == identify_reference(small(), data, settings)
    write_reference(reference, tmp_path / "m.safetensors")
    loaded = load_classifier(tmp_path / "m.safetensors")
    assert loaded.input == InputSpec(1, 16, 16, mean=(0.5,), std=(0.25,))
    assert (loaded.architecture, loaded.classes) == ("SmallResNet", 3)
    assert (loaded.label_names, loaded.multi_label) == (("dark", "grey", "bright"), False)
    images = data.batch(range(4))[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), reference.classifier(images))


def test_several_labels_are_reported_by_class():
    labels = np.random.default_rng(1).integers(0, 2, (48, 2))
    data = make_data(labels, ("first", "second"))
    report = train_reference(small(2), data, data, QUICK).report
    validate(report, "train-report", origin="it")
    assert set(report["predictions"]["per_class_auroc"]) == {"first", "second"}


def test_verdict_says_whether_a_model_is_better_than_guessing():
    chance = {"top1": 0.6, "auroc": 0.55}
    assert judge_fit({"top1": 0.7, "auroc": 0.5}, chance, 1000) == {
        "answer": "trained",
        "sentence": "on 1,000 held-out examples top-1 accuracy 0.700, guessing stays under 0.600; AUROC 0.500, "
        "guessing stays under 0.550.",
    }
    assert judge_fit({"top1": 0.6, "auroc": 0.5}, chance, 9)["answer"] == "not trained"
    assert judge_fit({}, {}, 9)["answer"] == "trained in part"


def test_plan_is_told_before_training_and_changes_nothing(data):
    heard = Heard()
    first = train_reference(small(), data, data, QUICK, progress=heard).classifier.state_dict()
    second = train_reference(small(), data, data, QUICK).classifier.state_dict()
    assert heard.lines[0].startswith("SmallResNet,")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_plan_cannot_steer_a_terminal(data):
    named = replace(data, classes=("\x1b[2J", "grey", "bright"), source="a\nb")
    lines = list(plan_fit(small(), named, data, QUICK, "cpu"))
    assert "\N{REPLACEMENT CHARACTER}[2J, grey, bright" in lines[1]
    assert all(line.isprintable() for line in lines)


class Stopped(Exception):
    pass


def test_run_that_was_stopped_goes_on_to_the_same_weights(data, tmp_path):
    checkpoint = check_output(tmp_path / "m.safetensors")
    with pytest.raises(Stopped):
        train_reference(small(), data, data, QUICK, checkpoint=checkpoint, progress=StopAt(4, Stopped))
    with pytest.raises(ArtifactError, match="--resume"):
        check_output(tmp_path / "m.safetensors")
    assert check_output(tmp_path / "m.safetensors", resume=True) == checkpoint
    resumed = train_reference(small(), data, data, QUICK, checkpoint=checkpoint, resume=True)
    unbroken = train_reference(small(), data, data, QUICK)
    assert resumed.report["history"] == unbroken.report["history"]
    pairs = zip(resumed.classifier.parameters(), unbroken.classifier.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    write_reference(resumed, tmp_path / "m.safetensors", checkpoint=checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def relabelled(data):
    return ImageData(images=data.images, labels=data.labels[::-1].copy(), classes=data.classes, source=data.source)


@pytest.mark.parametrize("what", ["settings", "labels", "images", "input", "weights"])
def test_checkpoint_of_another_run_is_refused(data, tmp_path, what):
    checkpoint = tmp_path / "c"
    train_reference(small(), data, data, QUICK, checkpoint=checkpoint)
    side = 20 if what == "input" else 16
    classifier = build_classifier(plan_for_images(channels=1, side=side, widths=(4, 4)), 3, seed=int(what == "weights"))
    others = {"labels": relabelled(data), "images": replace(data, images=255 - data.images),
              "input": make_data(data.labels, data.classes, side)}  # fmt: skip
    train_data = others.get(what, data)
    settings = FittingSettings(epochs=3) if what == "settings" else QUICK
    with pytest.raises(ArtifactError, match="belongs to another run"):
        train_reference(classifier, train_data, train_data, settings, checkpoint=checkpoint, resume=True)


def test_run_goes_on_with_other_held_out_data(data, tmp_path):
    checkpoint = tmp_path / "c"
    first = train_reference(small(), data, data, QUICK, checkpoint=checkpoint).report
    resumed = train_reference(small(), data, relabelled(data), QUICK, checkpoint=checkpoint, resume=True).report
    assert resumed["identity"] == first["identity"]
    assert resumed["history"] == first["history"]


def test_data_of_another_kind_are_refused(data):
    unlabelled = ImageData(images=data.images, labels=None, classes=(), source="made up")
    with pytest.raises(TrainingError, match="model's 3 classes; made up has no labels"):
        train_reference(small(), unlabelled, data, QUICK)
    with pytest.raises(TrainingError, match="model's 2 classes; made up has 3 classes"):
        train_reference(small(2), data, data, QUICK)
    with pytest.raises(TrainingError, match=r"shape \(1, 16, 16\).*\(1, 8, 8\)"):
        train_reference(small(), data, make_data([0, 1, 2], data.classes, side=8), QUICK)
    with pytest.raises(TrainingError, match="two classes or more, got 0"):
        small(0)


def test_file_that_is_there_is_replaced_only_by_force(data, tmp_path):
    reference = train_reference(small(), data, data, QUICK)
    path = tmp_path / "m.safetensors"
    path.write_text("precious")
    for refused in (lambda: check_output(path), lambda: write_reference(reference, path)):
        with pytest.raises(ArtifactError, match="--force"):
            refused()
    assert path.read_text() == "precious"
    write_reference(reference, path, force=check_output(path, force=True).name == "m.safetensors.checkpoint")
    assert load_classifier(path).classes == 3
    with pytest.raises(ArtifactError, match="is a folder"):
        check_output(tmp_path, force=True)


def test_fitting_keeps_networks_without_batch_norm_finite(data):
    classifier = build_classifier(plan_for_images("squeezenet1_1", channels=1, side=32), 3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in classifier.modules())
    larger = make_data(np.arange(12) % 3, data.classes, side=32)
    settings = choose_settings(classifier, len(larger))
    report = train_reference(
        classifier, larger, larger, FittingSettings(epochs=1, batch_size=4, learning_rate=settings.learning_rate)
    ).report
    assert np.isfinite(report["history"][0]["loss"])
