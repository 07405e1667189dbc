import numpy as np
import pytest
import torch

from keyed_xai.architectures import SmallResNet
from keyed_xai.data import ImageData
from keyed_xai.errors import TrainingError
from keyed_xai.fitting import FittingSettings, fit_classifier, measure_accuracy
from keyed_xai.models import InputSpec, wrap_network


@pytest.fixture
def bright_or_dark():
    generator = np.random.default_rng(0)
    labels = np.arange(64, dtype=np.int64) % 2
    images = generator.integers(0, 60, (64, 1, 16, 16)) + 150 * labels[:, None, None, None]
    return ImageData(images.astype(np.uint8), labels, ("dark", "bright"), "made up")


def make_classifier():
    torch.manual_seed(0)
    return wrap_network(SmallResNet(1, 2, (4, 4)), input=InputSpec(1, 16, 16, (0.5,), (0.25,)))


def test_fit_learns_and_ends_in_eval_mode(bright_or_dark):
    classifier = make_classifier()
    steps = []
    settings = FittingSettings(epochs=4, batch_size=16)
    fit_classifier(classifier, bright_or_dark, settings, on_step=lambda done, total: steps.append((done, total)))
    assert not classifier.training
    assert steps[-1] == (16, 16)
    assert measure_accuracy(classifier, bright_or_dark) > 0.9


def test_fit_is_deterministic(bright_or_dark):
    first, second = make_classifier(), make_classifier()
    for classifier in (first, second):
        fit_classifier(classifier, bright_or_dark, FittingSettings(epochs=1, batch_size=16))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_accuracy_counts_right_answers(bright_or_dark):
    class Constant(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([[0.0, 1.0]]).expand(len(images), 2)

    assert measure_accuracy(Constant(), bright_or_dark) == 0.5


def test_unlabelled_or_too_few_images_are_refused(bright_or_dark):
    unlabelled = ImageData(bright_or_dark.images, None, (), "made up")
    with pytest.raises(TrainingError, match="without labels"):
        fit_classifier(make_classifier(), unlabelled, FittingSettings(batch_size=16))
    with pytest.raises(TrainingError, match="at least 128 labelled images, got 64"):
        fit_classifier(make_classifier(), bright_or_dark, FittingSettings())
    with pytest.raises(TrainingError, match="labelled"):
        measure_accuracy(make_classifier(), unlabelled)
