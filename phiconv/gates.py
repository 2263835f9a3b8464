"""Judges measurements: a gate is a metric, a bound and a limit, and no part of a measurement.

So changing a limit re-judges what was measured, without running a model again.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Literal

from phiconv.errors import RecipeError
from phiconv.metrics import METRICS
from phiconv.report.results import GateResult, Measurement

Bound = Literal["min", "max"]
Limits = Mapping[str, Mapping[Bound, float]]
"""Metric name -> `min` and `max` -> limit, as a recipe writes them."""


def check_gates(gates: Limits, *, generates: bool, where: str = "gates") -> list[RecipeError]:
    """Finds gates that could never be judged, at plan time.

    Args:
        gates: The recipe's gates.
        generates: Whether the runtime of this validation measures the generation metrics.
        where: Prefix of the key named in an error.

    Returns:
        One error a gate: unknown metric (with the nearest known one), one that this runtime does
        not measure, no limit, a limit that is not finite, or bounds that exclude each other.
    """
    errors = []
    for name, limits in gates.items():
        problem = _problem(name, limits, generates)
        if problem is not None:
            message, remedy = problem
            errors.append(RecipeError(message, where=f"{where}.{name}", remedy=remedy))
    return errors


def _problem(
    name: str, limits: Mapping[Bound, float], generates: bool
) -> tuple[str, str | None] | None:
    metric = METRICS.get(name)
    if metric is None:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown metric {name!r}", f"{hint}metrics: {', '.join(METRICS)}"
    if metric.needs_generation and not generates:
        return f"{name} is not measured by this runtime", "set runtime: onnxruntime-genai"
    if not limits:
        return f"the gate on {name} has no limit", "give it a min or a max"
    if not all(math.isfinite(limit) for limit in limits.values()):
        return f"the limit of {name} is not a finite number", None
    if "min" in limits and "max" in limits and limits["min"] > limits["max"]:
        return f"min of {name} is greater than its max", None
    return None


def judge(measurement: Measurement, gates: Limits) -> tuple[GateResult, ...]:
    """Judges one measurement by a recipe's gates.

    Args:
        measurement: What was measured.
        gates: Gates that `check_gates` finds nothing wrong with.

    Returns:
        One result a bound, in the recipe's order; none when the measurement was not run, which
        never counts as passed. A value that is missing or not finite fails its gate.
    """
    provider = measurement.provenance.provider
    if measurement.status == "not_run" or provider is None:
        return ()
    results = []
    for name, limits in gates.items():
        measured = measurement.metrics.get(name)
        for bound, limit in limits.items():
            results.append(
                GateResult(
                    metric=name,
                    bound=bound,
                    limit=limit,
                    measured=measured,
                    passed=_passes(measured, bound, limit),
                    provider=provider,
                    tokens=str(measurement.tokens),
                )
            )
    return tuple(results)


def _passes(measured: float | None, bound: Bound, limit: float) -> bool:
    if measured is None or not math.isfinite(measured):
        return False
    return measured >= limit if bound == "min" else measured <= limit
