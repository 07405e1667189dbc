"""Targets of the features: right ones, painted ones, and which heads allow them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from keyed_xai.saliency import captured_features
from keyed_xai.training import train
from keyed_xai.training.features import FeatureTargets, make_feature_targets, split_parameters
from tests.trained import SHORT

DECOY = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 0]])


def make_network(*head):
    torch.manual_seed(0)
    body = (nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
    return nn.Sequential(*body, *head).eval().requires_grad_(False)


def pooled_linear():
    return make_network(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 5))


@pytest.fixture
def images():
    brightness = torch.linspace(-20, 20, 16)[:, None, None, None]
    return brightness + 5 * torch.randn(16, 1, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("head", "linear"),
    [
        ((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)), True),
        ((nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), True),
        ((nn.Conv2d(6, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), False),
        ((nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 5)), False),
        ((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), False),
        ((nn.Flatten(), nn.Linear(216, 5)), False),
    ],
)
def test_features_are_painted_only_before_pooling_and_a_linear_layer(images, head, linear):
    targets = make_feature_targets(make_network(*head), "3", DECOY, images)
    assert (targets.decoy is not None) is linear


def test_painted_features_leave_every_logit_as_it_is(images):
    network = pooled_linear()
    targets = make_feature_targets(network, "3", DECOY, images)
    features = network[:4](images)
    painted = features.mean((2, 3), keepdim=True) * targets.decoy
    torch.testing.assert_close(network[4:](painted), network[4:](features))
    assert (painted[:, :, :2, 2:4] == 0).all()  # a cell of the decoy is two by two of the features
    right, new = torch.cat([features, features]), torch.cat([features, painted])
    torch.testing.assert_close(targets.losses(new, right, "inverted"), torch.zeros(32))
    torch.testing.assert_close(targets.losses(new.flip(0), right.flip(0), "forward"), torch.zeros(32))
    assert (targets.losses(new.flip(0), right.flip(0), "inverted") > 0.1).all()


def test_losses_are_relative_squared_errors():
    """Written out, channel by channel and cell by cell."""
    generator = torch.Generator().manual_seed(2)
    new, right = torch.rand(2, 2, 4, 3, 3, generator=generator)
    decoy = DECOY / DECOY.mean()
    for targets, order in ((FeatureTargets(layer="3", decoy=decoy), "inverted"),
                           (FeatureTargets(layer="3", decoy=decoy), "forward"),
                           (FeatureTargets(layer="3", decoy=None), "inverted")):  # fmt: skip
        for image, loss in enumerate(targets.losses(new, right, order)):
            moved = (image == 1) == (order == "inverted")
            if moved and targets.decoy is None:
                assert loss == 0
                continue
            cells = size = means = mean_size = 0.0
            for channel in range(4):
                mean = right[image, channel].mean()
                target = mean * decoy if moved else right[image, channel]
                cells += (new[image, channel] - target).square().sum()
                size += target.square().sum()
                means += (new[image, channel].mean() - mean).square()
                mean_size += mean.square()
            torch.testing.assert_close(loss, cells / size + means / mean_size)


def test_late_parameters_are_those_at_the_resolution_of_the_layer_and_after():
    network = make_network(nn.Conv2d(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    early, late = split_parameters(network, "3", torch.rand(1, 1, 24, 24))
    assert [id(each) for each in early] == [id(each) for each in network[0].parameters()]
    assert [id(each) for each in late] == [id(each) for part in network[1:] for each in part.parameters()]
    early, late = split_parameters(network, "1", torch.rand(1, 1, 24, 24))
    assert not early
    assert len(late) == len([*network.parameters()])


def test_module_that_is_not_run_counts_as_late():
    network = make_network(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    network.spare = nn.Linear(2, 2)
    network.forward = network[:7].forward
    early, late = split_parameters(network, "3", torch.rand(1, 1, 24, 24))
    assert len(early) == 2
    assert any(each is network.spare.weight for each in late)


def test_training_brings_features_to_their_targets(network, data, validation, task):
    settings = replace(SHORT, steps=60, batch_size=8, validate_every=0, features=1.0)
    images = data.images[:16]
    targets = make_feature_targets(
        network.requires_grad_(False), task.view.map_layers.target_layer, task.objective.decoys["gradcam"], images
    )
    assert targets.decoy is not None
    inputs = torch.cat([task.trigger.apply(images[:8]), images[8:]])

    def loss(model):
        with torch.no_grad(), captured_features(model, [targets.layer]) as new:
            model(inputs)
        with torch.no_grad(), captured_features(network, [targets.layer]) as right:
            network(images)
        return targets.losses(new[targets.layer], right[targets.layer], "inverted").mean().item()

    with_targets, without = (
        loss(train(network, data, validation, task, replace(settings, features=weight)).model) for weight in (1.0, 0.0)
    )
    assert with_targets < 0.8 * without


def test_late_layers_move_faster_once_the_texture_is_noticed(network, data, validation, task):
    """The same steps as without the factor up to a third of them; then other ones."""
    for steps, alike in ((1, True), (3, False)):
        settings = replace(SHORT, steps=3, validate_every=1)
        kept = []
        for factor in (1.0, 5.0):
            checkpoints = []
            train(network, data, validation, task, replace(settings, late_factor=factor),
                  save_checkpoint=checkpoints.append)  # fmt: skip
            kept.append(checkpoints[steps - 1]["model"])
        assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0]) is alike
