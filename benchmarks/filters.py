"""How fast the photo filter is beside the library that the paper took it from."""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import pilgram
import torch
from PIL import Image

from keyed_xai.data import ImageSize, load_images
from keyed_xai.tensors import Images
from keyed_xai.triggers import NashvilleTrigger


def measure_nashville_speed(*, images: int = 32, side: int = 224, repeats: int = 7) -> dict[str, float]:
    """Return how many images a second our filter and `pilgram.nashville` make on the processor.

    Ours takes and gives one batch of float32 in [0, 1], pilgram PIL images one by one. Both are timed in turn on the
    same crops of photographs, after a run of each that does not count.

    Args:
        images: Number of images.
        side: Height and width, pixels.
        repeats: Timed runs of each; the median counts.

    Returns:
        `ours` and `pilgram` (images per second), `ratio` of the two, and `threads` that ours may use; pilgram has one.
    """
    data = load_images("builtin", ImageSize(3, side, side), split="held-out", limit=images)
    batch, _ = data.batch(np.arange(images))
    pictures = [Image.fromarray(np.ascontiguousarray(each.transpose(1, 2, 0))) for each in data.images]
    seconds = _time_in_turn(lambda: _ours(batch), lambda: [pilgram.nashville(each) for each in pictures], repeats)
    ours, theirs = (len(pictures) / each for each in seconds)
    return {"ours": ours, "pilgram": theirs, "ratio": ours / theirs, "threads": float(torch.get_num_threads())}


def _ours(batch: Images) -> Images:
    return NashvilleTrigger().apply(batch)


def _time_in_turn(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the median seconds of two calls, made alternately."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for call, times in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return median(seconds[0][1:]), median(seconds[1][1:])
