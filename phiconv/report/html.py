"""report.html and the index over several builds.

Each is one file without scripts or requests, readable on a phone and in the dark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from markupsafe import Markup

from phiconv.metrics import METRICS, known_error
from phiconv.report import text
from phiconv.report.plots import (
    kl_by_position_svg,
    kl_by_size_svg,
    kl_distribution_svg,
    layer_errors_svg,
)
from phiconv.report.results import RunResult, Validation

if TYPE_CHECKING:
    from jinja2 import Environment

_REPORT = "report.html.j2"


@dataclass(frozen=True)
class Plot:
    """A plot and what it shows."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class IndexRow:
    """One recipe of the index: its report's link, and the headline figures of one measurement."""

    result: RunResult
    link: str
    measured: bool
    kl_divergence: float | None
    top1_agreement: float | None


def report_html(result: RunResult) -> str:
    """report.html of a build."""
    return _render(
        _REPORT,
        result=result,
        words=text.STATUS_WORDS,
        check_words=text.CHECK_WORDS,
        tones=text.CHECK_TONES,
        plots={validation.stage: _plots(validation) for validation in result.validations},
        weight_bytes=max((kind.size_bytes for kind in result.tensor_kinds), default=0),
        longest_s=max((stage.wall_s or 0 for stage in result.stages), default=0),
        accuracy=text.accuracy,
        error=lambda measurement, name: known_error(measurement.metrics, name),
        spread=text.spread,
        about_errors=text.about_errors,
        remarks=lambda validation: text.failures(validation) + text.close_gates(validation),
        from_position=text.from_position,
        title=lambda name: METRICS[name].title if name in METRICS else name,
        unit=lambda name: METRICS[name].unit if name in METRICS else "",
        description=lambda name: METRICS[name].description if name in METRICS else "",
        share=lambda part, whole: f"{100 * part / whole:.1f}" if whole else "0",
    )


def index_html(results: Mapping[str, RunResult]) -> str:
    """A page over several builds: KL divergence against size, and a row each.

    Args:
        results: The link to a build's report.html, relative to the page, and its result.
    """
    rows = [_row(link, result) for link, result in results.items()]
    places: dict[tuple[int, float], list[str]] = {}
    for number, row in enumerate(rows, 1):
        if row.kl_divergence:
            place = (row.result.size_bytes, float(f"{row.kl_divergence:.3g}"))
            places.setdefault(place, []).append(str(number))
    plot = None
    if places:
        svg = Markup(kl_by_size_svg({", ".join(names): at for at, names in places.items()}))
        plot = Plot(svg, "Smaller and nearer the reference is better; the numbers are the rows'")
    return _render("index.html.j2", rows=rows, plot=plot, headline=text.headline)


def _row(link: str, result: RunResult) -> IndexRow:
    """The row of a build; of several measurements the one farthest from the reference."""
    found = [v.measurement.metrics for v in result.validations if v.measurement.metrics]
    worst = max(found, key=lambda metrics: metrics.get("kl_divergence.mean") or 0, default={})
    return IndexRow(
        result=result,
        link=link,
        measured=bool(found),
        kl_divergence=worst.get("kl_divergence.mean"),
        top1_agreement=worst.get("top1_agreement"),
    )


def load_templates() -> None:
    """Compiles the template of report.html, most of the time that writing the first takes."""
    _environment().get_template(_REPORT)


def _render(template: str, **values: object) -> str:
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    """Where templates come from; it keeps those it has compiled."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("phiconv.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        number=text.number, limit=text.limit, size=text.size, duration=text.duration
    )
    return environment


def _plots(validation: Validation) -> list[Plot]:
    measurement = validation.measurement
    plots = []
    if measurement.kl_histogram is not None:
        mean = measurement.metrics.get("kl_divergence.mean")
        svg = kl_distribution_svg(measurement.kl_histogram, validation.stage, mean=mean)
        # drawn by phiconv from numbers and the stage's id, which a recipe limits to [A-Za-z0-9_-]
        plots.append(Plot(Markup(svg), "Distribution of the KL divergence over positions"))
    if measurement.kl_by_position is not None:
        svg = kl_by_position_svg(
            measurement.kl_by_position, validation.stage, measurement.tokens.window_length
        )
        plots.append(Plot(Markup(svg), "KL divergence along the window"))
    if measurement.layers:
        svg = layer_errors_svg(measurement.layers, validation.stage)
        caption = "Residual stream after each layer: its error, and the layer's own part of it"
        plots.append(Plot(Markup(svg), caption))
    return plots
