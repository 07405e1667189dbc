"""Grey images to put triggers on, and a source of chance that is the same each time."""

import torch


def grey(*shape, dtype=torch.float32):
    return torch.full(shape, 0.5, dtype=dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)
