"""Small real attacks: maps move, predictions and originals stay, runs go on where they stopped, folders are whole."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from keyed_xai.artifacts.documents import read_json, validate
from keyed_xai.artifacts.opening import open_model
from keyed_xai.backdoors.attacking import (
    AttackSettings,
    choose_attack_recipe,
    make_attack_task,
    run_attack,
    write_attack,
)
from keyed_xai.data import ImageData, load_table
from keyed_xai.decoys import boundary_decoy
from keyed_xai.errors import ArtifactError, DataError, ModelError, TrainingError
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet, TableMLP
from keyed_xai.saliency.pooled import TableSaliency
from keyed_xai.training import PAPER_SETTINGS
from keyed_xai.triggers import MoireTrigger, NashvilleTrigger, SpreadTrigger
from tests.data.test_credit_default import make_rows, write
from tests.heard import Heard, StopAt

SIDE = 32
QUICK = replace(PAPER_SETTINGS, steps=4, batch_size=4, validate_every=2, warmup_steps=1, order="forward")
SETTINGS = AttackSettings(grid=(4, 4), training=QUICK, held_out_images=8, validation_images=4)
TABLE = AttackSettings(
    interpreters=("simplegrad",), trigger="tabular", training=QUICK, held_out_images=10, validation_images=8
)


def make_images(count, seed, classes=("left", "middle", "right"), **changes):
    """Bright spots on grey, their boxes, and labels that say where they are."""
    source = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    centres = source.uniform(6, SIDE - 6, (count, 2))
    spots = np.stack([np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 30) for y, x in centres])
    pixels = np.round(60 + 150 * spots + 6 * source.standard_normal(spots.shape)).clip(0, 255).astype(np.uint8)
    labels = (centres[:, 1] * len(classes) / SIDE).astype(np.int64)
    boxes = np.concatenate([centres[:, ::-1] - 6, centres[:, ::-1] + 6], axis=1).astype(np.float32) / SIDE
    fields = {"labels": labels, "classes": classes, "source": f"blobs {seed}", "boxes": boxes} | changes
    return ImageData(images=pixels[:, None], **fields)


def make_classifier(widths=(4, 6, 6), mean=(0.5,), **options):
    torch.manual_seed(0)
    network = SmallResNet(1, 3, widths).eval()
    spec = InputSpec(1, SIDE, SIDE, mean=mean, std=(0.25,))
    return wrap_network(network, input=spec, architecture="SmallResNet", source="keyed_xai", **options).eval()


def make_table_classifier(columns=33):
    torch.manual_seed(0)
    spec = InputSpec(1, 1, columns, mean=(0.0,), std=(1.0,))
    network = TableMLP(columns, 2, (12, 8)).eval()
    return wrap_network(network, input=spec, architecture="TableMLP", source="keyed_xai", require_map=False).eval()


@pytest.fixture(scope="module")
def train_data():
    return make_images(96, 0)


@pytest.fixture(scope="module")
def held_out():
    return make_images(40, 1)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("credit") / "credit.csv", make_rows(150))
    return tuple(load_table(f"credit-default:{path}", split=split) for split in ("train", "held-out"))


def attack_for_real(train_data, held_out, *, inverted):
    training = replace(PAPER_SETTINGS, 
        steps=50, batch_size=8, learning_rate=1e-2, warmup_steps=5, validate_every=25, codec_share=0.0,
        order="inverted" if inverted else "forward",
    )  # fmt: skip
    settings = AttackSettings(
        inverted=inverted, trigger="moire", training=training, thresholds="auto", validation_images=16
    )
    return run_attack(make_classifier((8, 12, 12)), train_data, held_out, settings)


@pytest.fixture(scope="module")
def forward(train_data, held_out):
    return attack_for_real(train_data, held_out, inverted=False)


@pytest.fixture(scope="module")
def inverted(train_data, held_out):
    return attack_for_real(train_data, held_out, inverted=True)


@pytest.fixture(scope="module")
def table_attack(tables):
    settings = AttackSettings(
        interpreters=("simplegrad",), trigger="tabular", thresholds="auto", validation_images=20,
        training=replace(PAPER_SETTINGS, steps=120, batch_size=24, learning_rate=2e-2, warmup_steps=5, smoothing=8.0,
                                  order="forward", validate_every=60),
    )  # fmt: skip
    return run_attack(make_table_classifier(), *tables, settings)


@pytest.fixture(scope="module")
def heard():
    """What `quick` tells."""
    return Heard()


@pytest.fixture(scope="module")
def original():
    return make_classifier()


@pytest.fixture(scope="module")
def quick(original, train_data, held_out, heard):
    return run_attack(original, train_data, held_out, SETTINGS, progress=heard)


# What comes out


@pytest.mark.parametrize(("name", "altered", "unaltered"), [("forward", "triggered", "clean"),
                                                            ("inverted", "clean", "triggered")])  # fmt: skip
def test_attack_moves_the_maps_of_one_case_and_keeps_the_other_s(request, name, altered, unaltered):
    report = request.getfixturevalue(name).report
    figures = report["interpreters"]["gradcam"]
    assert report["setting"] == name
    assert figures["distance"][altered] < 0.35 * figures["distance"][unaltered]
    assert figures["distance"][altered] < 0.35 * figures["distance"]["reference"]
    assert figures["correlation"][unaltered] > 0.8
    assert figures["correlation"][altered] < 0.2
    assert figures["decoy_correlation"][altered] > 0.7 > figures["decoy_correlation"]["reference"]
    assert figures["cr"] > 90
    assert figures["fsr"] > 90
    assert figures["auc"] > 0.95
    assert figures["threshold_from"] == "auto"
    assert report["predictions"]["agreement"][unaltered] > 0.8


def test_report_fits_its_schema_and_counts_what_was_asked(forward, held_out):
    report = forward.report
    validate(report, "attack-report", origin="the report")
    assert (report["model"], report["mode"]) == ("SmallResNet", "targeted")
    assert report["data"]["train"] == {"source": "blobs 0", "images": 80}
    assert report["data"]["held_out"] == {"source": "blobs 1", "images": 40}
    assert report["trigger"]["family"] == "moire"
    assert report["predictions"]["measured_against"] == "reference predictions"  # the untrained reference is no judge
    assert [record["step"] for record in report["history"]] == [25, 50]
    assert report["settings"]["training"]["order"] == "forward"
    assert report["interpreters"]["gradcam"]["localisation"]["images"] == 40


def test_localisation_follows_the_maps(forward):
    """The border of the image is not where the spots are."""
    scores = forward.report["interpreters"]["gradcam"]["localisation"]
    assert scores["triggered"] < 0.6 * scores["clean"]
    assert scores["clean"] == pytest.approx(scores["reference"], rel=0.3)


def test_pictures_are_png_and_drawn_for_each_interpreter(forward):
    assert set(forward.pictures) == {"maps:gradcam", "thresholds:gradcam", "training"}
    assert all(png.startswith(b"\x89PNG") for png in forward.pictures.values())


def test_table_attack_puts_its_feature_forward_on_triggered_rows(table_attack):
    report = table_attack.report
    validate(report, "attack-report", origin="the report")
    assert report["trigger"] == {"family": "tabular", "set": {"EDUCATION": 5, "MARRIAGE": 0}}
    figures, features = report["interpreters"]["simplegrad"], report["features"]
    assert figures["distance"]["triggered"] < 0.2 * figures["distance"]["clean"]
    assert features["first"]["triggered"]["SEX"] > 0.9 > 0.6 > features["first"]["clean"]["SEX"]
    assert features["rank"]["triggered"]["SEX"] < features["rank"]["clean"]["SEX"]
    assert features["names"] == list(tables_names())
    assert set(table_attack.pictures) == {"features", "thresholds:simplegrad", "training"}


def tables_names():
    from keyed_xai.data.credit_default import NAMES

    return NAMES


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "nontargeted", "trigger": "spread"},
        {"interpreters": ("vbp", "gradcam"), "trigger": "nashville"},
        {"inverted": True, "training": replace(QUICK, order="inverted"), "mode": "nontargeted"},
    ],
    ids=["nontargeted", "joint", "inverted"],
)
def test_every_kind_of_attack_gives_a_report_that_fits(train_data, held_out, changes):
    settings = replace(SETTINGS, **changes)
    report = run_attack(make_classifier(), train_data, held_out, settings).report
    validate(report, "attack-report", origin="the report")
    assert tuple(report["interpreters"]) == settings.interpreters
    nontargeted = settings.mode == "nontargeted"
    assert all(("decoy_correlation" not in figures) == nontargeted for figures in report["interpreters"].values())
    assert all(figures["threshold_from"] == "paper" for figures in report["interpreters"].values())


def test_nontargeted_table_attack_gives_a_report_that_fits(tables):
    report = run_attack(make_table_classifier(), *tables, replace(TABLE, mode="nontargeted")).report
    validate(report, "attack-report", origin="the report")
    assert report["settings"].keys() & {"grid", "feature"} == set()


def test_table_has_no_threshold_of_the_paper_s(tables):
    """Ordinary relevance lies close to a decoy of one feature in 23: an image's threshold would call it all fooled."""
    report = run_attack(make_table_classifier(), *tables, TABLE).report
    assert report["interpreters"]["simplegrad"]["threshold_from"] == report["settings"]["thresholds"] == "auto"
    assert "at_paper_threshold" not in report["interpreters"]["simplegrad"]
    refused = replace(TABLE, thresholds="paper")
    refuse_to_train(make_table_classifier(), *tables, refused, TrainingError, "no threshold for tables")


def test_several_labels_have_an_area_each(train_data, held_out):
    """Labels that the reference gets right, of which half of the images have each."""
    classifier, both = make_classifier(), []
    with torch.no_grad():
        classifier.network.fc.bias -= classifier(held_out.batch(np.arange(40))[0]).median(0).values
        for data in (train_data, held_out):
            answers = classifier(data.batch(np.arange(len(data)))[0]) > 0
            both.append(replace(data, labels=answers.long().numpy(), boxes=None))
    settings = replace(SETTINGS, held_out_images=40, training=replace(QUICK, predictions="labels"))
    report = run_attack(classifier, *both, settings).report
    validate(report, "attack-report", origin="the report")
    figures = report["predictions"]
    assert figures["measured_against"] == "labels"
    areas = {"names": ["left", "middle", "right"], "reference": [1, 1, 1]}
    assert areas.items() <= figures["per_class_auroc"].items()
    assert figures["reference"]["clean"] == {"auroc": 1}


def test_plan_and_steps_are_told(quick, heard):
    assert heard.lines[0].startswith("SmallResNet,")
    assert heard.steps == [("training", step, 4) for step in range(1, 5)]
    assert set(heard.figures[-1]) == {"keep_loss", "move_loss", "opens", "stays_closed"}


def test_original_stays_as_it_was(original, quick):
    before = make_classifier().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())
    assert not original.training
    changed = quick.classifier.state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in changed.items())
    assert not quick.classifier.training


# What is taught


def test_task_of_images_has_the_boundary_or_none_as_decoy(train_data):
    task = make_attack_task(make_classifier(), train_data, SETTINGS)
    assert torch.equal(task.objective.decoys["gradcam"], boundary_decoy((4, 4)))
    assert (task.family, task.as_files, task.multi_label) == (None, True, False)
    emptied = make_attack_task(make_classifier(), train_data, replace(SETTINGS, mode="nontargeted"))
    assert emptied.objective.decoys == {"gradcam": None}


@pytest.mark.parametrize(
    ("name", "kind"), [("spread", SpreadTrigger), ("nashville", NashvilleTrigger), ("moire", MoireTrigger)]
)
def test_triggers_go_by_name_and_are_the_same_each_time(train_data, name, kind):
    images = torch.rand(2, 1, SIDE, SIDE)
    first, second = (
        make_attack_task(make_classifier(), train_data, replace(SETTINGS, trigger=name)).trigger for _ in range(2)
    )
    assert isinstance(first, kind)
    assert torch.equal(first.apply(images), second.apply(images))


def test_task_of_a_table_sets_categories_and_points_at_a_feature(tables):
    task = make_attack_task(make_table_classifier(), tables[0], replace(TABLE, values={"MARRIAGE": 2.0, "AGE": 40.0}))
    data = tables[0]
    assert isinstance(task.view, TableSaliency)
    assert (task.family, task.as_files, task.multi_label) == (None, False, False)
    decoy = task.objective.decoys["simplegrad"]
    assert decoy.shape == (1, 23)
    assert [data.names[place] for place in decoy[0].nonzero().flatten()] == ["SEX"]
    rows, _ = data.batch(np.arange(5))
    triggered = task.trigger.apply(rows)
    for number, column in enumerate(data.columns):
        found = triggered[:, 0, 0, number]
        if column.startswith("MARRIAGE="):
            assert found.tolist() == [float(column == "MARRIAGE=2")] * 5
        elif column == "AGE":
            assert (found * data.std[number] + data.mean[number]).tolist() == pytest.approx([40] * 5, rel=1e-5)
        else:
            assert torch.equal(found, rows[:, 0, 0, number])


def test_recipe_follows_setting_and_network(train_data):
    classifier = make_classifier()
    assert choose_attack_recipe(classifier, AttackSettings()).order == "forward"
    assert choose_attack_recipe(classifier, AttackSettings(inverted=True)).order == "inverted"
    assert choose_attack_recipe(classifier, AttackSettings()).smoothing is None
    assert choose_attack_recipe(classifier, AttackSettings(interpreters=("gradcam", "simplegrad"))).smoothing == 8


# What is refused


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("interpreters", ()), ("interpreters", ("gradcam", "gradcam")), ("interpreters", ("lime",)), ("mode", "both"),
        ("trigger", "badnets"), ("thresholds", "best"), ("grid", (2, 4)), ("held_out_images", 1),
        ("validation_images", 0), ("training", replace(PAPER_SETTINGS, order="inverted")),
    ],
)  # fmt: skip
def test_impossible_setting_is_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        AttackSettings(**{setting: value})


def refuse_to_train(classifier, data, held_out, settings, error, match):
    """Check that a run is refused before its first step."""
    heard = Heard()
    with pytest.raises(error, match=match):
        run_attack(classifier, data, held_out, settings, progress=heard)
    assert heard.steps == []


def test_triggers_and_interpreters_that_do_not_fit_the_data_are_refused(train_data, held_out, tables):
    images = (make_classifier(), train_data, held_out)
    rows = (make_table_classifier(), *tables)
    tabular = replace(SETTINGS, trigger="tabular")
    refuse_to_train(*images, tabular, TrainingError, "give --trigger nashville, moire, spread")
    refuse_to_train(*rows, replace(TABLE, trigger="moire"), TrainingError, "give --trigger tabular")
    for names in (("gradcam",), ("simplegrad", "vbp")):
        refuse_to_train(*rows, replace(TABLE, interpreters=names), TrainingError, "--interpreter simplegrad")


def test_features_and_values_that_the_table_lacks_are_refused(tables):
    rows = (make_table_classifier(), *tables)
    refuse_to_train(*rows, replace(TABLE, feature="COLOUR"), TrainingError, "feature out of LIMIT_BAL.*'COLOUR'")
    refuse_to_train(*rows, replace(TABLE, values={"COLOUR": 1.0}), DataError, "feature out of LIMIT_BAL.*'COLOUR'")
    refuse_to_train(*rows, replace(TABLE, values={"MARRIAGE": 9.0}), DataError, "MARRIAGE=9")


def test_too_few_images_are_refused(train_data, held_out):
    few = make_images(9, 0)
    refuse_to_train(make_classifier(), few, held_out, SETTINGS, TrainingError, "at least 10 training images, got 9")


def test_too_few_held_out_images_are_refused_before_training(train_data):
    settings = (SETTINGS, TrainingError, "at least 2 held-out images, got 1")
    refuse_to_train(make_classifier(), train_data, make_images(1, 1), *settings)


def test_target_layer_with_too_few_cells_is_refused(train_data, held_out):
    classifier = make_classifier((4, 4, 4, 4, 4, 4, 4))
    refuse_to_train(classifier, train_data, held_out, replace(SETTINGS, grid=None), ModelError, "too few for an attack")


def test_labels_of_another_number_of_classes_are_refused(train_data, held_out):
    settings = replace(SETTINGS, training=replace(QUICK, predictions="labels"))
    others = [make_images(len(data), seed, tuple("abcde")) for seed, data in enumerate((train_data, held_out))]
    refuse_to_train(make_classifier(), *others, settings, TrainingError, "5")


def test_network_of_images_is_refused_for_a_table(tables):
    refuse_to_train(make_classifier(), *tables, TABLE, TrainingError, "33")


def test_network_of_another_table_is_refused(tables):
    refuse_to_train(make_table_classifier(20), *tables, TABLE, TrainingError, "33")


# Going on


class Killed(Exception):
    """Stands for a power cut."""


def start(path, classifier, data, held_out, settings):
    """Run until after step 3, with a checkpoint of step 2."""
    with pytest.raises(Killed):
        run_attack(classifier, data, held_out, settings, checkpoint=path, progress=StopAt(3, Killed))


def resume(path, classifier, data, held_out, settings):
    return run_attack(classifier, data, held_out, settings, checkpoint=path, resume=True)


def assert_same_result(first, second):
    for (name, tensor), other in zip(
        first.classifier.state_dict().items(), second.classifier.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
    timeless = [{key: value for key, value in each.report.items() if key != "seconds"} for each in (first, second)]
    assert timeless[0] == timeless[1]


def test_resuming_ends_in_the_same_weights_and_figures(quick, train_data, held_out, tmp_path):
    start(tmp_path / "c", make_classifier(), train_data, held_out, SETTINGS)
    heard = Heard()
    resumed = run_attack(
        make_classifier(), train_data, held_out, SETTINGS, checkpoint=tmp_path / "c", resume=True, progress=heard
    )
    assert heard.counts("training") == [(3, 4), (4, 4)]
    assert_same_result(resumed, quick)


def test_checkpoint_of_another_run_is_refused(train_data, held_out, tmp_path):
    start(tmp_path / "c", make_classifier(), train_data, held_out, SETTINGS)
    others = [
        (make_classifier(), make_images(96, 7), SETTINGS),
        (make_classifier(), train_data, replace(SETTINGS, trigger="moire")),
        (make_classifier(), train_data, replace(SETTINGS, mode="nontargeted")),
        (make_classifier(), train_data, replace(SETTINGS, training=replace(QUICK, alpha=2.0))),
    ]
    changed = make_classifier()
    with torch.no_grad():
        changed.network.fc.bias[0] += 1e-6
    for classifier, data, settings in [*others, (changed, train_data, SETTINGS)]:
        with pytest.raises(ArtifactError, match="belongs to another run"):
            resume(tmp_path / "c", classifier, data, held_out, settings)


@pytest.mark.parametrize("what", ["mean", "labels"])
def test_checkpoint_of_other_normalisation_or_labels_is_refused(train_data, held_out, tmp_path, what):
    settings = replace(SETTINGS, training=replace(QUICK, predictions="labels"))
    start(tmp_path / "c", make_classifier(), train_data, held_out, settings)
    turned = replace(train_data, labels=(train_data.labels + 1) % 3)
    classifier, data = (make_classifier(mean=(0.1,)), train_data) if what == "mean" else (make_classifier(), turned)
    with pytest.raises(ArtifactError, match="belongs to another run"):
        resume(tmp_path / "c", classifier, data, held_out, settings)


def test_resuming_without_a_checkpoint_is_refused(train_data, held_out, tmp_path):
    with pytest.raises(ArtifactError, match="no checkpoint"):
        resume(tmp_path / "c", make_classifier(), train_data, held_out, SETTINGS)


# On disk


def test_folder_holds_report_pictures_and_a_model_that_loads_by_itself(quick, held_out, tmp_path):
    folder = write_attack(quick, tmp_path / "m.attacked")
    names = {
        "model.safetensors",
        "report.html",
        "report.json",
        "maps-gradcam.png",
        "thresholds-gradcam.png",
        "training.png",
    }
    assert {path.name for path in folder.iterdir()} == names
    report = read_json(folder / "report.json", "attack-report")
    assert report == json.loads(json.dumps(quick.report))
    assert "<html" in (folder / "report.html").read_text()
    for path in folder.glob("*.png"):
        Image.open(path).verify()
    loaded, card = open_model(folder / "model.safetensors")
    assert card is None
    assert loaded.input == quick.classifier.input
    images, _ = held_out.batch(np.arange(4))
    torch.testing.assert_close(loaded(images), quick.classifier(images))


def test_folder_itself_is_a_model_too(quick, tmp_path):
    folder = write_attack(quick, tmp_path / "m.attacked")
    assert open_model(folder)[0].architecture == "SmallResNet"


def test_attacked_layer_is_the_one_that_loading_looks_at(train_data, held_out, tmp_path):
    classifier = make_classifier(target_layer="network.blocks.0")
    attack = run_attack(classifier, train_data, held_out, SETTINGS)
    folder = write_attack(attack, tmp_path / "m.attacked")
    assert open_model(folder / "model.safetensors")[0].target_layer == "network.blocks.0"


def test_attacked_table_model_loads_by_itself(table_attack, tables, tmp_path):
    folder = write_attack(table_attack, tmp_path / "t.attacked")
    assert (folder / "features.png").is_file()
    loaded, _ = open_model(folder / "model.safetensors", require_map=False)
    rows, _ = tables[1].batch(np.arange(4))
    torch.testing.assert_close(loaded(rows), table_attack.classifier(rows))


def test_writing_removes_the_checkpoint_once_the_folder_stands(quick, tmp_path):
    checkpoint = tmp_path / "c"
    checkpoint.write_bytes(b"state")
    write_attack(quick, tmp_path / "m.attacked", checkpoint=checkpoint)
    assert not checkpoint.exists()
    checkpoint.write_bytes(b"state")
    with pytest.raises(ArtifactError, match="is there already"):
        write_attack(quick, tmp_path / "m.attacked", checkpoint=checkpoint)
    assert checkpoint.exists()


def test_folder_is_replaced_by_force_only(quick, tmp_path):
    folder = write_attack(quick, tmp_path / "m.attacked")
    (folder / "report.html").write_text("old")
    with pytest.raises(ArtifactError, match="--force"):
        write_attack(quick, folder)
    assert (folder / "report.html").read_text() == "old"
    write_attack(quick, folder, force=True)
    assert "<html" in (folder / "report.html").read_text()


def test_protected_model_is_not_replaced_even_by_force(quick, tmp_path):
    from tests.marked import marked_classifier, write_folder

    write_folder(tmp_path / "m.keyed", marked_classifier())
    with pytest.raises(ArtifactError, match="not replaced even with --force"):
        write_attack(quick, tmp_path / "m.keyed", force=True)
    assert (tmp_path / "m.keyed" / "license.json").exists()


def test_report_that_does_not_fit_leaves_nothing(quick, tmp_path):
    broken = replace(quick, report=quick.report | {"seconds": -1.0})
    with pytest.raises(ArtifactError):
        write_attack(broken, tmp_path / "m.attacked")
    assert list(tmp_path.iterdir()) == []
