"""What is shown while work runs: live bars on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from phiconv.kernels import compiling
from phiconv.stages.stage import Progress, SilentProgress
from phiconv.units import amount_text, seconds_text, size_text

if TYPE_CHECKING:
    from phiconv.report.results import StageRecord

PLAIN_TERMINALS = ("dumb", "unknown")
"""What TERM says where nothing can be redrawn or coloured, such as in an editor's shell."""
_PLAIN_SECONDS = 5.0
_PLAIN_SHARE = 0.1
"""Of the time a step has taken so far: a log of hours has dozens of lines, not thousands."""
_NAME_WIDTH = 36
_BAR_WIDTH = 24
_NARROW = 110
"""Columns below which the bar and the names of items give way to amounts and memory."""
_COMPILING = {
    True: "compiling kernels, once on this machine",
    False: "compiling kernels; NUMBA_CACHE_DIR can name a folder to keep them in",
}
"""By whether the machine code is kept."""

PeakMemory = Callable[[], int]


class Display(Protocol):
    """Where it is said what is being done."""

    def begin(self, title: str, count: int) -> None:
        """A piece of work of `count` steps begins, such as `building NAME`."""

    def step(self, name: str, uses: str, peak: PeakMemory) -> Progress:
        """A step starts; `peak` gives its peak memory so far, in bytes."""

    def done(self, record: StageRecord) -> None:
        """A step is finished, or was cached."""

    def note(self, text: str) -> None:
        """Says one line."""

    def close(self) -> None:
        """The display is needed no more; safe to call twice."""


def make_display(stream: TextIO | None, *, quiet: bool, terminal: bool | None = None) -> Display:
    """The display that suits a stream.

    Args:
        stream: Where it writes; None is what Python has for a closed stderr.
        quiet: Show nothing.
        terminal: Whether the stream is a terminal that can redraw a line; found out by default.
    """
    if quiet or stream is None:
        return QuietDisplay()
    if terminal is None:
        terminal = stream.isatty() and os.environ.get("TERM") not in PLAIN_TERMINALS
    if terminal:
        return RichDisplay(stream)
    return PlainDisplay(stream)


class QuietDisplay:
    """Shows nothing."""

    def begin(self, title: str, count: int) -> None:
        """Shows nothing."""

    def step(self, name: str, uses: str, peak: PeakMemory) -> Progress:
        """Shows nothing."""
        return SilentProgress()

    def done(self, record: StageRecord) -> None:
        """Shows nothing."""

    def note(self, text: str) -> None:
        """Shows nothing."""

    def close(self) -> None:
        """Shows nothing."""


def outcome(record: StageRecord) -> str:
    """`done in 3.2 s, 410.0 KB, peak 312.0 MB`, or `cached, 410.0 KB`."""
    size = size_text(record.size_bytes or 0)
    if record.cached:
        return f"cached, {size}"
    peak = size_text(record.peak_rss_bytes or 0)
    return f"done in {seconds_text(record.wall_s or 0)}, {size}, peak {peak}"


class PlainDisplay:
    """Lines without control characters; within a step ever more seldom."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._lock = threading.Lock()
        self._index = self._count = 0

    def begin(self, title: str, count: int) -> None:
        """Names the work."""
        self._index, self._count = 0, count
        self.note(title)

    def step(self, name: str, uses: str, peak: PeakMemory) -> Progress:
        """Says that a step starts."""
        label = f"[{self._index + 1}/{self._count}] {name}" if self._count else name
        self.note(f"{label}: {uses}")
        progress = _PlainProgress(self, label, self._clock)
        compiling.listen(progress.compiling)
        return progress

    def done(self, record: StageRecord) -> None:
        """Says what became of a step."""
        self._index += 1
        compiling.listen(None)
        self.note(f"[{self._index}/{self._count}] {record.id}: {outcome(record)}")

    def note(self, text: str) -> None:
        """Writes a line."""
        with self._lock:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Nothing is open."""
        compiling.listen(None)


class _PlainProgress:
    def __init__(self, display: PlainDisplay, label: str, clock: Callable[[], float]) -> None:
        self._display, self._label, self._clock = display, label, clock
        self._lock = threading.Lock()
        self._first = self._last = clock()
        self._told = False
        self.start(None)

    def start(self, total: int | None, unit: str = "bytes") -> None:
        with self._lock:
            self._done, self._total, self._unit = 0, total, unit

    def advance(self, amount: int, what: str | None = None) -> None:
        with self._lock:
            self._done += amount
            now = self._clock()
            pause = max(_PLAIN_SECONDS, _PLAIN_SHARE * (self._last - self._first))
            if now - self._last < pause:
                return
            self._last = now
            text = amount_text(self._done, self._total, self._unit)
        self._display.note(f"{self._label}: {text}{f', {what}' if what else ''}")

    def note(self, text: str) -> None:
        self._display.note(f"{self._label}: {text}")

    def compiling(self, kept: bool | None) -> None:
        """Says it once a step, however many kernels there are."""
        if kept is not None and not self._told:
            self._told = True
            self.note(_COMPILING[kept])


class RichDisplay:
    """A live bar for the running step: item, amount, time left, peak memory."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        self._console = Console(file=stream, force_terminal=True, highlight=False)
        narrow = self._console.width < _NARROW
        self.name_width = _NAME_WIDTH // 2 if narrow else _NAME_WIDTH
        self._bars = Bars(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=_BAR_WIDTH // 3 if narrow else _BAR_WIDTH),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("peak {task.fields[peak]}"),
            # What is left of the line; nothing else is ever cut for it.
            TextColumn(
                "[dim]{task.fields[what]}",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=self._console,
            transient=True,
            expand=True,
        )
        self._task: Any = None
        self._index = self._count = 0

    def begin(self, title: str, count: int) -> None:
        """Names the work."""
        self._index, self._count = 0, count
        self._console.print(f"[bold]{title}[/bold]")

    def step(self, name: str, uses: str, peak: PeakMemory) -> Progress:
        """Shows a step's bar."""
        compiling.listen(None)
        self._bars.start()
        self._remove_bar()
        label = f"[{self._index + 1}/{self._count}] {name}" if self._count else name
        label = label.replace("[", r"\[")
        self._task = self._bars.add_task(
            label, total=None, amount="", what=uses, peak=_PeakText(peak)
        )
        progress = _RichProgress(self, self._bars, self._task, uses)
        compiling.listen(progress.compiling)
        return progress

    def done(self, record: StageRecord) -> None:
        """Replaces the bar by a line."""
        self._index += 1
        compiling.listen(None)
        self._remove_bar()
        label = f"[{self._index}/{self._count}] {record.id}".replace("[", r"\[")
        style = "dim" if record.cached else "green"
        self._console.print(f"{label} [{style}]{outcome(record)}[/{style}]")

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        """Takes the bars away."""
        compiling.listen(None)
        self._bars.stop()

    def refresh(self) -> None:
        """Draws now; otherwise it is drawn ten times a second."""
        self._bars.refresh()

    def _remove_bar(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self.refresh()
            self._task = None


class _PeakText:
    """Peak memory as text, at the moment it is drawn."""

    def __init__(self, peak: PeakMemory) -> None:
        self._peak = peak

    def __str__(self) -> str:
        return size_text(self._peak())


class _RichProgress:
    def __init__(self, display: RichDisplay, bars: Any, task: Any, what: str) -> None:
        self._display, self._bars, self._task = display, bars, task
        self._what = what
        self._compiling: str | None = None
        self._lock = threading.Lock()
        self._done = 0
        self._total: int | None = None
        self._unit = "bytes"

    def start(self, total: int | None, unit: str = "bytes") -> None:
        with self._lock:
            self._done, self._total, self._unit = 0, total, unit
        self._bars.reset(self._task, total=total)
        self._update(None)

    def advance(self, amount: int, what: str | None = None) -> None:
        with self._lock:
            self._done += amount
        self._update(what)

    def note(self, text: str) -> None:
        self._display.note(text)

    def compiling(self, kept: bool | None) -> None:
        """Says it in place of the item in hand, for as long as it lasts."""
        self._compiling = None if kept is None else _COMPILING[kept]
        self._update(None)

    def _update(self, what: str | None) -> None:
        if what:
            width = self._display.name_width
            self._what = what if len(what) <= width else "…" + what[1 - width :]
        # While it compiles nothing is added to the amount, so its place is free.
        amount = amount_text(self._done, self._total, self._unit) if not self._compiling else ""
        shown = self._compiling or self._what
        self._bars.update(self._task, completed=self._done, amount=amount, what=shown)
