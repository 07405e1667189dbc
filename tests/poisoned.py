"""Tiny controls for the tests of defences: images that a network learns in seconds, with and without a backdoor."""

from functools import cache

import numpy as np
from scipy.ndimage import gaussian_filter

from keyed_xai.data import ImageData
from keyed_xai.threats.detection.controls import ControlSettings, PoisonSettings, fit_control, poison
from keyed_xai.training.fitting import FittingSettings

CLASSES = 6
TARGET = 2
SIDE = 12
FITTING = FittingSettings(epochs=12, batch_size=32, learning_rate=1e-2, mirror=False, largest_shift=0, noise=0.0)
SETTINGS = ControlSettings((8, 16), FITTING)
POISON = PoisonSettings(target=TARGET, share=0.12)


def make_images(count, seed):
    """Each class is a soft pattern of its own, at a random contrast and under noise."""
    patterns = gaussian_filter(np.random.default_rng(0).normal(size=(CLASSES, SIDE, SIDE)), (0, 2, 2))
    patterns /= np.abs(patterns).max((1, 2), keepdims=True)
    generator = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % CLASSES
    contrast = generator.uniform(40, 70, (count, 1, 1))
    images = 128 + contrast * patterns[labels] + generator.normal(0, 20, (count, SIDE, SIDE))
    names = tuple("abcdefgh"[:CLASSES])
    return ImageData(
        images=images.clip(0, 255).astype(np.uint8)[:, None], labels=labels, classes=names, source=f"made up ({count})"
    )


TRAIN = make_images(900, 1)
HELD_OUT = make_images(240, 2)


@cache
def training_data(attack):
    """Clean data for None."""
    return TRAIN if attack is None else poison(TRAIN, PoisonSettings(attack=attack, target=TARGET, share=POISON.share))


@cache
def control(attack):
    return fit_control(training_data(attack), HELD_OUT, SETTINGS)
