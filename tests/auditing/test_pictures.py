"""Curves decode, show what they are given, and no curve makes them fail."""

import io

import numpy as np
import pytest
from PIL import Image

from keyed_xai.auditing.pictures import stage_curve

ROWS = [
    {"epoch": number, "accuracy": 0.9, "correlation": {"gradcam": {"keyed": 0.9, "unkeyed": 0.1 * number}}}
    for number in range(6)
]
KEYED, UNKEYED = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)


def decode(png):
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    return np.asarray(picture.convert("RGB"))


def count(png, colour):
    return int((decode(png) == colour).all(2).sum())


def test_both_maps_are_drawn():
    drawn = stage_curve(ROWS)
    assert decode(drawn).shape == (340, 560, 3)
    assert min(count(drawn, KEYED), count(drawn, UNKEYED)) > 50


def test_only_what_was_measured_is_drawn():
    drawn = stage_curve([{"share": 0.1 * number, "accuracy": 0.5, "attack_success": 0.9} for number in range(4)])
    assert count(drawn, KEYED) == count(drawn, UNKEYED) == 0
    assert count(drawn, (0xD5, 0x5E, 0x00)) > 50


def test_the_worst_interpreter_is_drawn():
    worse = {"vbp": {"keyed": 0.2, "unkeyed": 0.8}}
    one = [{"epoch": n, "correlation": worse} for n in range(3)]
    two = [{"epoch": n, "correlation": worse | {"gradcam": {"keyed": 0.9, "unkeyed": 0.0}}} for n in range(3)]
    assert stage_curve(one) == stage_curve(two)


@pytest.mark.parametrize(
    "rows",
    [
        [{"share": 0.5, "accuracy": 1.0}, {"epoch": 1, "accuracy": 0.5}],
        [{"weight": 0.0, "accuracy": -0.0, "correlation": {}}],
        [{"accuracy": 0.5}],
        [{"epoch": n, "accuracy": 0.5} for n in range(101)],
        [{}],
        [],
    ],
)
def test_any_stages_can_be_drawn(rows):
    assert decode(stage_curve(rows)).shape == (340, 560, 3)
