"""The threads of a writer: cutting its work, buffers that each reuses, running jobs to the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import numpy.typing as npt

CHUNK_BYTES = 2 << 20
"""A job's input: small enough to stay in the second-level cache between reading and computing."""

# On Windows Ctrl+C does not end a wait, and is noticed only behind it.
_INTERRUPTIBLE_SECONDS = 0.5


class ThreadBuffers:
    """Arrays that live as long as their thread, so that a job allocates nothing."""

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self, use: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An uninitialised array; the next call of this thread with the same `use` overwrites it.

        Args:
            use: What it is for.
            shape: Its shape.
            dtype: Its dtype.
        """
        size = int(np.prod(shape)) * dtype.itemsize
        buffers: dict[str, npt.NDArray[Any]] = self._local.__dict__
        if use not in buffers or buffers[use].nbytes < size:
            buffers[use] = np.empty(size, np.uint8)
        return buffers[use][:size].view(dtype).reshape(shape)


def evenly(total: int, nbytes: int, limit: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Cuts rows into equal ranges, the last of which may be shorter.

    Args:
        total: Number of rows.
        nbytes: Their bytes.
        limit: Bytes that a range should not exceed.
        multiple: Of what the number of rows in a range is a multiple, be it beyond the limit.

    Yields:
        First row, and the row after the last.
    """
    step = -(-total // -(-nbytes // limit))
    step = -(-step // multiple) * multiple
    for start in range(0, total, step):
        yield start, min(start + step, total)


def run_all(tasks: Iterable[Callable[[], None]], threads: int) -> None:
    """Runs tasks on a thread pool, begun in order; the first failure cancels what has not begun.

    Raises:
        Exception: What the first task to fail raised.
    """
    pool = ThreadPoolExecutor(max_workers=max(1, threads), thread_name_prefix="phiconv-write")
    try:
        futures = [pool.submit(task) for task in tasks]
        done, rest = wait(futures, _INTERRUPTIBLE_SECONDS, FIRST_EXCEPTION)
        while rest and not any(future.exception() for future in done):
            done, rest = wait(futures, _INTERRUPTIBLE_SECONDS, FIRST_EXCEPTION)
        for future in done:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
