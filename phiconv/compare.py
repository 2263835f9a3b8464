"""Compares two reports: is the candidate worse than the baseline, and by how much?

Only measurements on the same tokens against the same reference can be compared. They share the
noise of these tokens, so the standard errors given for differences, which take both measurements
for independent, are upper bounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phiconv.errors import EnvironmentLacksError, GateError, PhiconvError, Problems, RecipeError
from phiconv.gates import BUILT_IN, judge, unknown_metric
from phiconv.metrics import METRICS
from phiconv.publish import ARTIFACT, REPORT
from phiconv.report import REPORT_JSON

if TYPE_CHECKING:
    from phiconv.gates import Bound, Limits
    from phiconv.report.results import GateResult, RunResult, Validation

# 0.97 - 0.96 is a little more than 0.01.
_ROUNDING = 1e-9

MAX_REGRESSION = "max_regression"
"""The key of a gates file beside `min` and `max`: how much worse than the baseline."""


@dataclass(frozen=True)
class Allowance:
    """By how much a metric may get worse.

    Attributes:
        absolute: In the metric's own unit.
        relative: As a share of the baseline's value.
        by_default: Whether it holds because nobody set another.
    """

    absolute: float = 0.0
    relative: float = 0.0
    by_default: bool = False

    def of(self, baseline: float) -> float:
        """The greater of both, in the metric's own unit."""
        return max(self.absolute, self.relative * abs(baseline))


DEFAULT: Mapping[str, Allowance] = {
    # a tenth, but of a divergence that is no more than rounding a little in any case
    "kl_divergence.mean": Allowance(absolute=1e-4, relative=0.1, by_default=True),
    "top1_agreement": Allowance(absolute=0.01, by_default=True),
    "perplexity.ratio": Allowance(absolute=0.01, by_default=True),
    **{name: Allowance(by_default=True) for name in BUILT_IN},
}
"""What `phiconv compare` allows when it is not told otherwise."""


@dataclass(frozen=True)
class Side:
    """One of the two: where its report is, and what is in it."""

    file: Path
    result: RunResult


@dataclass(frozen=True)
class Row:
    """One metric of both; values that are not finite or not there are None.

    Attributes:
        metric: Its name.
        baseline, candidate: The values.
        difference: Candidate minus baseline.
        standard_error: Of the difference, an upper bound; None when it is not known.
        worsening: By how much the candidate is worse; None when no way is better.
        allowed: How much worse it may be; None without a regression gate.
        passed: Whether it is within that.
    """

    metric: str
    baseline: float | None
    candidate: float | None
    difference: float | None
    standard_error: float | None
    worsening: float | None
    allowed: float | None = None
    passed: bool = True

    @property
    def state(self) -> str:
        """`passed` or `failed` by a gate; else `better` or `worse` where that is beyond noise."""
        if self.allowed is not None:
            return "passed" if self.passed else "failed"
        if not self.worsening or abs(self.worsening) <= 2 * (self.standard_error or 0):
            return ""
        return "worse" if self.worsening > 0 else "better"


@dataclass(frozen=True)
class Pair:
    """Two measurements that can be compared.

    Attributes:
        baseline, candidate: The validations.
        rows: Every metric that either has.
        gates: The candidate judged by the limits that were given.
    """

    baseline: Validation
    candidate: Validation
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


def regression_gates(
    file: Path | None, settings: Sequence[str]
) -> tuple[dict[str, Allowance], dict[str, dict[Bound, float]]]:
    """The allowances and limits of a gates file, or the defaults, with settings on top.

    Args:
        file: Maps metric names to `max_regression`, `min` and `max`.
        settings: Texts `metric=allowance`.

    Raises:
        RecipeError: What is wrong (`Problems` for several).
    """
    from phiconv.recipe.gates_file import read_gates

    allowances, limits = dict(DEFAULT), {}
    if file is not None:
        found = read_gates(file, generates=True, also=(MAX_REGRESSION,))
        limits = found.limits
        texts = {
            name: (str(extra[MAX_REGRESSION]), f"{file}: {name}.{MAX_REGRESSION}")
            for name, extra in found.extra.items()
        }
        allowances = with_allowances({}, texts)
    texts = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        texts[name.strip()] = text, f"--max-regression {setting}"
    return with_allowances(allowances, texts), limits


def parse_allowance(text: str, where: str) -> Allowance:
    """An allowance as it is written: `0.002`, or `10%` of the baseline.

    Raises:
        RecipeError: It is neither, or is negative.
    """
    number = text.strip()
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise RecipeError(
            f"wants a number of at least 0, or a percentage of the baseline, not {text!r}",
            where=where,
            remedy="such as 0.002 or 10%",
        )
    return Allowance(relative=value / 100) if number.endswith("%") else Allowance(absolute=value)


def with_allowances(
    base: Mapping[str, Allowance], texts: Mapping[str, tuple[str, str]]
) -> dict[str, Allowance]:
    """The allowances with others set.

    Args:
        base: Those that hold so far.
        texts: Metric name -> what is written, and where it stands.

    Raises:
        RecipeError: A metric is unknown or has no better way, or what is written is no allowance
            (`Problems` for several).
    """
    allowances = dict(base)
    errors: list[PhiconvError] = []
    for name, (text, where) in texts.items():
        if name not in METRICS:
            message, remedy = unknown_metric(name)
            errors.append(RecipeError(message, where=where, remedy=remedy))
        elif METRICS[name].better == "neither":
            errors.append(RecipeError(f"{name} can get neither better nor worse", where=where))
        else:
            try:
                allowances[name] = parse_allowance(text, where)
            except RecipeError as error:
                errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)
    return allowances


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
        rows = _rows(old, new, allowances)
        gates = judge(new.measurement, limits)
        pairs.append(Pair(old, new, rows, tuple(gate for gate in gates if not gate.built_in)))
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


def _rows(old: Validation, new: Validation, allowances: Mapping[str, Allowance]) -> tuple[Row, ...]:
    both = (old.measurement.metrics, new.measurement.metrics)
    asked = [name for name, allowance in allowances.items() if not allowance.by_default]
    for name in asked:
        if any(name not in metrics for metrics in both):
            raise RecipeError(
                f"{name} is not measured by both",
                where=f"{old.stage}, {new.stage}",
                remedy="validate both with the same runtime, or leave this gate out",
            )
    errors = (standard_errors(old), standard_errors(new))
    names = [
        name
        for name in METRICS
        if any(name in metrics for metrics in both) and not name.endswith("standard_error")
    ]
    return tuple(_row(name, both, errors, allowances.get(name)) for name in names)


def _row(
    name: str,
    both: Sequence[Mapping[str, float | None]],
    errors: Sequence[Mapping[str, float]],
    allowance: Allowance | None,
) -> Row:
    was, now = (metrics.get(name) for metrics in both)
    difference = now - was if was is not None and now is not None else None
    error = None
    if all(name in known for known in errors):
        error = math.hypot(*(known[name] for known in errors))
    better = METRICS[name].better
    worsening = None
    if difference is not None and better != "neither":
        worsening = difference if better == "lower" else -difference
    if allowance is None or any(name not in metrics for metrics in both):
        return Row(name, was, now, difference, error, worsening)
    allowed = allowance.of(was or 0.0)
    # a baseline that was not finite can only be bettered by a value that is
    passed = now is not None if worsening is None else worsening <= allowed * (1 + _ROUNDING)
    return Row(name, was, now, difference, error, worsening, allowed, passed)


def standard_errors(validation: Validation) -> dict[str, float]:
    """Standard errors of those metrics for which they follow from the report.

    That of an agreement p over n positions is sqrt(p (1 - p) / (n - 1)); that of the artifact's
    perplexity is the ratio's times the reference's perplexity, which is the same for all.
    """
    measurement = validation.measurement
    metrics = measurement.metrics
    positions = measurement.tokens.windows * measurement.tokens.window_length
    agreement = metrics.get("top1_agreement")
    ratio_error = metrics.get("perplexity.ratio_standard_error")
    reference = metrics.get("perplexity.reference")
    found = {
        "kl_divergence.mean": metrics.get("kl_divergence.standard_error"),
        "perplexity.ratio": ratio_error,
        "perplexity.candidate": (
            ratio_error * reference if ratio_error is not None and reference is not None else None
        ),
        "top1_agreement": (
            math.sqrt(agreement * (1 - agreement) / (positions - 1))
            if agreement is not None and positions > 1
            else None
        ),
    }
    return {name: value for name, value in found.items() if value is not None}


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"


def _short(digest: str) -> str:
    return digest.rpartition(":")[2][:12]
