"""How figures are written in every report, so that all of them say the same."""

from __future__ import annotations

import math

from phiconv.metrics import STANDARD_ERRORS, known_error
from phiconv.metrics.standard_error import FEWEST_WINDOWS
from phiconv.report.results import (
    CheckState,
    KnownLimit,
    Measurement,
    RunResult,
    Status,
    Validation,
)
from phiconv.units import seconds_text, size_text

STATUS_WORDS: dict[Status, str] = {
    "passed": "passed",
    "failed": "failed",
    "not_run": "not run",
    "ungated": "no gates",
}


CHECK_WORDS: dict[CheckState, str] = {
    "clean": "clean",
    "warnings": "notes",
    "errors": "failed",
    "not_checked": "not checked",
}
CHECK_TONES: dict[CheckState, Status] = {
    "clean": "passed",
    "warnings": "passed",
    "errors": "failed",
    "not_checked": "not_run",
}


def number(value: float | None) -> str:
    """A measured value with four significant digits, more where it is near one."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if 0.9 < abs(value) < 1.1:
        return f"{value:.5f}".rstrip("0").rstrip(".")
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.3e}"
    return f"{value:.4g}"


def with_error(value: float | None, error: float | None) -> str:
    """A measured value and, where it is known, its standard error: `0.01374 ± 0.00073`."""
    return number(value) if error is None else f"{number(value)} {spread(error)}"


def spread(error: float) -> str:
    """A standard error: `± 0.00073`."""
    return f"± {error:.2g}"


def metric(measurement: Measurement, name: str) -> str:
    """A metric of a measurement with its standard error."""
    metrics = measurement.metrics
    return with_error(metrics.get(name), known_error(metrics, name))


def about_errors(measurement: Measurement) -> str:
    """What ± stands for; empty where no metric has one."""
    if not any(known_error(measurement.metrics, name) is not None for name in measurement.metrics):
        return ""
    windows = measurement.tokens.windows
    if windows < FEWEST_WINDOWS:
        return (
            f"± standard error, positions taken for independent: too small, but fewer than "
            f"{FEWEST_WINDOWS} windows tell no better"
        )
    return f"± standard error, each of the {windows} windows one draw"


def close_gates(validation: Validation) -> list[str]:
    """One line a gate that passed by less than the standard error."""
    return [
        f"close: {gate.metric} passed {gate.bound} {limit(gate.limit)} by less than its standard "
        f"error ({with_error(gate.measured, gate.standard_error)}): more windows would tell"
        for gate in validation.gates
        if gate.close
    ]


def worst_layer(measurement: Measurement) -> str:
    """The layer that adds most error, in a few words; empty where none was measured."""
    found = [
        (layer.own_error, layer.layer)
        for layer in measurement.layers
        if layer.own_error is not None
    ]
    if not found:
        return ""
    own, layer = max(found)
    where = "the embedding" if layer < 0 else f"layer {layer}"
    last = measurement.layers[-1]
    return (
        f"Relative error of the residual stream {number(last.relative_error)} after "
        f"layer {last.layer}; {where} adds most, {number(own)}"
    )


def from_position(limit: KnownLimit) -> str:
    """Where a known limit begins: `from position 4,096`."""
    if limit.from_position == 0:
        return "from the first position"
    return f"from position {limit.from_position:,}"


def limit(value: float) -> str:
    """A gate's limit, as the recipe says it: every digit counts."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def size(size_bytes: int | None) -> str:
    """Bytes in decimal units; empty for None."""
    return "" if size_bytes is None else size_text(size_bytes)


def duration(seconds: float | None) -> str:
    """Such as `4 min 05 s`; empty for None."""
    return "" if seconds is None else seconds_text(seconds)


def digest(value: str) -> str:
    """The first twelve digits of a digest, without its algorithm."""
    return value.rpartition(":")[2][:12]


def headline(result: RunResult) -> str:
    """The build's verdict in one line."""
    verdicts = [validation.verdict for validation in result.validations]
    worst = [v.verdict for v in result.validations if v.status == result.status]
    if not verdicts:
        return "built, not validated"
    return worst[0] if len(set(worst)) == 1 else STATUS_WORDS[result.status]


def accuracy(measurement: Measurement) -> dict[str, float | None]:
    """The metrics but for those that stand elsewhere: counts with the checks, errors after ±."""
    elsewhere = STANDARD_ERRORS.union(*(check.metrics for check in measurement.checks))
    return {name: value for name, value in measurement.metrics.items() if name not in elsewhere}


def failures(validation: Validation) -> list[str]:
    """One line a failed gate."""
    return [str(gate) for gate in validation.gates if not gate.passed]
