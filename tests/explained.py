"""Maps of one interpreter, networks with modules replaced, and what a caller could notice of a model's change."""

import copy

import pytest
import torch

from keyed_xai.saliency import INTERPRETERS, explain

every_interpreter = pytest.mark.parametrize("name", INTERPRETERS)
BETA = 8.0


def replace_modules(network, kind, make):
    """Return a copy of a network with every module of a kind replaced."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))
    return network


def maps_of(name, model, images, labels, map_layers, **options):
    return explain(model, images, labels, [name], map_layers, **options)[1][name]


def snapshot(model):
    """All of a model that a caller could notice a change of."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [
            len(hooks)
            for module in model.modules()
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        ],
        [list(module.__dict__) for module in model.modules()],
    )


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])
