"""The curves of an audit: what an attack does to a model from stage to stage, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LINES = {
    "accuracy": ("accuracy", "#555555", ":"),
    "keyed": ("maps with the trigger", "#0072b2", "-"),
    "unkeyed": ("maps without it", "#e69f00", "--"),
    "recovered": ("maps with what was found", "#a03080", "-"),
    "attack_success": ("backdoor works", "#d55e00", "-"),
}
_STAGES = {
    "share": ("share of the channels pruned", "{:.0%}"),
    "weight": ("strength of the denoising", "{:g}"),
    "epoch": ("epochs", "{:g}"),
    "step": ("steps of the search", "{:g}"),
}
_MOST_TICKS = 12
_SIZE = (5.6, 3.4)  # inches
_DPI = 100


def stage_curve(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return accuracy, correlations with the right maps, and the success of a plain backdoor, over an attack's stages.

    Args:
        rows: One for each stage: its number as `share`, `weight`, `epoch` or `step`, and any of `accuracy`,
            `correlation` by interpreter (the lowest keyed and the highest unkeyed one are drawn), `attack_success`, and
            of a search for a trigger `recovered`. Where shares are followed by epochs, those come to the right of them.
    """
    figure = Figure(_SIZE, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.13, 0.16, 0.84, 0.68))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    values = [_values(row) for row in rows]
    for name, (label, colour, style) in _LINES.items():
        points = [(place, each[name]) for place, each in enumerate(values) if name in each]
        if points:
            places, heights = zip(*points, strict=True)
            axes.plot(places, heights, style, color=colour, label=label, lw=2, marker="o", ms=3.5)
    lowest = min((value for each in values for value in each.values()), default=0.0)
    axes.set_ylim(min(-0.05, lowest - 0.05), 1.04)
    _name_stages(axes, rows)
    if axes.lines:
        figure.legend(loc="upper center", ncols=4, frameon=False, fontsize=9, columnspacing=1.2, handlelength=1.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _values(row: Mapping[str, Any]) -> dict[str, float]:
    """Return what is drawn of a stage."""
    found = {
        name: float(row[name]) for name in ("accuracy", "attack_success", "recovered") if row.get(name) is not None
    }
    maps = list(row.get("correlation", {}).values())
    if maps:
        found |= {"keyed": min(each["keyed"] for each in maps), "unkeyed": max(each["unkeyed"] for each in maps)}
    return found


def _name_stages(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put numbers under the stages, not more than fit, and say what they count."""
    kinds = [next((kind for kind in _STAGES if kind in row), "") for row in rows]
    labels = [
        _STAGES[kind][1].format(row[kind]) if kind else str(place)
        for place, (kind, row) in enumerate(zip(kinds, rows, strict=True))
    ]
    every = max(1, -(-len(rows) // _MOST_TICKS))
    # The first epoch after shares says that epochs begin; a plain number there would read like a share.
    mixed = len(set(kinds)) > 1
    labels = [f"+{text}" if mixed and kind == "epoch" else text for kind, text in zip(kinds, labels, strict=True)]
    axes.set_xticks(range(0, len(rows), every), labels[::every], fontsize=8)
    names = [_STAGES[kind][0] for kind in dict.fromkeys(kinds) if kind]
    axes.set_xlabel(", then ".join(names))
