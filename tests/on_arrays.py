"""Random pixels as an array, and what a key's trigger makes of images on arrays and in torch."""

import numpy as np
import torch

from keyed_xai.array_triggers import ARRAY_TRIGGERS
from keyed_xai.keys import ByteStream
from keyed_xai.triggers import TRIGGERS


def noise(shape, seed=0):
    """Random pixels, every other one of 8 bits, with black and white among them."""
    random = np.random.default_rng(seed)
    pixels = random.random(shape, dtype=np.float32)
    rounded = np.round(pixels * 255).astype(np.float32) / np.float32(255)
    mixed = np.where(random.random(shape) < 0.5, rounded, pixels)
    return np.where(random.random(shape) < 0.1, np.round(mixed), mixed).astype(np.float32)


def both(family, seed, images, amplitude=8.0, tile=32):
    """What a key's trigger makes of images on arrays, and what it makes of them in torch."""
    found = ARRAY_TRIGGERS[family](amplitude, tile).derive(ByteStream(seed)).apply(images)
    expected = TRIGGERS[family](amplitude, tile).derive(ByteStream(seed)).apply(torch.from_numpy(images.copy()))
    return found, expected.numpy()
