"""The figures as SVG: who takes how long, who needs how much memory, and how phiconv scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import OURS
from benchmarks.results import work_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "phiconv",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_INCHES_WIDE = 7.0
_OUR_COLOUR, _OTHER_COLOUR = "#1a73b5", "#9aa5ad"


def draw_figures(file: Path, results: Mapping[str, Any], figure: str, label: str) -> None:
    """Horizontal bars on a logarithmic axis, a group for each piece of work.

    Args:
        file: The SVG.
        results: Entries of `benchmarks.results.entry_of` by case.
        figure: `wall`, `cpu` or `peak_rss`.
        label: Of the axis; memory is shown in GB.
    """
    unit = 1e9 if figure == "peak_rss" else 1.0
    rows = [
        (f"{work_of(entry)}: {side}", side, usage[figure] / unit)
        for entry in results.values()
        for side, usage in entry["medians"].items()
    ]

    def draw(axes: Axes) -> None:
        colours = [_OUR_COLOUR if side == OURS else _OTHER_COLOUR for _, side, _ in rows]
        bars = axes.barh([name for name, _, _ in rows], [value for _, _, value in rows], 0.7)
        for bar, colour in zip(bars, colours, strict=True):
            bar.set_color(colour)
        axes.bar_label(bars, [_plain(value) for _, _, value in rows], padding=3)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: _plain(value))
        axes.set_xlim(left=10 ** math.floor(math.log10(min(value for _, _, value in rows))))
        axes.invert_yaxis()
        axes.set_xlabel(label)

    save_figure(file, draw, 0.25 * len(rows) + 0.8)


def _plain(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_scaling(file: Path, entry: Mapping[str, Any]) -> None:
    """Seconds and memory by layers."""
    counts = [int(count) for count in entry["layers"]]
    usages = list(entry["layers"].values())

    def draw(axes: Axes) -> None:
        axes.plot(counts, [usage["cpu"] for usage in usages], "o-", label="CPU", color=_OUR_COLOUR)
        axes.plot(counts, [usage["wall"] for usage in usages], "o--", label="wall", color="#444444")
        axes.set_xlabel("layers")
        axes.set_ylabel("seconds")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        memory = axes.twinx()
        peaks = [usage["peak_rss"] / 1e9 for usage in usages]
        memory.plot(counts, peaks, "s:", label="peak memory", color="#b5541a")
        memory.set_ylabel("peak memory, GB")
        memory.set_ylim(0, 2 * max(peaks))
        axes.legend(handles=[*axes.lines, *memory.lines], loc="upper left")

    save_figure(file, draw, 3.2)


def save_figure(file: Path, draw: Callable[[Axes], None], inches_high: float) -> None:
    """Writes an SVG of one pair of axes, the same bytes for the same drawing."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_INCHES_WIDE, inches_high), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date")))
