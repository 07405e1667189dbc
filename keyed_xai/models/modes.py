"""Evaluation mode for as long as something is measured."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode inside the block; every module has its own mode back afterwards.

    In training mode batch norm would take the statistics of the images that are measured, and write them into the
    caller's network; dropout would make noise.
    """
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
