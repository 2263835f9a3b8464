"""report.md: short enough for a pull-request comment, verdict first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from phiconv.metrics import METRICS
from phiconv.report import text
from phiconv.report.results import Check, KnownLimit, RunResult, Validation

_MARKS = {"passed": "✅", "failed": "❌", "not_run": "⚠️", "ungated": "ℹ️"}  # noqa: RUF001


def report_markdown(result: RunResult) -> str:
    """report.md of a build, in GitHub's Markdown."""
    lines = [
        f"## {_MARKS[result.status]} {_escape(result.recipe)}: {text.headline(result)}",
        "",
        f"{text.size(result.size_bytes)} from {_escape(result.checkpoint.source)}"
        + (f", released as {_escape(result.release_path)}" if result.release_path else ""),
    ]
    for validation in result.validations:
        lines += ["", *_validation(validation)]
    lines += ["", *_details(result), ""]
    return "\n".join(lines)


def _validation(validation: Validation) -> list[str]:
    measurement = validation.measurement
    lines = [
        f"**{_escape(validation.stage)}** of {_escape(validation.artifact)}: "
        f"{_escape(validation.verdict)}; tokens {_escape(str(measurement.tokens))}",
    ]
    remarks = text.failures(validation) + text.close_gates(validation)
    if remarks:
        lines += ["", *(f"- {_escape(remark)}" for remark in remarks)]
    if measurement.status == "measured":
        lines += ["", *_metrics(validation)]
        about = text.about_errors(measurement)
        lines += ["", about] if about else []
        layers = text.worst_layer(measurement) or measurement.layers_note
        lines += ["", _escape(layers)] if layers else []
    if measurement.checks:
        lines += ["", *map(_check, measurement.checks)]
    if measurement.known_limits:
        lines += ["", "Known limits:", "", *map(_limit, measurement.known_limits)]
    return lines


def _limit(limit: KnownLimit) -> str:
    return f"- {_escape(text.from_position(limit))}, {_escape(limit.runtime)}: " + _escape(
        limit.statement
    )


def _check(check: Check) -> str:
    mark = _MARKS[text.CHECK_TONES[check.state]]
    return f"- {mark} {_escape(check.name)}: {_escape(check.summary)}"


def _metrics(validation: Validation) -> list[str]:
    """The gated metrics, then the others."""
    gates = [gate for gate in validation.gates if not gate.built_in]
    shown = {gate.metric for gate in gates}
    rows: list[Sequence[str]] = [
        (
            METRICS[gate.metric].title,
            text.with_error(gate.measured, gate.standard_error),
            f"{gate.bound} {text.limit(gate.limit)}",
            _MARKS["passed" if gate.passed else "failed"],
        )
        for gate in gates
    ]
    measurement = validation.measurement
    rows += [
        (METRICS[name].title if name in METRICS else name, text.metric(measurement, name), "", "")
        for name in text.accuracy(measurement)
        if name not in shown
    ]
    return _table(("metric", "measured", "gate", ""), rows)


def _details(result: RunResult) -> list[str]:
    stages = [
        (
            stage.id,
            stage.uses,
            "cached" if stage.cached else text.duration(stage.wall_s),
            text.size(stage.peak_rss_bytes),
        )
        for stage in result.stages
    ]
    tools = ", ".join(f"{name} {version}" for name, version in sorted(result.tools.items()))
    return [
        "<details><summary>Stages and provenance</summary>",
        "",
        *_table(("stage", "uses", "time", "peak memory"), stages),
        "",
        f"- checkpoint {_escape(result.checkpoint.source)}"
        + (f" at {result.checkpoint.revision}" if result.checkpoint.revision else "")
        + f", digest {text.digest(result.checkpoint.digest)}",
        f"- artifact {result.artifact_key[:12]}, recipe {text.digest(result.recipe_digest)}",
        *_provenance(result.validations),
        f"- {_escape(tools)}",
        "",
        "</details>",
    ]


def _provenance(validations: Iterable[Validation]) -> list[str]:
    lines = []
    for validation in validations:
        found = validation.measurement.provenance
        if found.provider is not None:
            nodes = ", ".join(
                f"{sum(operators.values())} nodes on {provider}"
                for provider, operators in found.placement.items()
            )
            driver = f"driver {found.driver}" if found.driver else ""
            parts = (f"{found.runtime} {found.runtime_version}", found.device, driver, nodes)
            lines.append(f"- {validation.stage}: " + _escape(", ".join(p for p in parts if p)))
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([_escape(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _escape(value: str) -> str:
    """Text that Markdown and HTML take literally, in one table cell."""
    for character in "\\`*_[]<>|":
        value = value.replace(character, f"\\{character}")
    return " ".join(value.split())
