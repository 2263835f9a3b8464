"""Compares two reports: is the candidate worse than the baseline, and by how much?

Only measurements on the same tokens against the same reference can be compared. They share the
difficulty of these tokens, so a difference is far surer than its two sides: its standard error
follows from the values of every position, kept beside each report (`phiconv.report.positions`).
Where they are not kept, both measurements are taken for independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from phiconv.errors import EnvironmentLacksError, GateError, RecipeError
from phiconv.gates import judge
from phiconv.metrics import METRICS, STANDARD_ERRORS, known_error
from phiconv.publish import ARTIFACT, REPORT
from phiconv.report import REPORT_JSON
from phiconv.report.positions import POSITIONS, PositionsError, read_positions

if TYPE_CHECKING:
    from phiconv.allowances import Allowance
    from phiconv.gates import Limits
    from phiconv.report.results import GateResult, RunResult, Validation

# 0.97 - 0.96 is a little more than 0.01.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Side:
    """One of the two: where its report is, and what is in it."""

    file: Path
    result: RunResult

    @property
    def positions(self) -> Path:
        """Where the values of every position lie, if they do."""
        return self.file.with_name(POSITIONS)


@dataclass(frozen=True)
class Errors:
    """The standard errors of the differences between two measurements.

    Attributes:
        kind: `paired` by position, or `unpaired`: as of independent measurements.
        by_metric: Metric -> standard error of candidate minus baseline.
        factor: A difference within that many of them is not called better or worse.
        about: How they were found, in words.
    """

    kind: Literal["paired", "unpaired"]
    by_metric: Mapping[str, float]
    factor: float
    about: str


@dataclass(frozen=True)
class Row:
    """One metric of both; values that are not finite or not there are None.

    Attributes:
        metric: Its name.
        baseline, candidate: The values.
        difference: Candidate minus baseline.
        standard_error: Of the difference; None when it is not known.
        noise: A difference up to this is not called better or worse: 0 for what is counted, None
            where nothing is known of it.
        worsening: By how much the candidate is worse; None when no way is better.
        allowed: How much worse it may be; None without a regression gate.
        passed: Whether it is within that.
    """

    metric: str
    baseline: float | None
    candidate: float | None
    difference: float | None
    standard_error: float | None
    noise: float | None
    worsening: float | None
    allowed: float | None = None
    passed: bool = True

    @property
    def state(self) -> str:
        """`passed` or `failed` by a gate; else `better` or `worse` where that is beyond noise."""
        if self.allowed is not None:
            return "passed" if self.passed else "failed"
        if not self.worsening or self.noise is None or abs(self.worsening) <= self.noise:
            return ""
        return "worse" if self.worsening > 0 else "better"


@dataclass(frozen=True)
class Pair:
    """Two measurements that can be compared.

    Attributes:
        baseline, candidate: The validations.
        errors: The standard errors of the differences.
        rows: Every metric that either has.
        gates: The candidate judged by the limits that were given.
    """

    baseline: Validation
    candidate: Validation
    errors: Errors
    rows: tuple[Row, ...]
    gates: tuple[GateResult, ...]

    @property
    def failures(self) -> list[str]:
        """One line a failed gate."""
        where = (
            f"provider {self.candidate.measurement.provenance.provider}, "
            f"tokens {self.candidate.measurement.tokens}"
        )
        lines = []
        for row in self.rows:
            if not row.passed:
                was, now = _figure(row.baseline), _figure(row.candidate)
                by = f"worse by {_figure(row.worsening)}" if row.worsening is not None else "worse"
                by += f" ± {row.standard_error:.2g}" if row.standard_error is not None else ""
                lines.append(
                    f"failed: {row.metric} is {by} ({was} -> {now}), "
                    f"allowed {_figure(row.allowed)}, {where}"
                )
        return lines + [str(gate) for gate in self.gates if not gate.passed]

    @property
    def regression_gates(self) -> int:
        """How many metrics may not get worse by more than something."""
        return sum(row.allowed is not None for row in self.rows)


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        baseline, candidate: The reports.
        pairs: The measurements that both have.
        not_run: What the baseline measured and the candidate did not, one line each.
    """

    baseline: Side
    candidate: Side
    pairs: tuple[Pair, ...]
    not_run: tuple[str, ...]

    @property
    def failures(self) -> list[str]:
        """One line a failed gate."""
        return [line for pair in self.pairs for line in pair.failures]

    @property
    def exit_code(self) -> int:
        """0 when every gate passed; what was not run never counts as passed."""
        if self.failures:
            return GateError.exit_code
        return EnvironmentLacksError.exit_code if self.not_run else 0


def open_report(path: Path) -> Side:
    """Finds a report: report.json itself, a folder with it, a build's output, or its artifact.

    Raises:
        RecipeError: There is none.
        StageError: It cannot be read, or is not a report of this schema version.
    """
    from phiconv.report.document import read_report_file

    places = [path, path / REPORT_JSON, path / REPORT / REPORT_JSON]
    if path.name == ARTIFACT:
        places.append(path.parent / REPORT / REPORT_JSON)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise RecipeError(
            f"there is no {REPORT_JSON} at {path}",
            remedy="give a report.json, or the output folder of `phiconv build` or "
            "`phiconv validate ARTIFACT --reference MODEL`",
        )
    return Side(file, read_report_file(file))


def compare(
    baseline: Side, candidate: Side, allowances: Mapping[str, Allowance], limits: Limits
) -> Comparison:
    """Compares two reports, validation by validation.

    Args:
        baseline: What the candidate must not be worse than.
        candidate: What is judged.
        allowances: Metric name -> how much worse it may be.
        limits: Gates on the candidate alone.

    Raises:
        RecipeError: They have no validation in common, or were measured on other tokens or against
            another reference; or a metric for which an allowance was asked for is not measured.
    """
    _check_reference(baseline, candidate)
    found, not_run = _pairs(baseline, candidate)
    pairs = []
    for old, new in found:
        _check_tokens(baseline, candidate, old, new)
        errors = _errors((baseline, old), (candidate, new))
        rows = _rows(old, new, errors, allowances)
        gates = judge(new.measurement, limits)
        own = tuple(gate for gate in gates if not gate.built_in)
        pairs.append(Pair(old, new, errors, rows, own))
    return Comparison(baseline, candidate, tuple(pairs), not_run)


def _check_reference(baseline: Side, candidate: Side) -> None:
    old, new = baseline.result.checkpoint, candidate.result.checkpoint
    if old.digest != new.digest:
        raise RecipeError(
            f"measured against different references: {old.source} ({_short(old.digest)}) and "
            f"{new.source} ({_short(new.digest)})",
            where=f"{baseline.file}, {candidate.file}",
            remedy="validate both against the same checkpoint",
        )


def _check_tokens(baseline: Side, candidate: Side, old: Validation, new: Validation) -> None:
    tokens, others = old.measurement.tokens, new.measurement.tokens
    if tokens.ids_digest != others.ids_digest:
        raise RecipeError(
            f"measured on different tokens: {tokens} and {others}",
            where=f"{baseline.file} ({old.stage}), {candidate.file} ({new.stage})",
            remedy="validate both with the same --tokens, --windows and --window-length",
        )


def _pairs(
    baseline: Side, candidate: Side
) -> tuple[list[tuple[Validation, Validation]], tuple[str, ...]]:
    """Validations of both by stage, or the only one of each; and what the candidate did not run."""
    old = {item.stage: item for item in _measured(baseline)}
    new = {item.stage: item for item in candidate.result.validations}
    if len(old) == 1 and len(new) == 1:
        found = list(zip(old.values(), new.values(), strict=True))
    else:
        found = [(old[stage], new[stage]) for stage in old if stage in new]
    ran = [pair for pair in found if pair[1].measurement.status == "measured"]
    not_run = tuple(f"{b.stage}: {b.verdict}" for a, b in found if (a, b) not in ran)
    if not found:
        raise RecipeError(
            "the reports have no validation in common: "
            f"{', '.join(old) or 'none measured'} and {', '.join(new) or 'none'}",
            where=f"{baseline.file}, {candidate.file}",
            remedy="build both with the same stages of validation",
        )
    return ran, not_run


def _measured(side: Side) -> list[Validation]:
    return [v for v in side.result.validations if v.measurement.status == "measured"]


def _errors(baseline: tuple[Side, Validation], candidate: tuple[Side, Validation]) -> Errors:
    """The errors of the differences: paired where both have the values of every position."""
    from phiconv.metrics.paired import paired_errors
    from phiconv.metrics.standard_error import FEWEST_WINDOWS, noise_factor

    windows = candidate[1].measurement.tokens.windows

    try:
        old, new = (
            read_positions(side.positions, validation) for side, validation in (baseline, candidate)
        )
    except PositionsError as error:
        about = f"unpaired, as of independent measurements, {windows} windows: {error}"
        found = _unpaired(baseline[1], candidate[1])
        if not found:
            about = f"none known: {error}, and a report has none that counts windows"
        return Errors("unpaired", found, noise_factor(windows), about)
    about = f"paired by position, {windows} windows"
    if windows < FEWEST_WINDOWS:
        about += f" (fewer than {FEWEST_WINDOWS}: positions taken for independent)"
    return Errors("paired", paired_errors(old, new), noise_factor(windows), about)


def _unpaired(old: Validation, new: Validation) -> dict[str, float]:
    """As if the measurements were independent: the root of the sum of both squared errors."""
    ours, theirs = standard_errors(old), standard_errors(new)
    return {name: math.hypot(ours[name], theirs[name]) for name in ours if name in theirs}


def _rows(
    old: Validation, new: Validation, errors: Errors, allowances: Mapping[str, Allowance]
) -> tuple[Row, ...]:
    both = (old.measurement.metrics, new.measurement.metrics)
    asked = [name for name, allowance in allowances.items() if not allowance.by_default]
    for name in asked:
        if any(name not in metrics for metrics in both):
            raise RecipeError(
                f"{name} is not measured by both",
                where=f"{old.stage}, {new.stage}",
                remedy="validate both with the same runtime, or leave this gate out",
            )
    names = [
        name
        for name in METRICS
        if any(name in metrics for metrics in both) and name not in STANDARD_ERRORS
    ]
    return tuple(_row(name, both, errors, allowances.get(name)) for name in names)


def _row(
    name: str,
    both: Sequence[Mapping[str, float | None]],
    errors: Errors,
    allowance: Allowance | None,
) -> Row:
    was, now = (metrics.get(name) for metrics in both)
    difference = now - was if was is not None and now is not None else None
    error = None if difference is None else errors.by_metric.get(name)
    counted = METRICS[name].function is None
    noise = errors.factor * error if error is not None else 0.0 if counted else None
    better = METRICS[name].better
    worsening = None
    if difference is not None and better != "neither":
        worsening = difference if better == "lower" else -difference
    if allowance is None or any(name not in metrics for metrics in both):
        return Row(name, was, now, difference, error, noise, worsening)
    allowed = allowance.of(was or 0.0)
    # a baseline that was not finite can only be bettered by a value that is
    passed = now is not None if worsening is None else worsening <= allowed * (1 + _ROUNDING)
    return Row(name, was, now, difference, error, noise, worsening, allowed, passed)


def standard_errors(validation: Validation) -> dict[str, float]:
    """Standard errors of those metrics for which they follow from the report.

    That of the artifact's perplexity is the ratio's times the reference's perplexity, which is the
    same for all.
    """
    metrics = validation.measurement.metrics
    found = {name: known_error(metrics, name) for name in METRICS}
    ratio_error, reference = found["perplexity.ratio"], metrics.get("perplexity.reference")
    if ratio_error is not None and reference is not None:
        found["perplexity.candidate"] = ratio_error * reference
    return {name: value for name, value in found.items() if value is not None}


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _short(digest: str) -> str:
    return digest.rpartition(":")[2][:12]
