"""The figures of `benchmarks.awq_accuracy` as SVG: divergence, loss by weight, time, by method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = Sequence[Mapping[str, Any]]

COLOURS: Mapping[str, str] = {
    "nearest": "#9aa5ad",
    "AWQ": "#d9a441",
    "AWQ + clip": "#b5541a",
    "GPTQ": "#7fb3d5",
    "AWQ + GPTQ": "#1a73b5",
}
"""The methods that are drawn, the plain ones first."""
_WIDTH = 0.8


def draw_awq(folder: Path, figures: Figures) -> None:
    """Writes `awq-kl.svg`, `awq-loss.svg` and `awq-time.svg`.

    Args:
        folder: An existing folder.
        figures: One entry a checkpoint, grid and method: `kl` in nats, `seconds` of the search, and
            `losses`, the relative output error of each weight with its `layer` and `group`.
    """
    _draw_bars(folder / "awq-kl.svg", figures, "kl", "KL divergence from fp32 x 1000", 1000)
    _draw_bars(folder / "awq-time.svg", figures, "seconds", "search, seconds", 1)
    _draw_losses(folder / "awq-loss.svg", figures)


def _draw_bars(file: Path, figures: Figures, key: str, label: str, unit: float) -> None:
    """A group of bars for each checkpoint and grid, one bar a method, on a logarithmic axis."""
    drawn = [figure for figure in figures if figure["method"] in COLOURS]
    places = list(dict.fromkeys(_place(figure) for figure in drawn))

    def draw(axes: Axes) -> None:
        bar = _WIDTH / len(COLOURS)
        for index, (method, colour) in enumerate(COLOURS.items()):
            found = [figure for figure in drawn if figure["method"] == method]
            x = [
                places.index(_place(figure)) - _WIDTH / 2 + (index + 0.5) * bar for figure in found
            ]
            axes.bar(x, [unit * figure[key] for figure in found], bar, label=method, color=colour)
        axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=10 ** math.floor(math.log10(min(unit * f[key] for f in drawn))))
        axes.set_xticks(range(len(places)), places, rotation=35, ha="right", fontsize=7)
        axes.legend(ncols=len(COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1))

    save_figure(file, draw, 3.4)


def _draw_losses(file: Path, figures: Figures) -> None:
    """The relative error of every weight's outputs, of the checkpoint with outliers, group 128."""
    drawn = [
        figure
        for figure in figures
        if figure["checkpoint"].endswith("outliers") and figure["grid"] == "128 asymmetric"
    ]

    def draw(axes: Axes) -> None:
        for figure in drawn:
            colour = COLOURS.get(figure["method"])
            if colour is None:
                continue
            losses = [record["loss"] for record in figure["losses"]]
            axes.plot(range(len(losses)), losses, "o-", label=figure["method"], color=colour)
        names = [f"{record['layer']} {record['group']}" for record in drawn[0]["losses"]]
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axes.set_yscale("log")
        axes.set_ylabel("relative output error")
        axes.legend(ncols=len(COLOURS), loc="lower center", bbox_to_anchor=(0.5, 1))

    save_figure(file, draw, 3.6)


def _place(figure: Mapping[str, Any]) -> str:
    return f"{figure['checkpoint'].replace('outliers', 'outl.')}, {figure['grid']}"
