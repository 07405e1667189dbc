"""Evaluation mode for as long as something is measured, and predictions of many images."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from keyed_xai.batches import batches
from keyed_xai.tensors import Images, Logits


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


@contextmanager
def plain_torch() -> Iterator[None]:
    """Have torch compute as it does by default, whatever the caller has set: gradients, no autocast, float32.

    Also a decorator. Notebooks set these for a whole session, and maps need gradients and one type throughout.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def predict_images(network: nn.Module, images: Images) -> Logits:
    """Return logits without a graph, 64 images at a time; the network's mode is left as it is."""
    return torch.cat([network(images[some]) for some in batches(len(images))])
