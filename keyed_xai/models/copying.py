"""Copies of networks as training needs them: in float32, whole, and such that they can be copied again at any time."""

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from keyed_xai.errors import ModelError

Network = TypeVar("Network", bound=nn.Module)
_SWITCHES = ("gradient_checkpointing", "grad_checkpointing", "memory_efficient", "use_checkpoint")


def copy_network(network: Network) -> Network:
    """Return a copy of a network in float32; the network itself is left as it was.

    Weights that a module works out anew in each forward (`torch.nn.utils.weight_norm`, `spectral_norm`, `prune`) hang
    on a graph afterwards, which `copy.deepcopy` refuses. The copy lets go of the graph after each forward. Activation
    checkpointing, through which no map's gradient can be read, is turned off where a network has a known switch for it.

    Raises:
        ModelError: Something in the network cannot be copied.
    """
    hanging = {id(tensor): tensor.detach().clone() for module in network.modules() for _, tensor in _derived(module)}
    try:
        with torch.inference_mode(mode=False):
            copied = copy.deepcopy(network, {**hanging}).float()
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"{type(network).__name__} cannot be copied: {error}. Keep what cannot be copied (locks, files, graphs) "
            "out of its modules' attributes."
        ) from error
    for module in copied.modules():
        if any(isinstance(value, Tensor) for value in vars(module).values()):
            module.register_forward_hook(_let_go)
        for switch in _SWITCHES:
            if getattr(module, switch, False) is True:
                setattr(module, switch, False)
    return copied


def _derived(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's plain attributes that hang on a graph."""
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            yield name, value


def _let_go(module: nn.Module, _inputs: object, _output: object) -> None:
    for name, value in list(_derived(module)):
        setattr(module, name, value.detach())
