"""report.html: one file without scripts or requests, readable on a phone and in the dark."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from phiconv.metrics import METRICS
from phiconv.report import text
from phiconv.report.plots import kl_by_position_svg, kl_distribution_svg
from phiconv.report.results import RunResult, Validation

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Plot:
    """A plot and what it shows."""

    svg: Markup
    caption: str


def report_html(result: RunResult) -> str:
    """report.html of a build."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("phiconv.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE).render(
        result=result,
        words=text.STATUS_WORDS,
        plots={validation.stage: _plots(validation) for validation in result.validations},
        weight_bytes=max((kind.size_bytes for kind in result.tensor_kinds), default=0),
        longest_s=max((stage.wall_s or 0 for stage in result.stages), default=0),
        failures=text.failures,
        number=text.number,
        limit=text.limit,
        size=text.size,
        duration=text.duration,
        title=lambda name: METRICS[name].title if name in METRICS else name,
        unit=lambda name: METRICS[name].unit if name in METRICS else "",
        description=lambda name: METRICS[name].description if name in METRICS else "",
        share=lambda part, whole: f"{100 * part / whole:.1f}" if whole else "0",
    )


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
    return plots
