"""What was measured: ratios with their spread, verdicts, results.json and a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, LARGEST, LARGEST_RSS, OURS, Case, Target
from benchmarks.measure import Usage, middle


@dataclass
class Measured:
    """The runs of one case.

    Attributes:
        layers: Layers, where not the shape's own.
        rounds: By side, one usage a round.
        sizes: Bytes of each side's artifact.
        divergences: Mean KL divergence of each side's artifact of the trained checkpoint.
        not_measured: Why a side is missing.
    """

    layers: int | None
    rounds: dict[str, list[Usage]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    divergences: dict[str, float | None] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Whether a target holds.

    Attributes:
        target: The target.
        ratio: Of the medians; None when the other side was not measured.
        least: The smallest ratio of a round.
        most: The largest.
    """

    target: Target
    ratio: float | None
    least: float | None
    most: float | None

    @property
    def met(self) -> bool | None:
        """None when it was not measured."""
        return None if self.ratio is None else self.ratio <= self.target.at_most


def judge(case: Case, measured: Measured) -> list[Verdict]:
    """Every target of a case, from phiconv's runs and the other side's of the same round."""
    return [_verdict(target, measured.rounds) for target in case.targets]


def _verdict(target: Target, rounds: Mapping[str, Sequence[Usage]]) -> Verdict:
    ours = rounds.get(OURS)
    theirs = rounds.get(target.over) if target.over else None
    if not ours or (target.over and not theirs):
        return Verdict(target, None, None, None)
    name = target.figure
    others = [getattr(usage, name) for usage in theirs] if theirs else [1] * len(ours)
    each = [getattr(mine, name) / other for mine, other in zip(ours, others, strict=True)]
    middle_ratio = getattr(middle(ours), name) / (getattr(middle(theirs), name) if theirs else 1)
    return Verdict(target, middle_ratio, min(each), max(each))


def save(file: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Puts one entry into results.json, beside what was measured before."""
    document = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    document[name] = entry
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def entry_of(name: str, measured: Measured, environment: Mapping[str, Any]) -> dict[str, Any]:
    """One case as data."""
    case = CASES[name]
    return {
        "work": case.work,
        "model": case.model,
        **asdict(measured),
        "medians": {side: asdict(middle(runs)) for side, runs in measured.rounds.items()},
        "targets": [{**asdict(verdict), "met": verdict.met} for verdict in judge(case, measured)],
        "environment": environment,
    }


def figures_table(results: Mapping[str, Any]) -> str:
    """Every side's medians as a Markdown table."""
    lines = [
        "| work | by | wall | CPU | peak memory | read | written | artifact | KL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in results.values():
        for side, figures in entry["medians"].items():
            lines.append(_figures_row(entry, side, figures))
        for side, reason in entry["not_measured"].items():
            lines.append(f"| {work_of(entry)} | {side} | not measured: {reason} | | | | | | |")
    return "\n".join(lines)


def _figures_row(entry: Mapping[str, Any], side: str, figures: Mapping[str, Any]) -> str:
    divergence = entry["divergences"].get(side)
    cells = [
        work_of(entry),
        side,
        f"{figures['wall']:.1f} s",
        f"{figures['cpu']:.1f} s",
        _gigabytes(figures["peak_rss"]),
        _gigabytes(figures["read"]),
        _gigabytes(figures["written"]),
        _gigabytes(entry["sizes"].get(side)),
        "" if divergence is None else f"{divergence:.5f}",
    ]
    return f"| {' | '.join(cells)} |"


def work_of(entry: Mapping[str, Any]) -> str:
    """A piece of work and the model it was measured on."""
    layers = f", layers: {entry['layers']}" if entry["layers"] else ""
    return f"{entry['work']}, {entry['model']}{layers}"


def _gigabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f} GB"


def targets_table(results: Mapping[str, Any]) -> str:
    """Every target with what was measured, as a Markdown table."""
    lines = ["| work | figure | beside | target | measured | |", "|---|---|---|---|---|---|"]
    rows = [_target_row(entry, item) for entry in results.values() for item in entry["targets"]]
    return "\n".join([*lines, *rows])


_FIGURES = {"wall": "wall", "cpu": "CPU", "peak_rss": "peak memory"}


def _target_row(entry: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    target = item["target"]
    absolute = target["over"] is None
    text = "not measured"
    if item["ratio"] is not None:
        text = _ratio(item["ratio"], absolute)
        if item["least"] != item["most"]:
            spread = sorted(_ratio(item[name], absolute) for name in ("least", "most"))
            text += f" ({spread[0]} to {spread[1]})"
    verdict = {True: "met", False: "**missed**", None: "–"}[item["met"]]
    cells = [
        work_of(entry),
        _FIGURES[target["figure"]],
        target["over"] or "",
        f"≤ {_ratio(target['at_most'], absolute)}",
        text,
        verdict,
    ]
    return f"| {' | '.join(cells)} |"


def _ratio(value: float, absolute: bool) -> str:
    if absolute:
        return _gigabytes(value)
    return f"{value:.2f}×" if value > 0.5 else f"1/{1 / value:.1f}"


def scaling_entry(
    layers: Mapping[int, Usage], largest: Usage | None, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """The runs with more and more layers, and of the largest shape, as data."""
    return {
        "layers": {str(count): asdict(usage) for count, usage in layers.items()},
        "largest": None if largest is None else {"model": LARGEST, **asdict(largest)},
        "environment": environment,
    }


def scaling_table(entry: Mapping[str, Any]) -> str:
    """Time and memory by the number of layers, as a Markdown table."""
    lines = ["| model | wall | CPU | CPU a layer | peak memory |", "|---|---|---|---|---|"]
    for count, usage in entry["layers"].items():
        lines.append(
            f"| {count} layers | {usage['wall']:.1f} s | {usage['cpu']:.1f} s "
            f"| {usage['cpu'] / int(count):.2f} s | {_gigabytes(usage['peak_rss'])} |"
        )
    if entry["largest"]:
        usage = entry["largest"]
        held = "" if usage["peak_rss"] <= LARGEST_RSS else ", **missed**"
        lines.append(
            f"| {usage['model']} | {usage['wall']:.1f} s | {usage['cpu']:.1f} s | "
            f"| {_gigabytes(usage['peak_rss'])} (≤ {_gigabytes(LARGEST_RSS)}{held}) |"
        )
    return "\n".join(lines)
