"""Runs a command as a whole process and reads the operating system's account of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Usage:
    """What one process, with the children it waited for, used.

    Attributes:
        wall: Seconds from start to end.
        cpu: User and system seconds.
        peak_rss: Largest resident set of a single process, in bytes.
        read: Bytes it asked the system for, from the page cache or the disk; None where the
            system keeps no account (anywhere but on Linux).
        written: Bytes it handed to the system.
    """

    wall: float
    cpu: float
    peak_rss: int
    read: int | None = None
    written: int | None = None


class CommandFailedError(RuntimeError):
    """A measured command did not exit with one of the codes expected."""


def run(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
    expected: Iterable[int] = (0,),
) -> Usage:
    """Run a command to its end, its output going to a file.

    Args:
        command: Program and arguments.
        log: Receives standard output and errors.
        env: Variables added to this process's own.
        folder: Where it runs, if not here.
        expected: Exit codes that are no failure.

    Raises:
        CommandFailedError: It exited with another code; the message has its last output.
    """
    with log.open("wb") as output:
        start = time.perf_counter()
        # As users run it: without its compiled modules Python compiles a tool's sources every time.
        variables = {**os.environ, **(env or {})}
        variables.pop("PYTHONDONTWRITEBYTECODE", None)
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=folder
        )
        read, written = _bytes_when_done(process.pid)
        # wait4 reports the peak memory of this very process; Popen must not reap it first.
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in expected:
        tail = log.read_text(errors="replace")[-2000:]
        raise CommandFailedError(f"{' '.join(command)} exited with {process.returncode}\n{tail}")
    # macOS counts bytes, Linux kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    return Usage(wall, cpu, usage.ru_maxrss * unit, read, written)


def _bytes_when_done(pid: int) -> tuple[int | None, int | None]:
    """Bytes read and written by a process and its children, once it has ended but is not reaped."""
    if sys.platform != "linux":
        return None, None
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return None, None
    counts = dict(line.split(": ") for line in lines)
    return int(counts["rchar"]), int(counts["wchar"])


def total(parts: Sequence[Usage]) -> Usage:
    """What processes that ran one after the other used together."""
    return Usage(
        sum(part.wall for part in parts),
        sum(part.cpu for part in parts),
        max(part.peak_rss for part in parts),
        _sum([part.read for part in parts]),
        _sum([part.written for part in parts]),
    )


def middle(usages: Sequence[Usage]) -> Usage:
    """Median of each figure."""
    read, written = ([getattr(usage, name) for usage in usages] for name in ("read", "written"))
    return Usage(
        median(usage.wall for usage in usages),
        median(usage.cpu for usage in usages),
        int(median(usage.peak_rss for usage in usages)),
        None if None in read else int(median(read)),
        None if None in written else int(median(written)),
    )


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
