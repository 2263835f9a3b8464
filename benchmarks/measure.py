"""Runs a command as a whole process and reads the operating system's account of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
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
    """

    wall: float
    cpu: float
    peak_rss: int


class CommandFailedError(RuntimeError):
    """A measured command did not exit with 0."""


def run(command: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, its output going to a file.

    Raises:
        CommandFailedError: It exited with another code than 0; the message has its last output.
    """
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        # wait4 reports the peak memory of this very process; Popen must not reap it first.
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise CommandFailedError(f"{' '.join(command)} exited with {process.returncode}\n{tail}")
    # macOS counts bytes, Linux kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def middle(usages: Sequence[Usage]) -> Usage:
    """Median of each figure."""
    return Usage(
        median(usage.wall for usage in usages),
        median(usage.cpu for usage in usages),
        int(median(usage.peak_rss for usage in usages)),
    )
