"""A file of tensors: filled by many threads in any order, hashed and written in the file's order.

The file is assembled in memory, in segments. Threads compute right into the segments in which
their bytes lie; a segment whose bytes are all there is hashed, written and its memory used again.
So every byte goes to the disk once and is never read back.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from phiconv.direct_file import BLOCK_BYTES, DirectFile
from phiconv.segment_memory import SEGMENT_BYTES, SegmentMemory
from phiconv.write_threads import run_all

Bytes = npt.NDArray[np.uint8]

# One hashes while the others write: enough to keep a disk busy.
_DRAINS = 3
# Memory for what is hashed and written, and for what each thread fills.
_DRAINED_BYTES = 8 << 20
_FILLED_BYTES = 6 << 20


@dataclass(frozen=True)
class Region:
    """Bytes of the file: of a tensor, or of the rows of a panel within one.

    Attributes:
        offset: The first byte.
        length: Bytes of a row.
        rows: How many rows there are.
        stride: Bytes from the beginning of a row to that of the next.
    """

    offset: int
    length: int
    rows: int = 1
    stride: int = 0

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + (self.rows - 1) * self.stride + self.length

    def bytes_before(self, position: int) -> int:
        """How many of its bytes lie before a position of the file."""
        if position <= self.offset:
            return 0
        if position >= self.end:
            return self.rows * self.length
        if self.rows == 1:
            return position - self.offset
        whole, rest = divmod(position - self.offset, self.stride)
        return whole * self.length + min(rest, self.length)

    def by_segment(self) -> Iterator[tuple[int, int]]:
        """The segments that hold bytes of it, and how many."""
        if not self.length:
            return
        before = 0
        for index in range(self.offset // SEGMENT_BYTES, -(-self.end // SEGMENT_BYTES)):
            after = self.bytes_before((index + 1) * SEGMENT_BYTES)
            if after > before:
                yield index, after - before
            before = after


class DataFile:
    """A file of known size that threads fill in any order.

    Args:
        path: File to create; it must not exist.
        size: Its length in bytes.
        regions: What will be filled, without overlaps; the rest of the file is zero.
        threads: How many will fill it. With `waiting` it gives the limit on the memory used at a
            time, which is exceeded only where nothing could go on otherwise.
        waiting: Bytes that are filled while others before them are still missing.

    Raises:
        FileExistsError: There is such a file.
        OSError: Such as a full disk.
    """

    def __init__(
        self, path: Path, size: int, regions: Iterable[Region], *, threads: int, waiting: int = 0
    ):
        self.path = path
        self.size = size
        self._segments = -(-size // SEGMENT_BYTES)
        self._missing = [0] * self._segments
        self._gaps: dict[int, list[slice]] = {}
        self._note_regions(regions)
        self._memory = SegmentMemory(_DRAINED_BYTES + threads * _FILLED_BYTES + waiting)
        self._threads = threads
        self._sha256 = hashlib.sha256()
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # what jobs wait for
        self._full = threading.Condition(self._lock)  # what drains wait for: the next segment
        self._next = 0  # the first segment that no drain has taken
        self._hashing = False
        self._error: BaseException | None = None
        self._drains = [
            threading.Thread(target=self._drain, name="phiconv-drain", daemon=True)
            for _ in range(_DRAINS)
        ]
        self._file = DirectFile(path, size)

    def _note_regions(self, regions: Iterable[Region]) -> None:
        end = 0
        for region in sorted(regions, key=lambda region: region.offset):
            for index, count in region.by_segment():
                self._missing[index] += count
            self._note_gap(end, region.offset)
            end = region.end
        self._note_gap(end, -(-self.size // BLOCK_BYTES) * BLOCK_BYTES)

    def _note_gap(self, start: int, stop: int) -> None:
        for index, count in Region(start, max(0, stop - start)).by_segment():
            first = max(start - index * SEGMENT_BYTES, 0)
            self._gaps.setdefault(index, []).append(slice(first, first + count))

    def __enter__(self) -> DataFile:
        for drain in self._drains:
            drain.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._fail(error)
        for drain in self._drains:
            drain.join()
        self._file.close()

    def run(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Runs jobs that fill the file, begun in order; see `fill`.

        Raises:
            Exception: What the first job to fail raised, or why the file cannot be written.
        """
        run_all((partial(self._attempt, job) for job in jobs), self._threads)

    def _attempt(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._fail(error)  # or others would wait for its bytes
            raise

    @contextmanager
    def fill(self, *regions: Region) -> Iterator[Filling]:
        """Lends memory for regions, which are final afterwards; any thread.

        Waits while the memory is used up. So that no job waits for ever, a thread asks for all of a
        job's regions at once, and jobs begin in the order of their first bytes: whatever is missing
        in the first segment that is not full, then belongs to a job that has begun, or to one that
        will begin once those before it, which lack bytes there as well, are done. Such jobs do not
        wait.

        Raises:
            OSError: Writing failed.
        """
        filling = Filling(regions)
        self._admit(filling)
        yield filling
        filling.settle()
        with self._lock:
            for index, count in filling.shares():
                self._missing[index] -= count
            self._call_drain()

    def write(self, offset: int, data: npt.NDArray[Any]) -> None:
        """Fills the bytes at an offset with those of a C-contiguous array; any thread."""
        region = Region(offset, data.nbytes)
        with self.fill(region) as filling:
            filling.array(region, (data.nbytes,), np.dtype(np.uint8))[:] = data.reshape(-1).view(
                np.uint8
            )

    def sha256(self) -> str:
        """Digest of the whole file; waits until every region is filled and written.

        Raises:
            OSError: Writing failed.
        """
        for drain in self._drains:
            drain.join()
        self._raise_error()
        self._file.finish()
        return self._sha256.hexdigest()

    def _admit(self, filling: Filling) -> None:
        """Opens the segments of a job, once there is memory for them."""
        wanted = sorted({index for index, _ in filling.shares()})
        with self._lock:
            while True:
                self._raise_error()
                closed = [index for index in wanted if index not in self._memory]
                if self._next in wanted or self._memory.fits(len(closed)):
                    break
                self._room.wait()
            for index in closed:
                self._open(index)
            filling.lend(self._memory)

    def _open(self, index: int) -> None:
        memory = self._memory.open(index)
        for gap in self._gaps.get(index, ()):
            memory[gap] = 0

    def _drain(self) -> None:
        """Hashes one full segment after the other, in turns with other threads, and writes it."""
        try:
            while (taken := self._take()) is not None:
                index, segment = taken
                start = index * SEGMENT_BYTES
                self._sha256.update(segment[: self.size - start].data)
                with self._lock:
                    self._hashing = False
                    self._call_drain()
                self._file.write(start, segment[: _padded(self.size - start)].data)
                with self._lock:
                    self._memory.close(index)
                    self._room.notify_all()
        except BaseException as error:
            self._fail(error)

    def _take(self) -> tuple[int, Bytes] | None:
        """The next segment, once it is full and its turn to be hashed; None when all is done."""
        with self._lock:
            while self._error is None and self._next < self._segments:
                if not self._is_next_ready():
                    self._full.wait()
                    continue
                index = self._next
                self._next += 1
                self._hashing = True
                if index not in self._memory:  # nothing but zeros
                    self._open(index)
                self._room.notify_all()  # jobs that fill the segment which is the next now
                return index, self._memory.together(index, index)
            self._full.notify_all()
            return None

    def _is_next_ready(self) -> bool:
        done = self._next == self._segments
        return not (self._hashing or done or self._missing[self._next])

    def _call_drain(self) -> None:
        if self._is_next_ready():
            self._full.notify()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self._full.notify_all()
            self._room.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _padded(length: int) -> int:
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES


class Filling:
    """The memory that a job fills."""

    def __init__(self, regions: Iterable[Region]):
        self._shares = {region: list(region.by_segment()) for region in regions}
        self._runs: dict[Region, list[tuple[int, Bytes]]] = {}
        self._apart: list[tuple[Region, int, Bytes]] = []

    def shares(self) -> Iterator[tuple[int, int]]:
        """The segments that hold bytes of each region, and how many."""
        return chain.from_iterable(self._shares.values())

    def lend(self, memory: SegmentMemory) -> None:
        """Looks up where the regions lie, once their segments are open."""
        for region, shares in self._shares.items():
            self._runs[region] = list(_runs(memory, [index for index, _ in shares]))

    def array(
        self, region: Region, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> npt.NDArray[Any]:
        """The array to fill a region of one row with; uninitialised."""
        ((_, _, rows),) = self.rows(region)
        return rows.reshape(-1).view(dtype).reshape(shape)

    def rows(self, region: Region) -> Iterator[tuple[int, int, Bytes]]:
        """Memory for the rows of a region, in as few pieces as it lies in.

        Yields:
            First row, the row after the last, and uint8 `[rows, length]`, uninitialised; its rows
            may lie apart.
        """
        row = 0
        for start, memory in self._runs[region]:
            if row == region.rows:
                return
            # A row that began before this run was yielded apart.
            first = region.offset + row * region.stride - start
            count = (len(memory) - first - region.length) // max(region.stride, 1) + 1
            count = min(count, region.rows - row)
            if count > 0:
                shape, strides = (count, region.length), (max(region.stride, region.length), 1)
                yield row, row + count, as_strided(memory[first:], shape, strides)
                row += count
            if row < region.rows and region.offset + row * region.stride < start + len(memory):
                apart = np.empty((1, region.length), np.uint8)
                self._apart.append((region, row, apart))
                yield row, row + 1, apart
                row += 1

    def settle(self) -> None:
        """Puts rows that lie in memory of two runs or more where they belong."""
        for region, row, apart in self._apart:
            begin = region.offset + row * region.stride
            end = begin + region.length
            for start, memory in self._runs[region]:
                first, last = max(begin, start), min(end, start + len(memory))
                if first < last:
                    memory[first - start : last - start] = apart[0, first - begin : last - begin]


def _runs(memory: SegmentMemory, indices: Sequence[int]) -> Iterator[tuple[int, Bytes]]:
    """Offset in the file and memory of open segments, joined where they lie together."""
    end = 0
    for index in indices:
        start = index * SEGMENT_BYTES
        if start >= end:
            joined = memory.together(index, indices[-1])
            end = start + len(joined)
            yield start, joined
