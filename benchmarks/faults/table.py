"""What was caught and named, class by class, and what was missed, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmarks.faults.trial import CLEAN, Verdict


def table(verdicts: Sequence[Verdict]) -> str:
    """Caught and rightly named of planted, by class; then every one that was missed or misnamed."""
    clean = {_subject(v): v for v in verdicts if v.trial.fault == CLEAN}
    planted = [verdict for verdict in verdicts if verdict.trial.fault != CLEAN]
    rows = ["| fault | planted | caught | named | caught by |", "|---|--:|--:|--:|---|"]
    names = dict.fromkeys(verdict.trial.fault for verdict in planted)
    rows += [_row(name, [v for v in planted if v.trial.fault == name]) for name in names]
    rows.append(_row("all", planted))
    alarms = [v for v in clean.values() if v.caught_by or v.seen]
    rows += ["", f"{len(alarms)} of {len(clean)} clean artifacts raise an alarm."]
    rows += ["", "| not caught | in | mean KL, and without it | diagnosis |", "|---|---|--:|---|"]
    missed = [verdict for verdict in planted if not verdict.caught_by]
    rows += [_missed(verdict, clean.get(_subject(verdict))) for verdict in missed]
    rows += ["", "| caught, not named | in | caught by | said |", "|---|---|---|---|"]
    unnamed = [verdict for verdict in planted if verdict.caught_by and not verdict.named_right]
    rows += [
        f"| {v.trial.fault}: {v.planted} | {' '.join(_subject(v))} | {', '.join(v.caught_by)} | "
        f"{_cell(v.said)} |"
        for v in unnamed
    ]
    return "\n".join(rows) + "\n"


def _subject(verdict: Verdict) -> tuple[str, str]:
    return verdict.trial.model, verdict.trial.kind


def _row(name: str, verdicts: Sequence[Verdict]) -> str:
    gates = Counter(gate for verdict in verdicts for gate in verdict.caught_by)
    by = ", ".join(f"{gate} {count}" for gate, count in gates.most_common())
    caught = sum(bool(verdict.caught_by) for verdict in verdicts)
    named = sum(verdict.named_right for verdict in verdicts)
    return f"| {name} | {len(verdicts)} | {caught} | {named} | {by} |"


def _missed(verdict: Verdict, clean: Verdict | None) -> str:
    before = "-" if clean is None or clean.kl_mean is None else f"{clean.kl_mean:.6f}"
    after = "-" if verdict.kl_mean is None else f"{verdict.kl_mean:.6f}"
    said = "finds it" if verdict.seen else "finds nothing"
    where = " ".join(_subject(verdict))
    return f"| {verdict.trial.fault}: {verdict.planted} | {where} | {after}, {before} | {said} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:240]
