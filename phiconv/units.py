"""Bytes and seconds as people read them, the same wherever phiconv writes them."""

from __future__ import annotations

_BYTE_UNITS = ("B", "KB", "MB", "GB", "TB")
_MILLIONS_FROM = 1_000_000


def size_text(count: int) -> str:
    """`2.4 GB`: decimal units, as disks are sold."""
    value, index = float(count), 0
    # 999.95 KB would be rounded to 1000.0 KB; whole bytes never round
    while index < len(_BYTE_UNITS) - 1 and value >= (999.95 if index else 1000):
        value, index = value / 1000, index + 1
    return f"{value:.1f} {_BYTE_UNITS[index]}" if index else f"{count} B"


def seconds_text(seconds: float) -> str:
    """`3.2 s`, `4 min 05 s`, `2 h 03 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def amount_text(done: int, total: int | None, unit: str) -> str:
    """`1.1 GB of 2.4 GB`, `512 of 4096 tokens`, or `0.5 M of 4.2 M tokens`."""
    if unit == "bytes":
        return f"{size_text(done)} of {size_text(total)}" if total else size_text(done)
    in_millions = (total or done) >= _MILLIONS_FROM
    text, whole = (
        f"{count / 1e6:.1f} M" if in_millions else str(count) for count in (done, total or 0)
    )
    return f"{text} of {whole} {unit}" if total else f"{text} {unit}"
