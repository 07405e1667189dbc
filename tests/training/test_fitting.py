import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from keyed_xai.artifacts.checkpoint import read_checkpoint, write_checkpoint
from keyed_xai.data import ImageData, TableData
from keyed_xai.errors import TrainingError
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet, TableMLP
from keyed_xai.training.fitting import (
    FittingSettings,
    LabelledData,
    fit_classifier,
    measure_chance,
    measure_predictions,
)
from tests.heard import Heard


@pytest.fixture
def bright_or_dark():
    generator = np.random.default_rng(0)
    labels = np.arange(64, dtype=np.int64) % 2
    images = generator.integers(0, 60, (64, 1, 16, 16)) + 150 * labels[:, None, None, None]
    return ImageData(images=images.astype(np.uint8), labels=labels, classes=("dark", "bright"), source="made up")


def labelled(labels, classes):
    return ImageData(
        images=np.zeros((len(labels), 1, 8, 8), np.uint8), labels=labels, classes=classes, source="made up"
    )


def make_classifier():
    torch.manual_seed(0)
    return wrap_network(SmallResNet(1, 2, (4, 4)), input=InputSpec(1, 16, 16, mean=(0.5,), std=(0.25,)))


def test_fit_learns_and_ends_in_eval_mode(bright_or_dark):
    classifier = make_classifier()
    heard = Heard()
    settings = FittingSettings(epochs=4, batch_size=16)
    fit_classifier(classifier, bright_or_dark, settings, progress=heard)
    assert not classifier.training
    assert heard.steps == [("fitting", step, 16) for step in range(1, 17)]
    assert measure_predictions(classifier, bright_or_dark)["top1"] > 0.9


def test_fit_is_deterministic(bright_or_dark):
    first, second = make_classifier(), make_classifier()
    for classifier in (first, second):
        fit_classifier(classifier, bright_or_dark, FittingSettings(epochs=1, batch_size=16))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_accuracy_counts_right_answers(bright_or_dark):
    class Constant(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([[0.0, 1.0]]).expand(len(images), 2)

    assert measure_predictions(Constant(), bright_or_dark)["top1"] == 0.5


def test_unlabelled_or_too_few_images_are_refused(bright_or_dark):
    unlabelled = ImageData(images=bright_or_dark.images, labels=None, classes=(), source="made up")
    with pytest.raises(TrainingError, match="without labels"):
        fit_classifier(make_classifier(), unlabelled, FittingSettings(batch_size=16))
    with pytest.raises(TrainingError, match="at least 128 labelled images, got 64"):
        fit_classifier(make_classifier(), bright_or_dark, FittingSettings())
    with pytest.raises(TrainingError, match="labelled"):
        measure_predictions(make_classifier(), unlabelled)


class Lookup(nn.Module):
    """Logits by the brightness of an image's first pixel, so that predictions are known by hand."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, images):
        return self.table[(images[:, 0, 0, 0] * 255).round().long()]


class Dropping(nn.Module):
    """Half of its features dropped at random."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(256, 2)

    def forward(self, images):
        return self.fc(nn.functional.dropout(images.flatten(1), 0.5, self.training))


def numbered_images(labels, classes):
    """Image i is i everywhere."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2), np.uint8)
    return ImageData(images=images, labels=np.asarray(labels, np.int64), classes=classes, source="numbered")


@pytest.fixture
def rows():
    """A table whose label is whether the first column is positive."""
    features = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    labels = (features[:, 0] > 0).astype(np.int64)
    zeros = np.zeros(3)
    return TableData(
        features=features,
        labels=labels,
        classes=("no", "yes"),
        columns=("a", "b", "c"),
        names=("a", "b", "c"),
        groups=np.arange(3),
        mean=zeros,
        std=zeros + 1,
        source="t",
    )


@pytest.fixture
def several_labels():
    """Images whose left half is bright for label 0 and whose right half is for label 1."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, (96, 2))
    images = generator.integers(0, 60, (96, 1, 16, 16)) + np.repeat(150 * labels, 8, 1)[:, None, None, :]
    return ImageData(images=images.astype(np.uint8), labels=labels, classes=("left", "right"), source="made up")


def logistic_data():
    """Images and rows are both what fitting takes."""
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (12, 1, 4, 4)).astype(np.uint8)
    return ImageData(images=images, labels=np.arange(12, dtype=np.int64) % 2, classes=("a", "b"), source="made up")


def logistic_twin(data, optimiser, rates):
    """Weights after steps on the whole data, one for each rate, with the update rules written out."""
    x, y = data.batch(range(len(data)))
    x = x.flatten(1).double()
    weight = torch.zeros(2, 16, dtype=torch.float64)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, rate in enumerate(rates, 1):
        gradient = ((x @ weight.T).softmax(1) - nn.functional.one_hot(y, 2)).T @ x / len(x) + 0.01 * weight
        if optimiser == "sgd":
            first = 0.9 * first + gradient
            weight = weight - rate * first
        else:
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            unbiased = second / (1 - 0.999**step)
            weight = weight - rate * first / (1 - 0.9**step) / (unbiased.sqrt() + 1e-8)
    return weight.float()


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ({"schedule": "constant"}, [0.1] * 5),
        ({"schedule": "step"}, [0.1, 0.1, 0.01, 0.01, 0.001]),
        ({"schedule": "step", "decay_every": 3, "decay_factor": 0.5}, [0.1, 0.1, 0.1, 0.05, 0.05]),
    ],
)
def test_optimiser_and_schedule_follow_their_formulas(optimiser, schedule, rates):
    data = logistic_data()
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    nn.init.zeros_(network[1].weight)
    plain = {"mirror": False, "largest_shift": 0, "noise": 0.0, "weight_decay": 0.01, "batch_size": 12}
    settings = FittingSettings(epochs=5, learning_rate=0.1, optimiser=optimiser, **plain, **schedule)
    fit_classifier(network, data, settings)
    torch.testing.assert_close(network[1].weight.detach(), logistic_twin(data, optimiser, rates))


def test_history_holds_mean_loss_and_held_out_figures(bright_or_dark):
    classifier = make_classifier()
    settings = FittingSettings(epochs=3, batch_size=16)
    history = fit_classifier(classifier, bright_or_dark, settings, validation=bright_or_dark)
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    measured = measure_predictions(classifier, bright_or_dark)
    assert {name: history[-1][name] for name in ("top1", "auroc")} == measured


@pytest.mark.parametrize("schedule", ["one-cycle", "step", "constant"])
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_resumed_run_ends_like_an_unbroken_one(bright_or_dark, tmp_path, optimiser, schedule):
    settings = FittingSettings(epochs=3, batch_size=16, optimiser=optimiser, schedule=schedule)
    states = []
    unbroken, resumed = make_classifier(), make_classifier()
    whole = fit_classifier(unbroken, bright_or_dark, settings, validation=bright_or_dark, save_checkpoint=states.append)
    assert len(states) == 3
    write_checkpoint(tmp_path / "c", states[0], identity="run")
    again = fit_classifier(
        resumed,
        bright_or_dark,
        settings,
        validation=bright_or_dark,
        checkpoint=read_checkpoint(tmp_path / "c", identity="run"),
    )
    assert again == whole
    pairs = zip(unbroken.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_dropout_is_the_same_after_resuming_and_leaves_the_global_state_alone(bright_or_dark):
    settings = FittingSettings(epochs=2, batch_size=16)
    states, networks = [], [Dropping(), Dropping()]
    networks[1].load_state_dict(networks[0].state_dict())
    before = torch.random.get_rng_state()
    fit_classifier(networks[0], bright_or_dark, settings, save_checkpoint=states.append)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    fit_classifier(networks[1], bright_or_dark, settings, checkpoint=states[0])
    assert torch.equal(networks[0].fc.weight, networks[1].fc.weight)
    assert not torch.equal(networks[0].fc.weight, states[0]["model"]["fc.weight"])


def test_checkpoint_of_another_model_is_refused(bright_or_dark):
    states = []
    settings = FittingSettings(epochs=1, batch_size=16)
    fit_classifier(make_classifier(), bright_or_dark, settings, save_checkpoint=states.append)
    with pytest.raises(TrainingError, match="does not fit this model"):
        fit_classifier(Dropping(), bright_or_dark, settings, checkpoint=states[0])


def test_table_rows_are_learned_and_never_changed(rows):
    seen = []

    class Watching(TableMLP):
        def forward(self, x):
            seen.append(x.clone())
            return super().forward(x)

    torch.manual_seed(0)
    network = Watching(3, 2, (8, 4))
    assert isinstance(rows, LabelledData)
    fit_classifier(network, rows, FittingSettings(epochs=20, batch_size=50, learning_rate=0.05))
    epoch = torch.cat(seen[:4]).reshape(200, 3)
    assert torch.equal(epoch[epoch[:, 0].argsort()], torch.from_numpy(rows.features[rows.features[:, 0].argsort()]))
    measured = measure_predictions(network, rows)
    assert measured["top1"] > 0.95
    assert measured["auroc"] > 0.98


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_guessing_is_rarely_as_good_as_chance_says(share):
    generator = np.random.default_rng(0)
    labels = (generator.random(400) < share).astype(np.int64)
    chance = measure_chance(labelled(labels, ("no", "yes")))
    assert chance["top1"] > max(labels.mean(), 1 - labels.mean())
    areas = [roc_auc_score(labels, generator.random(400)) for _ in range(2000)]
    assert 0.001 < np.mean(np.array(areas) > chance["auroc"]) < 0.02
    hits = generator.binomial(400, max(labels.mean(), 1 - labels.mean()), 20000) / 400
    assert 0.002 < np.mean(hits > chance["top1"]) <= 0.012


def test_chance_of_several_labels_and_of_many_classes():
    several = measure_chance(labelled(np.eye(2, dtype=np.int64)[np.arange(60) % 2], ("a", "b")))
    assert list(several) == ["auroc"]
    assert list(measure_chance(labelled(np.arange(60) % 3, ("a", "b", "c")))) == ["top1"]
    assert measure_chance(labelled(np.zeros((5, 2), dtype=np.int64), ("a", "b"))) == {}
    with pytest.raises(TrainingError, match="labelled"):
        measure_chance(ImageData(images=np.zeros((5, 1, 8, 8), np.uint8), labels=None, classes=(), source="made up"))


def test_several_labels_are_learned(several_labels):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    settings = FittingSettings(epochs=20, batch_size=16, mirror=False, largest_shift=0, learning_rate=0.01)
    history = fit_classifier(network, several_labels, settings, validation=several_labels)
    measured = measure_predictions(network.eval(), several_labels)
    assert set(measured) == {"auroc", "per_class_auroc"}
    assert min(measured["per_class_auroc"].values()) > 0.95
    assert "top1" not in history[-1]


def test_loss_of_several_labels_is_the_mean_over_classes(several_labels):
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    start = [parameter.detach().clone() for parameter in network.parameters()]
    settings = FittingSettings(epochs=1, batch_size=96, mirror=False, largest_shift=0, noise=0.0)
    (record,) = fit_classifier(network, several_labels, settings)
    x, y = several_labels.batch(range(96))
    share = (x.flatten(1) @ start[0].T + start[1]).sigmoid()
    twin = -(y * share.log() + (1 - y) * (1 - share).log()).mean()
    assert record["loss"] == pytest.approx(float(twin), rel=1e-5)


def pairs_won(scores, labels):
    """AUROC as the share of pairs of a positive and a negative that are in order; ties count half."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    wins = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return sum(wins) / len(wins)


def test_two_classes_have_the_auroc_of_the_second():
    scores, labels = [0.1, 0.4, 0.4, 0.8, 0.3], [0, 1, 0, 1, 1]
    data = numbered_images(labels, ("a", "b"))
    measured = measure_predictions(Lookup([[2.0, 2.0 + score] for score in scores]), data)
    assert measured["top1"] == pytest.approx(0.6)
    assert measured["auroc"] == pytest.approx(pairs_won(scores, labels))


def test_many_classes_have_top_five_and_no_auroc():
    logits = torch.rand(20, 7, generator=torch.Generator().manual_seed(0)).tolist()
    labels = [number % 7 for number in range(20)]
    measured = measure_predictions(Lookup(logits), numbered_images(labels, tuple("abcdefg")))
    ranks = [sorted(row, reverse=True).index(row[label]) for row, label in zip(logits, labels, strict=True)]
    assert measured == {"top1": ranks.count(0) / 20, "top5": sum(rank < 5 for rank in ranks) / 20}


def test_five_classes_have_no_top_five():
    measured = measure_predictions(Lookup(torch.eye(5).tolist()), numbered_images([0, 1, 2, 3, 0], tuple("abcde")))
    assert measured == {"top1": 0.8}


def test_class_without_both_labels_is_left_out_of_several():
    labels = [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
    logits = [[0.2, 0.1, 0.3], [0.5, 0.9, 0.1], [0.4, 0.7, 0.2], [0.3, 0.8, 0.9]]
    measured = measure_predictions(Lookup(logits), numbered_images(labels, ("a", "b", "never")))
    areas = {name: pairs_won([row[i] for row in logits], [row[i] for row in labels]) for i, name in enumerate("ab")}
    assert measured["per_class_auroc"] == pytest.approx(areas)
    assert measured["auroc"] == pytest.approx(sum(areas.values()) / 2)


def test_one_class_only_has_accuracy_but_no_auroc():
    assert measure_predictions(Lookup([[0.0, 1.0]] * 3), numbered_images([1, 1, 1], ("a", "b"))) == {"top1": 1.0}


def test_loss_that_is_not_finite_ends_the_run_with_advice(bright_or_dark):
    settings = FittingSettings(epochs=2, batch_size=16, optimiser="sgd", schedule="constant", learning_rate=1e30)
    with pytest.raises(TrainingError, match=r"no longer finite in epoch 1.*--learning-rate.*--optimiser adam"):
        fit_classifier(make_classifier(), bright_or_dark, settings)


def test_model_that_diverged_in_the_last_step_is_not_measured():
    with pytest.raises(TrainingError, match="logits are no longer finite"):
        measure_predictions(Lookup([[0.0, float("nan")]]), numbered_images([0], ("a", "b")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimiser": "lbfgs"}, "optimiser: expected one of adamw, adam, sgd; got 'lbfgs'"),
        ({"schedule": "cosine"}, "schedule: expected one of one-cycle, step, constant"),
        ({"epochs": 0}, "epochs: expected more than 0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected more than 0, got nan"),
        ({"noise": -0.1}, "noise: expected 0 or more"),
        ({"decay_every": 0}, "decay_every: expected 1 epoch"),
        ({"decay_factor": 0.0}, "decay_factor: expected more than 0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        FittingSettings(**changes)
