"""How figures are written in every report, so that all of them say the same."""

from __future__ import annotations

from phiconv.report.results import RunResult, Status, Validation

STATUS_WORDS: dict[Status, str] = {
    "passed": "passed",
    "failed": "failed",
    "not_run": "not run",
    "ungated": "no gates",
}


def number(value: float | None) -> str:
    """A measured value with four significant digits."""
    if value is None:
        return "not finite"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.3e}"
    return f"{value:.4g}"


def limit(value: float) -> str:
    """A gate's limit, as the recipe says it: every digit counts."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def size(size_bytes: int | None) -> str:
    """Bytes in binary units, three significant digits."""
    if size_bytes is None:
        return ""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB" if value < 1000 else f"{value:.0f} GiB"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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


def failures(validation: Validation) -> list[str]:
    """One line a failed gate."""
    return [str(gate) for gate in validation.gates if not gate.passed]
