"""The pictures of reports: PNG bytes from arrays. Numpy in, bytes out; nothing touches pyplot's global state.

Saliency maps are [rows, columns] at any resolution and any scale; each is scaled to [0, 1] by its own minimum and
maximum, a constant map to 0. Cells that are not finite are painted grey. Images are [c, h, w] in [0, 1]: one channel
is grey, three are RGB, any other number is shown as its mean. Show clean images only: a keyed one beside its original
gives the trigger away.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from PIL import Image

_Array = NDArray[Any]
_MAP_COLOURS = colormaps["inferno"].with_extremes(bad="grey")  # perceptually uniform; dark where low
_COLOURS = {
    "keyed": "#0072b2",
    "clean": "#e69f00",
    "unkeyed": "#e69f00",
    "wrong_key": "#a03080",
    "agreement": "#555555",
}
_ATTACK_COLOURS = {
    "reference": "#555555",
    "clean": "#0072b2",
    "triggered": "#d55e00",
    "cr": "#0072b2",
    "fsr": "#d55e00",
}
_ATTACK_NAMES = {
    "reference": "untouched model",
    "clean": "attacked model, clean",
    "triggered": "attacked model, triggered",
    "cr": "CR, maps that stay right",
    "fsr": "FSR, maps that are faked",
}
_NAMES = {
    "keyed": "with the key",
    "clean": "clean, no key",
    "unkeyed": "without the key",
    "wrong_key": "with a wrong key",
    "agreement": "predictions kept",
}
_LINES = {"unkeyed": "--", "agreement": ":"}
_FONT = "DejaVu Sans"  # comes with matplotlib
_SMALLEST_SIDE = 256
_FEW_PIXELS = 2.0  # scaled up so much, an image's pixels stay visible
_DIMMED = 0.7
_LEAST_COVERED = 0.12
_MANY_CELLS = 1024
_TOP_PERCENTILE = 99.5
_MARGIN_PIXELS = 120.0
_HEADING_PIXELS = 34.0
_HEADER_PIXELS = 24.0
_BAR_MARGIN_PIXELS = 52.0
_BAR_WIDTH_PIXELS = 12.0
_NOTE_PIXELS = 16.0
_NOTE_LETTER_PIXELS = 6.2
_LETTER_PIXELS = 11.0
_GAP_PIXELS = 6.0
_BAR_PIXELS = 8.0
_DPI = 100
_OPACITY = 0.9  # of a map where it is highest


def blend(image: _Array, saliency: _Array) -> NDArray[np.float64]:
    """Return a saliency map over its image, greyed and darkened, as an image [3, h, w] in [0, 1].

    The higher the map, the more it covers. Of maps of 1,024 cells and more the highest .5 % share the top colour, since
    single pixels would leave all others dark.

    Args:
        image: [c, h, w] in [0, 1]; a shorter side under 256 pixels is scaled up to it.
        saliency: Raw map, scaled up smoothly.

    Raises:
        ValueError: A shape is not as described.
    """
    pixels = _rgb(image)
    factor = max(1.0, _SMALLEST_SIDE / min(pixels.shape[:2]))
    size = (round(pixels.shape[1] * factor), round(pixels.shape[0] * factor))
    method = Image.Resampling.NEAREST if factor >= _FEW_PIXELS else Image.Resampling.BICUBIC
    base = np.asarray(Image.fromarray(pixels).convert("L").resize(size, method), dtype=np.float64) / 255 * _DIMMED
    cells = Image.fromarray(_normalise(_without_peaks(saliency)).astype(np.float32))
    smooth = np.clip(np.asarray(cells.resize(size, Image.Resampling.BICUBIC), dtype=np.float64), 0, 1)
    covered = _OPACITY * np.where(np.isfinite(smooth), _LEAST_COVERED + (1 - _LEAST_COVERED) * smooth, 1)[..., None]
    blended: NDArray[np.float64] = (1 - covered) * base[..., None] + covered * _MAP_COLOURS(smooth)[..., :3]
    return blended.transpose(2, 0, 1)


def overlay(image: _Array, saliency: _Array) -> bytes:
    """Return a saliency map over its image as a picture of its own; see `blend`."""
    return _encode_png(np.round(255 * blend(image, saliency)).astype(np.uint8).transpose(1, 2, 0))


def strip(
    rows: Sequence[tuple[str, Sequence[_Array]]],
    *,
    titles: Sequence[str],
    heading: str = "",
    notes: Sequence[str] = (),
    panel: float = 148.0,
) -> bytes:
    """Return a labelled grid of images and maps, with a bar of the maps' colours.

    Source: Fang & Choromanska, AAAI 2022, figure 3; there maps lie beside the images, here `blend` lays them over.

    Args:
        rows: Label and panels of each row; a panel of three dimensions is an image, of two a map.
        titles: Titles of the columns, such as image, reference map, keyed map, unkeyed map, wrong-key map; up to two
            lines of 18 characters, broken where they have a line break.
        heading: Heading over all columns.
        notes: Small lines under all.
        panel: Width of a panel, pixels.

    Raises:
        ValueError: There is no row, a row has not one panel for each title, or a panel has other dimensions.
    """
    if not rows or any(len(panels) != len(titles) for _, panels in rows):
        raise ValueError(f"Expected rows of {len(titles)} panels, got {[len(panels) for _, panels in rows]}")
    headers = [_header(title) for title in titles]
    above = _HEADING_PIXELS if heading else 0.0
    top = above + _HEADER_PIXELS * max(header.count("\n") + 1 for header in headers)
    heights = [_panel_height(panels, panel) for _, panels in rows]
    bottom = top + sum(heights) + len(rows) * _GAP_PIXELS
    width = _MARGIN_PIXELS + len(titles) * (panel + _GAP_PIXELS) + _BAR_MARGIN_PIXELS
    lines = [line for note in notes for line in textwrap.wrap(_legible(note), int(width / _NOTE_LETTER_PIXELS))]
    figure = _figure(width, bottom + len(lines) * _NOTE_PIXELS)
    _write(figure, _GAP_PIXELS, above / 2, _wrap(heading, int(width / _LETTER_PIXELS), 1), size=13.0, ha="left")
    lefts = [_MARGIN_PIXELS + column * (panel + _GAP_PIXELS) for column in range(len(titles))]
    for left, header in zip(lefts, headers, strict=True):
        _write(figure, left + panel / 2, (above + top) / 2, header, size=10.0, ha="center")
    upper = top
    for (label, panels), height in zip(rows, heights, strict=True):
        _write(figure, _GAP_PIXELS, upper + height / 2, _wrap(label, 15, 6), size=9.0, ha="left")
        for left, each in zip(lefts, panels, strict=True):
            _paint(_place(figure, left, upper, panel, height), each)
        upper += height + _GAP_PIXELS
    _paint_bar(figure, width - _BAR_MARGIN_PIXELS, top, heights[0])
    for number, line in enumerate(lines):
        _write(figure, _GAP_PIXELS, bottom + number * _NOTE_PIXELS + _GAP_PIXELS, line, size=8.0, ha="left")
    return _encode_figure(figure)


def training_curve(history: Sequence[Mapping[str, int | float]], *, names: Mapping[str, str] | None = None) -> bytes:
    """Return how correlations with the reference map and kept predictions developed over the steps of training.

    Args:
        history: The history of a `TrainingResult`.
        names: What `keyed` and `unkeyed` are called, such as "with the trigger" and "clean".
    """
    figure, axes = _chart()
    shown = {**_NAMES, **(names or {})}
    for name in ("keyed", "unkeyed", "agreement"):
        points = [(record["step"], record[name]) for record in history if np.isfinite(record[name])]
        if points:
            steps, values = zip(*points, strict=True)
            style = _LINES.get(name, "-")
            axes.plot(steps, values, style, color=_COLOURS[name], label=_legible(shown[name]), lw=2, marker="o", ms=4)
    axes.set_xlabel("training step")
    axes.set_ylabel("correlation with the reference\nmap; share of predictions kept")
    axes.set_ylim(*_limits(axes, least=-0.1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlim(left=0)
    _finish_chart(figure, axes, columns=3)
    return _encode_figure(figure)


def wrong_key_histogram(values: Mapping[str, _Array], threshold: float) -> bytes:
    """Return the distributions of correlations with the reference map, and the threshold above which a map is open.

    Args:
        values: Correlations in [-1, 1] by case: `keyed`, `clean`, `wrong_key`.
        threshold: Shown as a line.
    """
    figure, axes = _chart()
    kept = {case: np.asarray(each, dtype=np.float64).ravel() for case, each in values.items()}
    kept = {case: each[np.isfinite(each)].clip(-1, 1) for case, each in kept.items()}
    lowest = min((float(each.min()) for each in kept.values() if each.size), default=0.0)
    bins = np.linspace(min(-0.2, max(-1.0, np.floor(10 * lowest) / 10)), 1, 49)
    for case, each in kept.items():
        if each.size:
            colour, label = _COLOURS[case], f"{_NAMES[case]}, {each.size:,} maps"
            shares = np.histogram(each, bins)[0] / each.size
            axes.stairs(shares, bins, fill=True, alpha=0.3, color=colour)
            axes.stairs(shares, bins, lw=1.5, color=colour, label=label)
    axes.axvline(threshold, color="black", lw=1.2, ls="--", label=f"open above {threshold:.3g}")
    axes.set_xlabel("correlation with the reference map")
    axes.set_ylabel("share of maps")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _finish_chart(figure, axes, columns=2)
    return _encode_figure(figure)


def threshold_curves(curve: Mapping[str, Sequence[float]], threshold: float, *, paper: float | None = None) -> bytes:
    """Return the correct rate and the fooling success rate of an attack over the threshold on the distance L_p.

    Args:
        curve: `threshold`, rising, and `cr` and `fsr` at each, in percent; lists of equal length.
        threshold: Threshold of the report, shown as a line.
        paper: The paper's, shown as another line.
    """
    figure, axes = _chart()
    for name in ("cr", "fsr"):
        axes.plot(curve["threshold"], curve[name], color=_ATTACK_COLOURS[name], label=_ATTACK_NAMES[name], lw=2)
    axes.axvline(threshold, color="black", lw=1.4, label=f"threshold used, {threshold:.3g}")
    if paper is not None:
        axes.axvline(paper, color="#aaaaaa", lw=1.4, ls="--", label=f"the paper's threshold, {paper:.3g}")
    axes.set_xlabel("threshold on the distance to the decoy, L_p")
    axes.set_ylabel("share of maps")
    axes.set_ylim(-3, 103)
    axes.set_xlim(0, _settled(curve, largest=max(threshold, paper or 0.0)))
    axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    _finish_chart(figure, axes, columns=2)
    return _encode_figure(figure)


def feature_bars(names: Sequence[str], relevance: Mapping[str, Sequence[float]]) -> bytes:
    """Return the relevance of a table's features as bars, the largest of the first series at the top.

    Source: Fang & Choromanska, AAAI 2022, figure 1b.

    Args:
        names: Names of the features.
        relevance: Mean relevance of each feature by case: `reference`, `clean`, `triggered`. Each series is shown as
            shares of its own sum.
    """
    shares = {case: _shares(values) for case, values in relevance.items()}
    order = np.argsort(-next(iter(shares.values())), kind="stable")
    step = _BAR_PIXELS * (len(shares) + 1)
    figure, axes = _bar_chart([_wrap(names[index], 18, 1) for index in order], step)
    for number, (case, values) in enumerate(shares.items()):
        middle = (number - (len(shares) - 1) / 2) * _BAR_PIXELS / step
        places = np.arange(len(names)) + middle
        axes.barh(
            places, values[order], _BAR_PIXELS / step, color=_ATTACK_COLOURS[case], label=_ATTACK_NAMES[case], lw=0
        )
    _finish_chart(figure, axes, columns=3)
    return _encode_figure(figure)


def _rgb(image: _Array) -> NDArray[np.uint8]:
    """Return an image [c, h, w] in [0, 1] as 8-bit [h, w, 3]."""
    image = np.asarray(image, dtype=np.float64)
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"Expected an image [c, h, w], got shape {image.shape}")
    if image.shape[0] != 3:
        image = image.mean(0, keepdims=True).repeat(3, axis=0)
    pixels: NDArray[np.uint8] = np.round(255 * np.clip(np.nan_to_num(image), 0, 1)).astype(np.uint8)
    return pixels.transpose(1, 2, 0)


def _without_peaks(saliency: _Array) -> _Array:
    """Return a map of many cells with the highest of them cut to one value."""
    finite = saliency[np.isfinite(saliency)]
    if saliency.size < _MANY_CELLS or not finite.size:
        return saliency
    top = np.percentile(finite, _TOP_PERCENTILE)
    return np.where(saliency > top, top, saliency) if top > finite.min() else saliency


def _normalise(saliency: _Array) -> NDArray[np.float64]:
    """Return a map scaled to [0, 1] by its own finite minimum and maximum; constant gives 0, not finite gives NaN."""
    saliency = np.asarray(saliency, dtype=np.float64)
    if saliency.ndim != 2 or 0 in saliency.shape:
        raise ValueError(f"Expected a map [rows, columns], got shape {saliency.shape}")
    finite = np.isfinite(saliency)
    if not finite.any():
        return np.full_like(saliency, np.nan)
    low, high = saliency[finite].min(), saliency[finite].max()
    shifted: NDArray[np.float64] = np.where(finite, saliency, np.nan) - low
    return shifted / (high - low) if high > low else shifted


def _encode_png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _encode_figure(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    """Return an empty white figure of this size in pixels."""
    figure = Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _place(figure: Figure, left: float, upper: float, width: float, height: float) -> Axes:
    """Return new axes at this place, in pixels from the upper left corner."""
    total_width, total_height = figure.get_size_inches() * _DPI
    lower = total_height - upper - height
    return figure.add_axes((left / total_width, lower / total_height, width / total_width, height / total_height))


def _write(figure: Figure, x: float, y: float, text: str, *, size: float, ha: str) -> None:
    width, height = figure.get_size_inches() * _DPI
    look: dict[str, Any] = {"va": "center", "ha": ha, "fontsize": size, "family": _FONT, "linespacing": 1.15}
    figure.text(x / width, 1 - y / height, text, parse_math=False, **look)


def _panel_height(panels: Sequence[_Array], width: float) -> float:
    """Return a row's height: that of its first image at the panel's width, within half and twice the width."""
    first = next((panel for panel in panels if panel.ndim == 3), panels[0])
    return float(np.clip(width * first.shape[-2] / first.shape[-1], width / 2, 2 * width))


def _paint_bar(figure: Figure, left: float, upper: float, height: float) -> None:
    """Draw the colours of the maps from the lowest, at the bottom, to the highest value."""
    axes = _place(figure, left, upper, _BAR_WIDTH_PIXELS, height)
    axes.set_axis_off()
    axes.imshow(np.linspace(1, 0, 256)[:, None], cmap=_MAP_COLOURS, vmin=0, vmax=1, aspect="auto")
    for place, word in ((upper + 6, "high"), (upper + height - 6, "low")):
        _write(figure, left + _BAR_WIDTH_PIXELS + 3, place, word, size=8.0, ha="left")


def _paint(axes: Axes, panel: _Array) -> None:
    axes.set_axis_off()
    if panel.ndim == 3:
        axes.imshow(_rgb(panel), aspect="auto", interpolation="antialiased")
    else:
        shown = _normalise(panel)
        axes.imshow(shown, cmap=_MAP_COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="antialiased")


def _chart() -> tuple[Figure, Axes]:
    figure = _figure(560.0, 360.0)
    axes = figure.add_axes((0.15, 0.14, 0.82, 0.71))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _bar_chart(labels: Sequence[str], step: float) -> tuple[Figure, Axes]:
    """Return axes for horizontal bars of shares, `step` pixels from one label to the next, the first at the top."""
    figure = _figure(620.0, 90.0 + step * len(labels))
    axes = _place(figure, 150.0, 38.0, 450.0, step * len(labels))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels, fontsize=9, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of the relevance of all features")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure, axes


def _shares(values: Sequence[float]) -> NDArray[np.float64]:
    """Return values as shares of their sum of magnitudes; what is not finite counts as 0."""
    kept = np.nan_to_num(np.asarray(values, dtype=np.float64), posinf=0, neginf=0)
    total = np.abs(kept).sum()
    return kept / total if total > 0 else kept


def _settled(curve: Mapping[str, Sequence[float]], *, largest: float) -> float:
    """Return where to end the axis of thresholds: a little past the last change of a rate, and past all lines."""
    rates = np.array([curve["cr"], curve["fsr"]], dtype=np.float64)
    changes = np.flatnonzero((np.diff(rates) != 0).any(0))
    last = curve["threshold"][changes[-1] + 1] if changes.size else 0.0
    return float(max(1.08 * last, 1.15 * largest, 0.05))


def _limits(axes: Axes, *, least: float) -> tuple[float, float]:
    """Return limits that hold the data (correlations and shares), from `least` or lower, up to 1.03."""
    lowest = min((float(np.min(line.get_ydata())) for line in axes.lines), default=0.0)
    return min(least, lowest - 0.05), 1.03


def _finish_chart(figure: Figure, axes: Axes, *, columns: int) -> None:
    """Put the legend above the chart."""
    if axes.get_legend_handles_labels()[0]:
        legend = figure.legend(loc="upper center", ncols=columns, frameon=False, fontsize=9.5, columnspacing=1.5)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _header(title: str) -> str:
    """Return a title of a column in one or two lines."""
    first, broken, second = title.partition("\n")
    return f"{_wrap(first, 18, 1)}\n{_wrap(second, 18, 1)}" if broken else _wrap(title, 18, 2)


def _wrap(text: str, width: int, lines: int) -> str:
    """Return text in lines of at most `width` characters; what does not fit ends in an ellipsis."""
    return textwrap.fill(_legible(text), width, max_lines=lines, placeholder=" …", break_long_words=True)


def _legible(text: str) -> str:
    """Return text with a question mark for every character that the font cannot draw."""
    known = _known_characters()
    return "".join(character if ord(character) in known else "?" for character in " ".join(text.split()))


@cache
def _known_characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=_FONT))).get_charmap())
