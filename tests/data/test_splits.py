"""Which images a run learns from, validates on and is measured on, and the digests by which it knows them again."""

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.batches import batches
from keyed_xai.data import ImageData
from keyed_xai.data.splits import (
    check_labels,
    check_shape,
    digest_data,
    digest_network,
    first_images,
    has_several_labels,
    split_validation,
)
from keyed_xai.errors import TrainingError
from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.models.networks import SmallResNet


def make_images(count, labels=None, classes=("a", "b")):
    """Images of one pixel that tell their number."""
    pixels = np.arange(count, dtype=np.uint8).reshape(count, 1, 1, 1)
    return ImageData(images=pixels, labels=labels, classes=classes if labels is not None else (), source="numbers")


def numbers(images):
    return (images[:, 0, 0, 0] * 255).round().long().tolist()


class Threshold(nn.Module):
    """Logits by which an image of number `at` or more is of class 1, or has both of two labels."""

    def __init__(self, at, both=False):
        super().__init__()
        self.at, self.both = at, both

    def forward(self, images):
        above = images[:, 0, 0, 0] * 255 - self.at + 0.5
        return torch.stack([above if self.both else -above, above], 1)


@pytest.mark.parametrize(("images", "count", "held"), [(100, 20, 20), (100, 60, 20), (10, 200, 2), (14, 3, 2)])
def test_validation_is_apart_and_a_fifth_at_most(images, count, held):
    learn, validation = split_validation(make_images(images), count)
    assert (len(learn), len(validation)) == (images - held, held)
    seen = [numbers(part.batch(np.arange(len(part)))[0]) for part in (learn, validation)]
    assert sorted(seen[0] + seen[1]) == list(range(images))


def test_part_gives_its_own_images_and_their_labels():
    learn, _ = split_validation(make_images(20, np.arange(20) % 2), 4)
    images, labels = learn.batch(np.array([3, 0]))
    assert numbers(images) == [7, 4]
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_too_few_images_are_refused(count):
    with pytest.raises(TrainingError, match=f"at least 10 training images, got {count}"):
        split_validation(make_images(count), 200)


@pytest.mark.parametrize(("at", "kept"), [(5, True), (9, True), (2, True), (10, False), (0, False)])
def test_labels_count_where_the_reference_mostly_agrees(at, kept):
    """Of ten images five are of class 1; the reference is right about 10 less |at - 5|, and six are needed."""
    data = make_images(10, (np.arange(10) >= 5).astype(np.int64))
    images, labels = first_images(data, 10, Threshold(at), 2, "cpu")
    assert numbers(images) == list(range(10))
    assert (labels is not None) == kept
    if kept:
        assert labels.tolist() == [0] * 5 + [1] * 5


def test_labels_of_another_number_of_classes_do_not_count():
    data = make_images(10, (np.arange(10) >= 5).astype(np.int64), ("a", "b", "c"))
    assert first_images(data, 10, Threshold(5), 2, "cpu")[1] is None
    assert first_images(make_images(10), 10, Threshold(5), 2, "cpu")[1] is None


def test_several_labels_count_where_they_are_ranked_right():
    """Agreement would say little: a network that answers no to everything is mostly right."""
    labels = np.stack([np.arange(10) >= 5, np.arange(10) >= 9], axis=1).astype(np.int64)
    assert first_images(make_images(10, labels), 10, Threshold(5, both=True), 2, "cpu")[1].tolist() == labels.tolist()
    turned = make_images(10, labels[::-1].copy())
    assert first_images(turned, 10, Threshold(100, both=True), 2, "cpu")[1] is None
    assert first_images(make_images(10, 0 * labels), 10, Threshold(100, both=True), 2, "cpu")[1] is None


def test_first_images_are_the_first():
    images, labels = first_images(make_images(200, np.zeros(200, np.int64)), 130, Threshold(200), 2, "cpu")
    assert numbers(images) == list(range(130))
    assert labels.tolist() == [0] * 130


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_held_out_images_are_refused(count):
    with pytest.raises(TrainingError, match=f"at least 2 held-out images, got {count}"):
        first_images(make_images(5), count, Threshold(1), 2, "cpu")


def test_digest_of_data_knows_every_pixel_and_the_source():
    digest = digest_data(make_images(40))
    assert digest == digest_data(make_images(40))
    changed = make_images(40)
    changed.images[39] += 1
    others = [
        changed,
        make_images(39),
        ImageData(images=make_images(40).images, labels=None, classes=(), source="other"),
    ]
    assert len({digest, *map(digest_data, others)}) == 4


def test_digest_of_many_images_covers_all_of_them(monkeypatch):
    monkeypatch.setattr("keyed_xai.data.splits.batches", lambda count, _size: batches(count, 7))
    digests = set()
    for number in range(40):
        data = make_images(40)
        data.images[number] ^= 128
        digests.add(digest_data(data))
    assert len(digests) == 40


def make_classifier(mean=0.5, **options):
    torch.manual_seed(0)
    spec = InputSpec(1, 32, 32, mean=(mean,), std=(0.25,))
    return wrap_network(SmallResNet(1, 3, (4, 6, 6)).eval(), input=spec, **options)


def test_digest_of_a_network_knows_its_weights():
    classifier = make_classifier()
    digest = digest_network(classifier)
    assert digest == digest_network(make_classifier())
    classifier.network.stem_bn.running_mean[1] += 1e-6
    assert digest_network(classifier) != digest
    classifier.network.stem_bn.running_mean[1] = 0
    assert digest_network(classifier) == digest


@pytest.mark.parametrize("options", [{"mean": 0.4}, {"target_layer": "blocks.0"}, {"taps": ["blocks.0"]}])
def test_digest_of_a_network_knows_how_it_is_run_and_explained(options):
    assert digest_network(make_classifier(**options)) != digest_network(make_classifier())


def test_digest_of_data_knows_labels():
    labels = np.arange(20) % 2
    assert len({digest_data(make_images(20, each)) for each in (labels, 1 - labels, None)}) == 3


def test_data_of_another_shape_or_other_labels_are_refused():
    classifier = make_classifier()
    with pytest.raises(TrainingError, match="takes inputs of 1 x 32 x 32"):
        check_shape(classifier, make_images(4))
    with pytest.raises(TrainingError, match="3 classes; these have no labels"):
        check_labels(classifier, make_images(4))
    with pytest.raises(TrainingError, match="3 classes; these have 2 classes"):
        check_labels(classifier, make_images(4, np.arange(4) % 2))


def test_labels_count_where_the_classes_have_the_reference_s_names():
    """However often it is right: a weak model is not judged by its own predictions, nor by other data's labels."""
    classifier = make_classifier(label_names=("a", "b", "c"))
    for classes, counts in ((("a", "b", "c"), True), (("a", "c", "b"), False)):
        images = np.zeros((12, 1, 32, 32), np.uint8)
        data = ImageData(images=images, labels=np.full(12, 2), classes=classes, source="test")
        assert (first_images(data, 12, classifier, 3, "cpu")[1] is not None) == counts


def test_many_classes_need_less_agreement_where_names_are_not_known():
    labels = np.concatenate([np.zeros(4, np.int64), np.arange(1, 7)])
    names = tuple("abcdefg")
    assert first_images(make_images(10, labels, names), 10, Constant(7), 7, "cpu")[1] is not None
    assert first_images(make_images(10, np.arange(10) % 7, names), 10, Constant(7), 7, "cpu")[1] is None


class Constant(nn.Module):
    """Always the first class."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, images):
        return torch.eye(self.classes)[:1].expand(len(images), -1)


def test_model_says_itself_whether_it_has_several_labels():
    several = make_images(4, np.eye(3, dtype=np.int64)[[0, 1, 2, 0]], ("a", "b", "c"))
    single = make_images(4, np.arange(4) % 3, ("a", "b", "c"))
    unknown = make_classifier()
    assert (has_several_labels(unknown, several), has_several_labels(unknown, single)) == (True, False)
    known = make_classifier(label_names=("a", "b", "c"))
    assert not has_several_labels(known, several)
    assert has_several_labels(make_classifier(label_names=("x", "y", "z"), multi_label=True), single)
