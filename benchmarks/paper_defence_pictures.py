"""The pictures of figure 5, as PNG bytes: activation clusters (a) and fine-pruning curves (b), a panel for each model.

Source: Fang & Choromanska, AAAI 2022, figure 5.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

_CLEAN, _TRIGGERED, _GREY = "#0072b2", "#d55e00", "#555555"
_COLUMNS = 3
_PANEL = (3.3, 2.9)  # inches
_HEAD = 0.45  # inches, for the legend
_DPI = 100
_LONGEST_TITLE = 40


def draw_clusters(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return where clean and triggered images lie along the two first principal components of their last features.

    Args:
        rows: Rows of a "paper-defences" document for figure 5, at least one.

    Raises:
        ValueError: There is none.
    """
    return _draw_panels(rows, _scatter)


def draw_pruning(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return accuracy, and FSR of each interpreter or the success of a plain backdoor, over the share pruned.

    Args:
        rows: Rows of a "paper-defences" document, at least one.

    Raises:
        ValueError: There is none.
    """
    return _draw_panels(rows, _plot_curve)


def _draw_panels(rows: Sequence[Mapping[str, Any]], draw: Callable[[Axes, Mapping[str, Any]], None]) -> bytes:
    if not rows:
        raise ValueError("Expected at least one model to draw, got none.")
    columns = min(_COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    height = lines * _PANEL[1] + _HEAD
    below_legend = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - _HEAD / height))
    figure = Figure((columns * _PANEL[0], height), dpi=_DPI, facecolor="white", layout=below_legend)
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, row in zip(panels, rows, strict=False):
        axes.set_title(_title(row), fontsize=9, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, row)
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    _add_legend(figure, panels[: len(rows)])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _scatter(axes: Axes, row: Mapping[str, Any]) -> None:
    clusters = row["clusters"]
    for name, colour, marker in (("clean", _CLEAN, "o"), ("triggered", _TRIGGERED, "x")):
        points = np.asarray(clusters["points"][name])
        axes.scatter(
            points[:, 0], points[:, 1], s=12, c=colour, marker=marker, lw=0.8, alpha=0.6, label=f"{name} images"
        )
    found = clusters["within_classes"] or clusters["together"]
    words = "class by class" if clusters["within_classes"] else "all classes together"
    axes.set_xlabel(f"{100 * found['rate']:.1f} % misclustered, {words}:\n{found['band']}", fontsize=8.5)
    axes.set_xticks([])
    axes.set_yticks([])


def _plot_curve(axes: Axes, row: Mapping[str, Any]) -> None:
    curve = row["pruning"]["curve"]
    shares = [stage["share"] for stage in curve]
    axes.plot(shares, [stage["accuracy"] for stage in curve], ":", color=_GREY, lw=2, label="accuracy")
    for name, style in zip(curve[0].get("fooling", {}), ("-", "--", "-."), strict=False):
        values = [stage["fooling"][name]["fsr"] / 100 for stage in curve]
        axes.plot(shares, values, style, color=_TRIGGERED, lw=2, marker="o", ms=3, label=f"FSR, {name}")
    if "attack_success" in curve[0]:
        values = [stage["attack_success"] for stage in curve]
        axes.plot(shares, values, "-", color=_CLEAN, lw=2, marker="s", ms=3, label="backdoor works")
    axes.set_ylim(-0.04, 1.04)
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.set_xlabel("share of the last channels pruned", fontsize=8.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelsize=8)


def _title(row: Mapping[str, Any]) -> str:
    """Return a model's name, shortened in the middle where it is long."""
    name = row["name"]
    half = _LONGEST_TITLE // 2 - 1
    return name if len(name) <= _LONGEST_TITLE else f"{name[:half]}…{name[-half:]}"


def _add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Name every kind of line or point once, at the top."""
    named: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    legend = figure.legend(named.values(), named.keys(), loc="upper center", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
