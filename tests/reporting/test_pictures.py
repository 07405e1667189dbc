"""Pictures decode to the size they promise, and no input that a model can give makes them fail."""

import io

import numpy as np
import pytest
from PIL import Image

from keyed_xai.reporting import pictures

RAMP = np.arange(16.0).reshape(4, 4)
RED = np.stack([np.ones((40, 60)), np.zeros((40, 60)), np.zeros((40, 60))])
HISTORY = [{"step": s, "loss": 1.0, "keyed": 0.9, "unkeyed": -0.4, "agreement": 0.99} for s in (100, 200)]
CURVE = {"threshold": [0.0, 0.1, 0.2, 1.0], "cr": [100.0, 99.0, 40.0, 0.0], "fsr": [0.0, 98.0, 100.0, 100.0]}


def decode(png):
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    return np.asarray(picture.convert("RGB"), dtype=np.int64)


@pytest.mark.parametrize(
    ("image", "size"),
    [((3, 300, 400), (300, 400)), ((1, 28, 28), (256, 256)), ((3, 40, 60), (256, 384)), ((5, 256, 260), (256, 260))],
)
def test_overlay_has_the_size_of_its_image_or_a_legible_one(image, size):
    assert decode(pictures.overlay(np.full(image, 0.5), RAMP)).shape == (*size, 3)


def shown_over_grey(saliency):
    return pictures.blend(np.full((1, 256, 256), 0.5), saliency)


def test_blend_without_opacity_is_the_image_greyed_and_darkened(monkeypatch):
    monkeypatch.setattr(pictures, "_OPACITY", 0.0)
    red = pictures.blend(RED, RAMP)
    assert red.shape == (3, 256, 384)
    assert np.ptp(red) == 0
    assert 0.15 < red[0, 0, 0] < 0.299


def test_blend_is_brightest_where_the_map_is_highest_whatever_its_scale():
    shown = shown_over_grey(1e-20 * RAMP).sum(0)
    assert shown[-1, -1] == pytest.approx(shown.max())
    assert shown[-1, -1] > 1.5 * shown[0, 0]


@pytest.mark.parametrize("saliency", [np.zeros((4, 4)), np.full((4, 4), 7.0), np.full((4, 4), -np.inf)])
def test_constant_map_is_painted_evenly(saliency):
    shown = shown_over_grey(saliency)
    assert np.ptp(shown.reshape(3, -1), axis=1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("side", "dark"), [(31, True), (32, False)])
def test_single_peak_leaves_a_fine_map_its_colours(side, dark):
    saliency = np.tile(np.linspace(0, 1, side), (side, 1))
    saliency[0, 0] = 1000
    shown = shown_over_grey(saliency).sum(0)
    assert (shown[-1, -1] < 1) == dark


def test_sparse_fine_map_is_not_blank():
    saliency = np.zeros((64, 64))
    saliency[20, 20] = 1
    assert shown_over_grey(saliency)[:, 82, 82].sum() > 2


def test_cell_that_is_not_finite_is_grey_and_leaves_the_others_their_range():
    cells = np.array([[np.nan, 0.0], [1.0, np.inf]])
    shown = decode(pictures.strip([("a", [cells])], titles=["map"]))
    grey, low, high = ((np.abs(shown - colour).max(2) < 3).sum() for colour in ([128] * 3, [0, 0, 4], [252, 255, 164]))
    assert grey > 1000
    assert [low, high] == pytest.approx([grey / 2] * 2, rel=0.2)


def test_strip_has_a_row_for_each_row_and_shows_image_and_map():
    one = decode(pictures.strip([("red", [RED, RAMP])], titles=["image", "map"]))
    two = decode(pictures.strip([("red", [RED, RAMP])] * 2, titles=["image", "map"]))
    assert two.shape[1] == one.shape[1]
    assert two.shape[0] > 1.6 * one.shape[0]
    assert (one == [255, 0, 0]).all(2).sum() > 10_000


@pytest.mark.parametrize("side", [28, 1024])
def test_strip_takes_any_size_and_hostile_labels(side):
    rows = [
        (
            "very-long-unbroken-label" * 5 + " $x_{1 \\frac <b> 猫\n\0",
            [np.zeros((1, side, side)), np.zeros((side, side))],
        )
    ]
    assert decode(pictures.strip(rows, titles=["$\\bad", ""])).shape[0] < 300


@pytest.mark.parametrize("rows", [[], [("a", [RAMP])], [("a", [RAMP, RAMP[0]])]])
def test_strip_refuses_rows_that_do_not_fit(rows):
    with pytest.raises(ValueError, match="Expected"):
        pictures.strip(rows, titles=["one", "two"])


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1], [], [HISTORY[0] | {"keyed": float("nan")}]])
def test_training_curve_is_drawn_for_any_history(history):
    assert decode(pictures.training_curve(history)).shape == (360, 560, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"keyed": np.ones(5), "clean": np.zeros(5), "wrong_key": np.linspace(-1, 0.4, 100)},
        {"keyed": np.array([np.nan, 0.5]), "clean": np.zeros(0)},
        {},
    ],
)
def test_histogram_is_drawn_for_any_values(values):
    assert decode(pictures.wrong_key_histogram(values, 0.5)).shape == (360, 560, 3)


def test_histogram_shows_the_same_shares_for_any_number_of_maps():
    few, many = (pictures.wrong_key_histogram({"keyed": np.full(n, 0.9)}, 0.5) for n in (10, 1000))
    assert (decode(few)[60:] == decode(many)[60:]).all()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: pictures.overlay(RED[0], RAMP),
        lambda: pictures.overlay(RED, RAMP[None]),
    ],
)
def test_wrong_shapes_and_ranges_are_refused(draw):
    with pytest.raises(ValueError, match="xpected"):
        draw()


def test_pictures_are_the_same_every_time():
    assert pictures.training_curve(HISTORY) == pictures.training_curve(HISTORY)


def has_colour(picture, colour):
    return (np.abs(picture - colour).max(2) < 12).any()


@pytest.mark.parametrize(
    "curve",
    [CURVE, {name: [] for name in CURVE}, {"threshold": [0.0, 1.0], "cr": [100.0, 100.0], "fsr": [0.0, 0.0]}],
)
def test_threshold_curves_are_drawn_for_any_curve(curve):
    assert decode(pictures.threshold_curves(curve, 0.15, paper=0.25)).shape == (360, 560, 3)


def test_threshold_curves_show_both_rates_and_both_thresholds():
    alone, beside = (decode(pictures.threshold_curves(CURVE, 0.1, paper=paper)) for paper in (None, 0.2))
    assert has_colour(beside, (0x00, 0x72, 0xB2))
    assert has_colour(beside, (0xD5, 0x5E, 0x00))
    assert has_colour(beside, (0xAA, 0xAA, 0xAA))
    assert (alone != beside).any()


def test_threshold_curves_end_where_the_rates_have_settled():
    early = CURVE | {"threshold": [0.0, 0.001, 0.002, 1.0], "cr": [100.0, 50.0, 0.0, 0.0]}
    wide = decode(pictures.threshold_curves(CURVE, 0.001))
    narrow = decode(pictures.threshold_curves(early, 0.001))
    line = [np.flatnonzero((shown[100:250, 84:] < 40).all((0, 2))).mean() for shown in (wide, narrow)]
    assert line[0] < line[1]


def bar_lengths(picture, colour):
    """Pixels of a colour from the left edge of the bars, row by row."""
    return (np.abs(picture[:, 150:] - colour).max(2) < 12).sum(1)


def test_feature_bars_are_shares_of_their_own_sum_largest_first():
    small = {"reference": [1.0, 3.0], "clean": [0.5, 0.5], "triggered": [9.0, 1.0]}
    large = small | {"triggered": [900.0, 100.0]}
    shown = decode(pictures.feature_bars(["SEX", "AGE"], small))
    assert (shown == decode(pictures.feature_bars(["SEX", "AGE"], large))).all()
    top, bottom = (bar_lengths(shown[half], (0x55, 0x55, 0x55)).max() for half in (slice(38, 70), slice(70, 102)))
    assert top == pytest.approx(3 * bottom, abs=4)


@pytest.mark.parametrize("values", [[0.0] * 23, [float("nan")] * 23, [float("inf"), *[1.0] * 22], [-1.0] * 23])
def test_feature_bars_are_drawn_for_any_values_and_names(values):
    names = ["$x_{1 \\frac", "猫\n\0", "very-long-name" * 9, *"abcdefghijklmnopqrst"]
    shown = decode(pictures.feature_bars(names, {"reference": values, "clean": values}))
    assert shown.shape == (90 + 23 * 24, 620, 3)


def test_strip_breaks_a_title_where_it_says():
    one, two = (decode(pictures.strip([("red", [RED])], titles=[title])) for title in ("map wide", "map\nwide"))
    assert two.shape[0] == one.shape[0] + 24
    assert two.shape[1] == one.shape[1]


def test_strip_has_a_heading_a_bar_of_colours_and_notes():
    plain = decode(pictures.strip([("red", [RED])], titles=["image"]))
    told = decode(pictures.strip([("red", [RED])], titles=["image"], heading="DUCK (.83)", notes=["a " * 60, "b"]))
    assert told.shape[0] == plain.shape[0] + 34 + 4 * 16
    bar = plain[26:120, -46]
    assert bar[0].sum() > 600 > 60 > bar[-1].sum()
    assert (np.diff(bar.sum(1)) <= 6).all()


def test_training_curve_takes_other_names():
    ours, other = (decode(pictures.training_curve(HISTORY, names=names)) for names in (None, {"keyed": "triggered"}))
    assert (ours[:40] != other[:40]).any()
    assert (ours[60:] == other[60:]).all()
