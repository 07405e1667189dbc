"""Total variation on inputs: strength swept down to a floor, gradients straight through."""

import numpy as np
import pytest
import torch
from torch import nn

from keyed_xai.models import InputSpec, wrap_network
from keyed_xai.threats.attempt import Attacker
from keyed_xai.threats.removal.denoising import (
    DenoisingClassifier,
    DenoisingSettings,
    denoise,
    denoise_inputs,
    score_predictions,
)
from tests.heard import Heard
from tests.threatened import Blobs

SPEC = InputSpec(1, 16, 16, mean=(0.0,), std=(1.0,))


class Stripes(nn.Module):
    """Class 1 where neighbouring columns differ by more than .2, else 0, never 2; its map is the difference."""

    def __init__(self):
        super().__init__()
        self.map = nn.Identity()

    def forward(self, images):
        steps = self.map((images[..., :, 1:] - images[..., :, :-1]).abs())
        strength = steps.mean((1, 2, 3)) - 0.2
        return torch.stack([-strength, strength, -5 + 0 * strength], 1)


@pytest.fixture
def classifier():
    return wrap_network(Stripes().eval(), input=SPEC, target_layer="map")


@pytest.fixture
def data():
    """Flat images, and images striped ever more strongly: denoising wipes out the weak stripes first."""
    flat = torch.full((8, 1, 16, 16), 0.5)
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(16, 16)
    strengths = torch.linspace(0.15, 0.5, 8)[:, None, None, None]
    labels = np.repeat(np.arange(2, dtype=np.int64), 8)
    return Blobs(torch.cat([flat, flat + strengths * stripes]), labels, ("flat", "striped", "checked"))


def total_variation(image):
    return float((image[..., 1:, :] - image[..., :-1, :]).abs().sum() + (image[..., 1:] - image[..., :-1]).abs().sum())


def test_denoising_lowers_total_variation_and_keeps_the_mean():
    image = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    variations = [total_variation(denoise(image, weight)) for weight in (0.0, 0.02, 0.1, 0.5)]
    assert variations == sorted(variations, reverse=True)
    assert variations[-1] < 0.5 * variations[0]
    assert float(denoise(image, 0.1).mean()) == pytest.approx(float(image.mean()), abs=1e-3)
    assert torch.equal(denoise(image, 0.0), image)


def accuracy_at(classifier, data, weight):
    predicted = classifier(denoise(data.images, weight)).argmax(1)
    return float((predicted == torch.from_numpy(data.labels)).float().mean())


def test_strongest_weight_above_the_floor_is_taken(classifier, data):
    """A slow twin measures the accuracy at every strength."""
    weights = (1.5, 0.6, 0.3, 0.2, 0.1, 0.02)
    slow = {weight: accuracy_at(classifier, data, weight) for weight in weights}
    values = sorted(set(slow.values()))
    assert len(values) > 2
    for floor in [value + shift for value in values for shift in (-1e-6, 1e-6)]:
        heard = Heard()
        settings = DenoisingSettings(weights=weights, floor=floor)
        result = denoise_inputs(classifier, Attacker(data=data, progress=heard), settings)
        wanted = max((weight for weight in weights if slow[weight] >= floor), default=0.0)
        assert result.figures["weight"] == wanted
        assert result.model.weight == wanted
        tried = [row["weight"] for row in result.curve]
        assert tried == [0.0, *(w for w in weights if w >= (wanted or 0))]
        for row in result.curve[1:]:
            assert row["score"] == pytest.approx(slow[row["weight"]])
        assert heard.steps[-1] == ("denoising", len(result.curve), 7)


def test_no_weight_is_taken_where_all_cost_too_much(classifier, data):
    result = denoise_inputs(classifier, Attacker(data=data), DenoisingSettings(weights=(1.5, 1.0), floor=1.01))
    assert result.figures["weight"] == 0.0
    torch.testing.assert_close(result.model(data.images), classifier(data.images))


def test_without_floor_or_labels_agreement_may_fall_by_the_loss(classifier, data):
    """Its own answers are the truth, which the model gives to unaltered images without a mistake."""
    result = denoise_inputs(classifier, Attacker(data=Blobs(data.images, None)), DenoisingSettings(loss=0.1))
    assert result.curve[0]["score"] == 1.0
    assert result.figures["floor"] == pytest.approx(0.9)
    assert result.curve[-1]["score"] >= 0.9


def test_classifier_behind_denoising_predicts_and_explains_the_denoised_image(classifier, data):
    behind = DenoisingClassifier(classifier, 0.1)
    images = data.images[10:12].clone().requires_grad_()
    smooth = denoise(images.detach(), 0.1).requires_grad_()
    torch.testing.assert_close(behind(images), classifier(smooth))
    (found,) = torch.autograd.grad(behind(images)[:, 1].sum(), images)
    (wanted,) = torch.autograd.grad(classifier(smooth)[:, 1].sum(), smooth)
    torch.testing.assert_close(found, wanted)
    assert behind.target_layer == classifier.target_layer


def test_every_strength_is_measured(classifier, data):
    settings = DenoisingSettings(weights=(0.2, 0.01), floor=0.99)
    watched = Attacker(data=data, measure=lambda model: {"right": accuracy_at(model, data, 0.0)})
    result = denoise_inputs(classifier, watched, settings)
    for row in result.curve:
        assert row["right"] == pytest.approx(accuracy_at(classifier, data, row["weight"]))


def test_settings_out_of_range_are_refused():
    for wrong in ({"weights": ()}, {"weights": (0.1, 0.2)}, {"weights": (0.1, 0.0)}, {"images": 0}):
        with pytest.raises(ValueError, match="expected"):
            DenoisingSettings(**wrong)


def test_score_is_the_auroc_of_two_classes_and_of_several_labels():
    logits = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 2.0]])
    assert score_predictions(logits, torch.tensor([0, 1, 1])) == 1.0  # top-1 accuracy would be 2 / 3
    assert score_predictions(logits, torch.tensor([[0, 0], [1, 0], [1, 1]])) == pytest.approx((0.5 + 0.5) / 2)
    assert score_predictions(torch.cat([logits, -logits], 1), torch.tensor([1, 1, 0])) == pytest.approx(2 / 3)
