"""A file of tensors: positional writes from many threads, its digest on the way."""

from __future__ import annotations

import ctypes
import hashlib
import heapq
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

HASH_CHUNK_BYTES = 4 << 20
WRITE_OUT_BYTES = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


@dataclass(frozen=True)
class Region:
    """Byte range of one tensor in the file."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """Offset of the first byte after it."""
        return self.offset + self.length


class DataFile:
    """A file of known size that threads fill in any order while its sha256 is computed in order.

    Args:
        path: File to create; it must not exist.
        regions: Byte ranges that will be written; the gaps between them stay zero.
    """

    def __init__(self, path: Path, regions: Mapping[str, Region]):
        self.path = path
        self.size = max((region.end for region in regions.values()), default=0)
        self._handles = _ThreadHandles(path)
        with path.open("xb") as file:
            file.truncate(self.size)
        self._digest = _PrefixDigest(path, self.size)
        end = 0
        for region in sorted(regions.values(), key=lambda region: region.offset):
            if region.offset > end:
                self._digest.complete(end, region.offset)
            end = region.end

    def __enter__(self) -> DataFile:
        self._digest.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._digest.abandon()
        self._digest.join()
        self._handles.close()

    def write(self, offset: int, data: npt.NDArray[Any]) -> None:
        """Write a C-contiguous array at a byte offset; any thread, ranges must not overlap."""
        file = self._handles.current()
        file.seek(offset)
        view = data.reshape(-1).view(np.uint8).data
        while view:
            view = view[file.write(view) :]

    def complete(self, start: int, stop: int) -> None:
        """Declare the bytes ``[start, stop)`` final."""
        self._digest.complete(start, stop)

    def sha256(self) -> str:
        """Digest of the whole file; waits until every region is complete."""
        self._digest.join()
        return self._digest.hexdigest()


class _ThreadHandles:
    """One unbuffered handle a thread: a seek by one never moves another's position."""

    def __init__(self, path: Path):
        self._path = path
        self._local = threading.local()
        self._all: list[BinaryIO] = []
        self._lock = threading.Lock()

    def current(self) -> BinaryIO:
        file: BinaryIO | None = getattr(self._local, "file", None)
        if file is None:
            file = cast(BinaryIO, self._path.open("r+b", buffering=0))
            self._local.file = file
            with self._lock:
                self._all.append(file)
        return file

    def close(self) -> None:
        with self._lock:
            for file in self._all:
                file.close()
            self._all.clear()


class _PrefixDigest(threading.Thread):
    """sha256 of a file being written out of order: follows the end of its completed prefix.

    What it reads was written a moment ago and comes from the page cache. What it has read it sends
    on its way to the disk, so that little is left to wait for when the file is flushed at the end.
    """

    def __init__(self, path: Path, size: int):
        super().__init__(name="phiconv-digest", daemon=True)
        self._path = path
        self._size = size
        self._sha256 = hashlib.sha256()
        self._pending: list[tuple[int, int]] = []
        self._ready = 0
        self._abandoned = False
        self._error: OSError | None = None
        self._changed = threading.Condition()

    def complete(self, start: int, stop: int) -> None:
        with self._changed:
            heapq.heappush(self._pending, (start, stop))
            while self._pending and self._pending[0][0] == self._ready:
                self._ready = heapq.heappop(self._pending)[1]
            self._changed.notify()

    def abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            self._changed.notify()

    def run(self) -> None:
        buffer = bytearray(HASH_CHUNK_BYTES)
        done = written_out = 0
        try:
            with self._path.open("rb", buffering=0) as file:
                while done < self._size:
                    with self._changed:
                        while not (self._abandoned or self._far_enough(done)):
                            self._changed.wait()
                        if self._abandoned:
                            return
                        wanted = min(self._ready - done, HASH_CHUNK_BYTES)
                    count = file.readinto(memoryview(buffer)[:wanted])
                    if not count:
                        raise OSError(f"{self._path} became shorter while it was written")
                    self._sha256.update(memoryview(buffer)[:count])
                    done += count
                    if done - written_out >= WRITE_OUT_BYTES:
                        _begin_write_out(file.fileno(), written_out, done - written_out)
                        written_out = done
        except OSError as error:
            self._error = error

    def _far_enough(self, done: int) -> bool:
        """Whole chunks, or the end of the file: fewer wake-ups of a busy machine."""
        return self._ready - done >= HASH_CHUNK_BYTES or self._ready == self._size

    def hexdigest(self) -> str:
        if self._error is not None:
            raise self._error
        return self._sha256.hexdigest()


def _begin_write_out(descriptor: int, start: int, length: int) -> None:
    """Asks Linux to begin writing a range to the disk; elsewhere, the system decides when."""
    if sys.platform != "linux":
        return
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        offsets = (ctypes.c_int64(start), ctypes.c_int64(length))
        begin(ctypes.c_int(descriptor), *offsets, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
