"""Statistics of batch norm: frozen, moved by the mixture, and estimated anew."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from keyed_xai.training import reestimate_batch_norm, train
from keyed_xai.training.batch_norm import choose_batch_norm
from keyed_xai.training.batches import Run, draw_inputs, step_generator
from tests.trained import SHORT, Blobs, weights_of


def test_frozen_batch_norm_keeps_its_statistics(network, data, validation, task):
    before = weights_of(network)
    result = train(network, data, validation, task, replace(SHORT, batch_norm="frozen"))
    for name, tensor in result.model.state_dict().items():
        if "running" in name or "batches" in name:
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(result.model.stem.weight, network.stem.weight)


def test_training_on_the_mixture_moves_the_statistics(network, data, validation, task):
    result = train(network, data, validation, task, SHORT)
    assert not torch.equal(result.model.stem_bn.running_mean, network.stem_bn.running_mean)


def test_reestimated_statistics_are_those_of_the_mixture(network, data, task):
    """Of the first norm, written out: mean over the batches of each batch's mean and unbiased variance."""
    conv, norm = network.stem, network.stem_bn
    momentum = norm.momentum
    few = Blobs(data.images[:6], None)  # four passes over them are three batches of four and four
    run = Run(reference=network, data=few, task=task, settings=SHORT)
    reestimate_batch_norm(network, run)
    means, variances = [], []
    for number in range(3):
        inputs, _, _ = draw_inputs(run, step_generator(SHORT.seed, -1 - number))
        channels = conv(inputs).detach().transpose(0, 1).flatten(1)
        means.append(channels.mean(1))
        variances.append(channels.var(1))
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0), rtol=1e-4, atol=1e-6)
    assert norm.momentum == momentum
    assert not network.training


@pytest.mark.parametrize(("batch_size", "batches"), [(4, 24), (1, 64)])
def test_images_are_passed_over_four_times_and_not_in_more_than_64_batches(network, data, task, batch_size, batches):
    run = Run(reference=network, data=data, task=task, settings=replace(SHORT, batch_size=batch_size))
    reestimate_batch_norm(network, run)
    assert network.stem_bn.num_batches_tracked == batches


def test_statistics_stay_frozen_where_the_images_are_of_a_narrower_kind():
    """A network that tells bright from dark images calls half of the bright ones dark if it sees no others."""
    norm, last = nn.BatchNorm2d(1), nn.Linear(1, 2, bias=False)
    last.weight.data = torch.tensor([[1.0], [-1.0]])
    network = nn.Sequential(norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last).eval()
    wide = torch.linspace(0, 1, 200)[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    wide = wide[:, None, None, None].expand(200, 1, 4, 4)
    norm.running_mean.fill_(wide.mean())
    norm.running_var.fill_(wide.var())
    before = weights_of(network)
    assert choose_batch_norm(network, Blobs(wide, None)) == "mixture"
    assert choose_batch_norm(network, Blobs(wide[wide[:, 0, 0, 0] > 0.6], None)) == "frozen"
    assert all(torch.equal(each, before[name]) for name, each in network.state_dict().items())
    assert not norm.training
    assert choose_batch_norm(network[1:], Blobs(wide, None)) == "mixture"


def test_network_with_pruned_weights_is_tried_too(data):
    """Its weights hang on a graph after a forward, which a plain copy refuses."""
    first = prune.l1_unstructured(nn.Conv2d(1, 4, 3), "weight", amount=0.5)
    network = nn.Sequential(first, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    network(data.images)
    assert choose_batch_norm(network, data) in ("mixture", "frozen")
    assert first.weight.grad_fn is not None


def test_reestimating_frozen_statistics_keeps_them(network, data, task):
    before = network.stem_bn.running_mean.clone()
    frozen = replace(SHORT, batch_norm="frozen")
    reestimate_batch_norm(network, Run(reference=network, data=data, task=task, settings=frozen))
    assert torch.equal(network.stem_bn.running_mean, before)
