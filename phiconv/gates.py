"""Judges measurements: a gate is a metric, a bound and a limit, and no part of a measurement.

So changing a limit re-judges what was measured, without running a model again.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Literal

from phiconv.errors import RecipeError
from phiconv.metrics import METRICS, known_error
from phiconv.report.results import GateResult, Measurement

Bound = Literal["min", "max"]
Limits = Mapping[str, Mapping[Bound, float]]
"""Metric name -> `min` and `max` -> limit, as a recipe writes them."""

BUILT_IN: Limits = {
    name: {"max": 0.0}
    for name in (
        "placement.fallback",
        "kernels.unserved",
        "graph.faults",
        "weights.faults",
        "parity.tokenizer",
        "parity.template",
        "parity.genai_config",
        "length_probes.unexplained",
    )
}
"""Gates of every validation: on whatever of this was checked, unless a recipe says otherwise."""

DEFAULT: Limits = {
    "kl_divergence.mean": {"max": 0.1},
    "top1_agreement": {"min": 0.85},
    "perplexity.ratio": {"max": 1.1},
}
"""What `phiconv validate` demands of an artifact when it is given no gates: wide enough for any
sound rounding to 4 bits, and missed by a faulty conversion. A recipe has only the gates it says."""

DEFAULT_GENERATION: Limits = {
    "decode_error.max": {"max": 1.0},
    "greedy_agreement": {"min": 0.85},
}
"""The same with a runtime that decodes: a fault of cache or positions misses both by far."""

_DETAIL_LENGTH = 200


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
        return unknown_metric(name)
    if metric.source == "generation" and not generates:
        return f"{name} is not measured by this runtime", "set runtime: onnxruntime-genai"
    if not limits:
        return f"the gate on {name} has no limit", "give it a min or a max"
    if not all(math.isfinite(limit) for limit in limits.values()):
        return f"the limit of {name} is not a finite number", None
    if "min" in limits and "max" in limits and limits["min"] > limits["max"]:
        return f"min of {name} is greater than its max", None
    return None


def unknown_metric(name: str) -> tuple[str, str]:
    """What is wrong with a name that no metric has, and a remedy that names the nearest one."""
    near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]!r}?" if near else f"metrics: {', '.join(METRICS)}"
    return f"unknown metric {name!r}", remedy


def judge(measurement: Measurement, gates: Limits) -> tuple[GateResult, ...]:
    """Judges one measurement by a recipe's gates and the built-in ones.

    Args:
        measurement: What was measured.
        gates: Gates that `check_gates` finds nothing wrong with. One on a metric of `BUILT_IN`
            replaces that.

    Returns:
        One result a bound, in the recipe's order, the built-in ones last. A value that is missing
        or not finite fails its gate; but when nothing was run only what was found out without
        running is judged.
    """
    ran = measurement.status == "measured"
    results = [
        _judged(measurement, name, limits, built_in=False)
        for name, limits in gates.items()
        if ran or name in measurement.metrics
    ]
    results += [
        _judged(measurement, name, limits, built_in=True)
        for name, limits in BUILT_IN.items()
        if name in measurement.metrics and name not in gates
    ]
    return tuple(result for group in results for result in group)


def _judged(
    measurement: Measurement, name: str, limits: Mapping[Bound, float], *, built_in: bool
) -> list[GateResult]:
    provenance = measurement.provenance
    about_target = METRICS[name].source == "kernels" or provenance.provider is None
    measured = measurement.metrics.get(name)
    return [
        GateResult(
            metric=name,
            bound=bound,
            limit=limit,
            measured=measured,
            passed=_passes(measured, bound, limit),
            provider=provenance.target_provider if about_target else str(provenance.provider),
            tokens=str(measurement.tokens),
            built_in=built_in,
            detail=_detail(measurement, name),
            standard_error=known_error(measurement.metrics, name),
        )
        for bound, limit in limits.items()
    ]


def _detail(measurement: Measurement, metric: str) -> str:
    """The first finding of the check that counts this metric, and how many more there are."""
    findings = [line for check in measurement.checks if metric in check.metrics
                for line in check.findings]  # fmt: skip
    if not findings:
        return ""
    first, rest = findings[0], len(findings) - 1
    shown = first if len(first) <= _DETAIL_LENGTH else first[: _DETAIL_LENGTH - 1] + "…"
    return f"{shown} (and {rest} more)" if rest else shown


def _passes(measured: float | None, bound: Bound, limit: float) -> bool:
    if measured is None or not math.isfinite(measured):
        return False
    return measured >= limit if bound == "min" else measured <= limit
