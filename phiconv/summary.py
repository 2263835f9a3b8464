"""What the command line says in words: errors, plans, results. It prints nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from phiconv.errors import PhiconvError
from phiconv.units import seconds_text, size_text

if TYPE_CHECKING:
    from phiconv.batch import Outcome
    from phiconv.compare import Comparison, Pair, Row
    from phiconv.doctor import Finding
    from phiconv.gguf.contents import GgufSummary
    from phiconv.inspect import CheckpointSummary, OnnxSummary
    from phiconv.plan import Plan
    from phiconv.report.results import Validation
    from phiconv.run import Built
    from phiconv.workspace import Entry

# Shown beside the gated metrics.
_HEADLINE = (
    "kl_divergence.mean",
    "kl_divergence.p99",
    "top1_agreement",
    "perplexity.reference",
    "perplexity.candidate",
)
_FEW_FINDINGS = 3
"""More are in the report only."""
_COLOURS = {"passed": "green", "failed": "red", "not_run": "yellow", "ungated": "yellow"}


def error_text(error: PhiconvError) -> str:
    """An error, or each of several, with its place and remedy on lines of their own."""
    parts: Sequence[PhiconvError] = getattr(error, "errors", None) or [error]
    texts = []
    for part in parts:
        lines = [f"error: {part.message}"]
        lines += [f"  where: {part.where}"] if part.where else []
        lines += [f"  remedy: {part.remedy}"] if part.remedy else []
        lines += [f"  note: {note}" for note in notes(part)]
        texts.append("\n".join(lines))
    if len(parts) > 1:
        texts.append(f"{len(parts)} errors")
    return "\n".join(texts)


def notes(error: BaseException) -> Sequence[str]:
    """What was added to an error on its way."""
    found: Sequence[str] = getattr(error, "__notes__", ())
    return found


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Aligns cells in columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        (
            indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def plan_text(plan: Plan) -> str:
    """A plan as a table, with what it will need and what is missing."""
    rows = [("step", "stage", "state", "key", "disk", "memory")]
    for step in plan.steps:
        estimate = step.estimate if step.state == "build" else None
        disk = size_text(estimate.disk_bytes) if estimate else "-"
        memory = size_text(estimate.ram_bytes) if estimate else "-"
        rows.append((step.id, step.stage.name, step.state, step.key[:12], disk, memory))
    lines = [f"{plan.recipe.name} ({plan.checkpoint.source})", *table(rows)]
    lines.append(f"  ships {plan.shipped}")
    if plan.to_build:
        disk, memory = size_text(plan.disk_bytes), size_text(plan.ram_bytes)
        lines.append(f"  needs about {disk} of disk and {memory} of memory")
    for step in plan.steps:
        for item in step.missing:
            way = "goes on without" if item.optional else "cannot run without"
            remedy = f"; {item.remedy}" if item.remedy else ""
            lines.append(f"  missing: {item.name}, stage {step.id!r} {way}{remedy}")
    lines += [f"  warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def outcome_lines(outcome: Outcome) -> list[tuple[str, str | None]]:
    """A build's verdict, metrics and figures as lines and the colour of each."""
    if outcome.built is None:
        return [(f"{outcome.recipe.name}: failed", "red")]
    from phiconv.report.text import close_gates

    built = outcome.built
    lines: list[tuple[str, str | None]] = []
    for validation in built.result.validations:
        colour = _COLOURS[validation.status]
        lines.append((f"{outcome.recipe.name}: {validation.verdict}", colour))
        lines += [(line, None) for line in _findings(validation)]
        lines += [(str(gate), "red") for gate in validation.gates if not gate.passed]
        lines += [(line, "yellow") for line in close_gates(validation)]
    if not lines:
        lines.append((f"{outcome.recipe.name}: built, not validated", "yellow"))
    return lines + [(line, None) for line in _figures(built)]


def _findings(validation: Validation) -> list[str]:
    """The gated metrics and a few others, then the checks."""
    from phiconv.metrics import known_error
    from phiconv.report.text import CHECK_WORDS, about_errors

    metrics = validation.measurement.metrics
    gates = [gate for gate in validation.gates if not gate.built_in]
    gated = {gate.metric for gate in gates}
    rows: list[Sequence[str]] = []
    for name, value in metrics.items():
        if name not in gated and name not in _HEADLINE:
            continue
        measured = "not finite" if value is None else f"{value:.6g}"
        error = known_error(metrics, name)
        measured += "" if error is None else f" ± {error:.2g}"
        limits = [gate for gate in gates if gate.metric == name]
        bounds = ", ".join(f"{gate.bound} {gate.limit:.6g}" for gate in limits)
        state = "" if not limits else "passed" if all(g.passed for g in limits) else "failed"
        rows.append((name, measured, bounds, state))
    checks = validation.measurement.checks
    head = [f"  {validation.stage}: {validation.artifact} on {validation.measurement.tokens}"]
    if rows:
        head += table([("metric", "measured", "gate", ""), *rows], "    ")
        about = about_errors(validation.measurement)
        head += [f"    {about}"] if about else []
    if checks:
        head += table(
            [(item.name, CHECK_WORDS[item.state], item.summary) for item in checks], "    "
        )
        few = [item for item in checks if len(item.findings) <= _FEW_FINDINGS]
        head += [f"      {item.name}: {finding}" for item in few for finding in item.findings]
    return head if rows or checks else []


def _figures(built: Built) -> list[str]:
    stages = built.result.stages
    ran = [stage for stage in stages if not stage.cached]
    seconds = seconds_text(sum(stage.wall_s or 0 for stage in ran))
    figures = [f"{len(ran)} of {len(stages)} stages run in {seconds}" if ran else "all cached"]
    peak = max((stage.peak_rss_bytes or 0 for stage in ran), default=0)
    if peak:
        figures.append(f"peak memory {size_text(peak)}")
    return [
        f"  artifact: {built.artifact} ({size_text(built.result.size_bytes)})",
        f"  report: {built.report}",
        f"  {', '.join(figures)}",
    ]


def comparison_lines(comparison: Comparison) -> list[tuple[str, str | None]]:
    """A comparison as lines and the colour of each, the verdict last."""
    lines: list[tuple[str, str | None]] = []
    for pair in comparison.pairs:
        sides = ((comparison.baseline, pair.baseline), (comparison.candidate, pair.candidate))
        heads = [
            (
                name,
                side.result.recipe,
                size_text(side.result.size_bytes),
                f"{validation.stage} {validation.verdict}",
                f"{validation.measurement.provenance.runtime} "
                f"{validation.measurement.provenance.runtime_version}",
            )
            for name, (side, validation) in zip(("baseline", "candidate"), sides, strict=True)
        ]
        lines += [(line, None) for line in table(heads, "")]
        source = comparison.baseline.result.checkpoint.source
        lines.append((f"on {pair.candidate.measurement.tokens}, reference {source}", None))
        lines += [(line, None) for line in table(_comparison_rows(pair))]
        lines.append((f"± standard error, {pair.errors.about}", None))
    lines += [(f"not compared: {line}", "yellow") for line in comparison.not_run]
    lines += [(line, "red") for line in comparison.failures]
    gates = sum(pair.regression_gates + len(pair.gates) for pair in comparison.pairs)
    if comparison.failures:
        lines.append(("worse than the baseline by more than allowed", "red"))
    elif comparison.pairs:
        lines.append((f"no worse than the baseline: {gates} gates passed", "green"))
    return lines


def _comparison_rows(pair: Pair) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("metric", "baseline", "candidate", "difference", "may worsen by", "")
    ]
    for row in pair.rows:
        figures = [_or_dash(value) for value in (row.baseline, row.candidate)]
        rows.append(
            (
                row.metric,
                *figures,
                _difference(row),
                "" if row.allowed is None else f"{row.allowed:.4g}",
                row.state,
            )
        )
    return rows


def _difference(row: Row) -> str:
    if row.difference is None:
        return "-"
    text = "0" if row.difference == 0 else f"{row.difference:+.4g}"
    return text if row.standard_error is None else f"{text} ± {row.standard_error:.2g}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def entries_text(entries: Iterable[Entry], now: float) -> str:
    """Entries of the workspace as a table, the most recently used first."""
    found = sorted(entries, key=lambda entry: -entry.used)
    rows = [("kind", "recipe", "step", "size", "used", "key", "")]
    rows += [
        (
            entry.kind,
            entry.recipe,
            entry.step,
            size_text(entry.size_bytes),
            _ago(now - entry.used),
            entry.key[:12],
            f"in {entry.path}" if entry.is_lent else "",
        )
        for entry in found
    ]
    total = size_text(sum(entry.stored_bytes for entry in found))
    return "\n".join([*table(rows, ""), f"{len(found)} artifacts, {total}"])


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def findings_text(findings: Sequence[Finding]) -> str:
    """The doctor's findings by topic; `!` marks what is amiss."""
    lines: list[str] = []
    for topic in dict.fromkeys(finding.topic for finding in findings):
        rows = [
            ("!" if item.ok is False else " ", item.name, item.value)
            for item in findings
            if item.topic == topic
        ]
        lines += [topic, *table(rows)]
    return "\n".join(lines)


def inspection_text(found: OnnxSummary | GgufSummary | CheckpointSummary) -> str:
    """What an artifact or a checkpoint holds."""
    from phiconv.inspect import CheckpointSummary, OnnxSummary

    if isinstance(found, OnnxSummary):
        opsets = ", ".join(f"{name or 'ai.onnx'} {number}" for name, number in found.opsets.items())
        lines = [f"ONNX model {found.model}: IR version {found.ir_version}, opset {opsets}"]
        lines += ["operators", *table([(k, str(n)) for k, n in found.operators.items()])]
        lines += ["weights", *table(_weight_rows(found))]
        lines.append(f"  {found.bits_per_weight:.3f} bits a weight")
        about = found.genai
        if about:
            lines.append("genai_config.json")
    elif not isinstance(found, CheckpointSummary):
        lines = [f"GGUF file {found.model}", "weights", *table(_weight_rows(found))]
        lines += [f"  {found.bits_per_weight:.3f} bits a weight", "metadata"]
        about = found.metadata
    else:
        lines = [f"checkpoint {found.architecture}: {found.parameters:,} parameters"]
        about = found.config
    lines += table([(name, _plain(value)) for name, value in about.items()]) if about else []
    dtypes = found.dtypes.items()
    rows = [(name, f"{count} tensors", size_text(size)) for name, (count, size) in dtypes]
    lines += ["dtypes", *table(rows)]
    rows = [(name, size_text(size), "") for name, size in found.files.items()]
    return "\n".join([*lines, "files", *table(rows)])


def _plain(value: object) -> str:
    """A value of a config in words: `3500, 3503`; `do_sample false, top_p 1.0`; `-` for none."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "-" if value is None else str(value)


def _weight_rows(found: OnnxSummary | GgufSummary) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("kind", "format", "parameters", "size", "bits")]
    for record in found.weights:
        bits = f"{record.bits:.3f}"
        size = size_text(record.size_bytes)
        rows.append((record.kind, record.format, f"{record.parameters:,}", size, bits))
    return rows
