"""What a piece of work costs: wall time, processor time, peak resident memory."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

_SAMPLE_SECONDS = 0.05

# Set once objects are exempt from garbage collection; counting them would take 10 ms.
_exempt = threading.Event()

_importing = threading.RLock()


@dataclass(frozen=True)
class Usage:
    """Cost of a piece of work.

    Attributes:
        wall_s: Seconds that passed.
        cpu_s: Processor seconds, user and system, of this process.
        peak_rss_bytes: The most resident memory of this process while it was done.
    """

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int


class Meter:
    """Measures the work done inside `with Meter() as meter`; `meter.usage()` at any time.

    The operating system keeps only the peak of the whole process. Where that rose during the work
    it is the work's own peak; else the largest of the samples taken meanwhile is.
    """

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._sampled = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="phiconv-memory", daemon=True)

    def __enter__(self) -> Meter:
        self._wall = time.perf_counter()
        self._cpu = time.process_time()
        self._before = self._lifetime_peak()
        self._sampled = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak_rss_bytes(self) -> int:
        """The most resident memory since the start, in bytes."""
        peak = self._lifetime_peak()
        return peak if peak > self._before else self._sampled

    def usage(self) -> Usage:
        """What was spent since the start."""
        wall = time.perf_counter() - self._wall
        return Usage(wall, time.process_time() - self._cpu, self.peak_rss_bytes)

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._sampled = max(self._sampled, self._process.memory_info().rss)

    def _lifetime_peak(self) -> int:
        if sys.platform == "win32":
            return int(self._process.memory_info().peak_wset)
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if sys.platform == "darwin" else peak * 1024)


@contextmanager
def importing_alone() -> Iterator[None]:
    """Lets one thread at a time import of transformers what it has not imported yet.

    Its modules import each other in circles. Where two threads are in one circle, Python keeps them
    from waiting for each other by giving one of them a module that is only half there.
    """
    with _importing:
        yield


@contextmanager
def without_collections() -> Iterator[None]:
    """Stops the garbage collector while large packages are imported.

    They make millions of objects that stay; looking through them again and again takes a quarter of
    the seconds that torch and transformers need. What the first of them made is
    exempt from then on; later there may be garbage, which must not become exempt with it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if not _exempt.is_set():
            gc.freeze()
            _exempt.set()
        gc.enable()
