"""Plots of a measurement as inline SVG that follows the page's colours, light or dark."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phiconv.report.results import Histogram, LayerErrorRecord, PositionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Stand-ins that matplotlib writes into the SVG, each replaced by a variable of the page's style.
_COLOURS = {"#010203": "--ink", "#040506": "--faint", "#070809": "--accent", "#0a0b0c": "--second"}
_INK, _FAINT, _ACCENT, _SECOND = _COLOURS

# A logarithmic axis over less than this factor would have no two ticks at 1, 2 or 5.
_LEAST_RANGE = 5.0
# Drawn at the width of a phone, so that text keeps its size there; wider pages put two in a row.
_INCHES = (4.7, 2.7)
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _FAINT,
    "grid.alpha": 0.35,
    "legend.frameon": False,
}


def kl_distribution_svg(histogram: Histogram, name: str, *, mean: float | None) -> str:
    """The distribution of KL divergences over positions, its mean marked.

    Args:
        histogram: Counts in logarithmic bins.
        name: Makes ids in the SVG unique in the page; say what is shown.
        mean: Mean KL divergence, nats.
    """
    import numpy as np

    counts = np.array(histogram.counts)
    filled = np.flatnonzero(counts)
    first, last = (int(filled[0]), int(filled[-1])) if filled.size else (0, len(counts) - 1)
    edges = 10.0 ** np.array(histogram.edges)

    def draw(axes: Axes) -> None:
        shares = 100 * counts[first : last + 1] / max(1, counts.sum())
        bins = edges[first : last + 2]
        axes.bar(bins[:-1], shares, width=np.diff(bins), align="edge", color=_ACCENT, alpha=0.85)
        axes.set_xscale("log")
        _logarithmic_ticks(axes.xaxis, bins[0], bins[-1])
        axes.set_xlabel("KL divergence, nats")
        axes.set_ylabel("% of positions")
        axes.set_ylim(0, 1.15 * max(float(shares.max()), 1.0))  # room for the mean's label
        if mean is not None and mean > 0:
            axes.axvline(mean, color=_INK, linewidth=1.2, linestyle="--")
            side = "right" if mean > np.sqrt(bins[0] * bins[-1]) else "left"
            axes.annotate(
                f"\N{NO-BREAK SPACE}mean {mean:.3g}\N{NO-BREAK SPACE}",  # plain ones are cut off
                (mean, 1.0),
                xycoords=("data", "axes fraction"),
                ha=side,
                va="top",
            )

    return _svg(draw, f"KL distribution of {name}")


def kl_by_position_svg(error: PositionError, name: str, window_length: int) -> str:
    """Mean and 90th percentile of the KL divergence along the window."""
    import numpy as np

    starts = np.array([*error.starts, window_length])
    centres = (starts[:-1] + starts[1:] - 1) / 2
    mean, p90 = (np.array([np.nan if v is None else v for v in s]) for s in (error.mean, error.p90))

    def draw(axes: Axes) -> None:
        axes.plot(centres, p90, color=_SECOND, linewidth=1.2, marker=".", markersize=3, label="p90")
        axes.plot(
            centres, mean, color=_ACCENT, linewidth=1.6, marker=".", markersize=3, label="mean"
        )
        drawn = np.concatenate([mean, p90])
        drawn = drawn[drawn > 0]
        if drawn.size:
            axes.set_yscale("log", nonpositive="mask")
            _logarithmic_ticks(axes.yaxis, drawn.min(), drawn.max())
        axes.set_xlim(0, window_length)
        axes.set_xlabel("position in the window")
        axes.set_ylabel("KL divergence, nats")
        axes.legend(ncols=2, loc="upper right", bbox_to_anchor=(1, 1.14), borderpad=0)

    return _svg(draw, f"KL by position of {name}")


def layer_errors_svg(layers: Sequence[LayerErrorRecord], name: str) -> str:
    """The residual stream's error after every layer, and what each layer adds of its own."""
    import numpy as np

    indices = [layer.layer for layer in layers]
    whole, own = (
        np.array([np.nan if value is None else value for value in values])
        for values in (
            [layer.relative_error for layer in layers],
            [layer.own_error for layer in layers],
        )
    )

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        axes.plot(indices, whole, color=_SECOND, linewidth=1.6, marker=".", label="in all")
        axes.plot(indices, own, color=_ACCENT, linestyle="", marker="o", markersize=4, label="own")
        drawn = np.concatenate([whole, own])
        drawn = drawn[drawn > 0]  # no error at all has no place on the axis
        if drawn.size:
            axes.set_yscale("log", nonpositive="mask")
            _logarithmic_ticks(axes.yaxis, drawn.min(), drawn.max())
        axes.set_xlim(-1.5, max(indices, default=0) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: "emb." if value == -1 else f"{value:.0f}")
        )
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error")
        axes.legend(ncols=2, loc="upper right", bbox_to_anchor=(1, 1.14), borderpad=0)

    return _svg(draw, f"Error by layer of {name}")


def kl_by_size_svg(points: Mapping[str, tuple[int, float]]) -> str:
    """Mean KL divergence against the artifact's size.

    Args:
        points: Short label -> size in bytes and mean KL divergence in nats, which is positive.
    """
    sizes = [size / 1e6 for size, _ in points.values()]
    divergences = [divergence for _, divergence in points.values()]

    def draw(axes: Axes) -> None:
        axes.scatter(sizes, divergences, color=_ACCENT, s=28)
        axes.set_yscale("log")
        axes.margins(0.12, 0.15)
        _logarithmic_ticks(axes.yaxis, min(divergences) / 1.3, max(divergences) * 1.3)
        axes.set_xlabel("size, MB")
        axes.set_ylabel("mean KL divergence, nats")
        for label, at in zip(points, zip(sizes, divergences, strict=True), strict=True):
            axes.annotate(label, at, xytext=(5, 4), textcoords="offset points")

    return _svg(draw, "KL against size")


def _logarithmic_ticks(axis: Axis, least: float, greatest: float) -> None:
    """Ticks of a logarithmic axis, also between powers of ten where there are few of those.

    The labels are one word of text each; matplotlib's own are formulas set glyph by glyph.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if greatest < _LEAST_RANGE * least:
        middle, half = math.sqrt(least * greatest), math.sqrt(_LEAST_RANGE)
        horizontal = axis is axis.axes.xaxis
        limit = axis.axes.set_xlim if horizontal else axis.axes.set_ylim
        limit(middle / half, middle * half)
    narrow = greatest < 100 * least
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_formatter(NullFormatter())


def _tick(value: float, _position: int | None) -> str:
    """From 0.01 to 500 as a plain number, else such as 2e-5."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{value:g}" if -2 <= int(exponent) <= 2 else f"{mantissa}e{int(exponent)}"


def _svg(draw: Callable[[Axes], None], label: str) -> str:
    """One figure as an <svg> element without a fixed size, its colours the page's variables."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": label}
    with mpl.rc_context(style):
        figure = Figure(figsize=_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(visible=True, axis="y")
        axes.set_axisbelow(True)
        draw(axes)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    return _inline(out.getvalue(), label)


def _inline(document: str, label: str) -> str:
    element = document[document.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    # figure-wide ids such as patch_1 repeat from plot to plot; only hashed ones are referred to
    element = re.sub(r' id="[\w.]+_\d+"', "", element)
    # matplotlib's own style sheet would hold for the whole page
    element = re.sub(r"<style.*?</style>\s*", "", element, flags=re.DOTALL)
    element = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{html.escape(label)}">',
        element,
        count=1,
        flags=re.DOTALL,
    )
    for stand_in, variable in _COLOURS.items():
        element = element.replace(stand_in, f"var({variable})")
    return element
