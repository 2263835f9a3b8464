"""The memory in which a file's segments are assembled: one arena whose slots are used again."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

SEGMENT_BYTES = 2 << 20
"""What is hashed and written at once: long enough for the disk."""


class SegmentMemory:
    """Page-aligned memory of the open segments of a file, as direct writes want it.

    Segments that follow each other in the file lie side by side where that is possible, so that
    what crosses from one into the next is still one array. Not thread-safe.

    Args:
        limit: Bytes that are used again and again. More is taken from the system for as long as
            it is needed.
    """

    def __init__(self, limit: int):
        slots = max(1, limit // SEGMENT_BYTES)
        self._arena = _pages(slots * SEGMENT_BYTES)
        self._free = set(range(slots))
        self._slots: dict[int, int] = {}
        self._beyond: dict[int, Bytes] = {}

    def __contains__(self, index: int) -> bool:
        return index in self._slots or index in self._beyond

    def fits(self, count: int) -> bool:
        """Whether so many segments more stay within the limit."""
        return len(self._free) - len(self._beyond) >= count

    def open(self, index: int) -> Bytes:
        """Memory for a segment that is not open; what it holds is not defined."""
        if not self._free:
            self._beyond[index] = _pages(SEGMENT_BYTES)
        else:
            beside = self._slots.get(index - 1, -2) + 1
            # The lowest else: what was never used takes no memory.
            slot = beside if beside in self._free else min(self._free)
            self._free.remove(slot)
            self._slots[index] = slot
        return self.together(index, index)

    def together(self, first: int, last: int) -> Bytes:
        """Memory of the open segment `first`, and of those up to `last` that lie right behind."""
        if first in self._beyond:
            return self._beyond[first]
        slot, count = self._slots[first], 1
        while first + count <= last and self._slots.get(first + count) == slot + count:
            count += 1
        return self._arena[slot * SEGMENT_BYTES : (slot + count) * SEGMENT_BYTES]

    def close(self, index: int) -> None:
        """Gives a segment's memory back."""
        if self._beyond.pop(index, None) is None:
            self._free.add(self._slots.pop(index))


def _pages(size: int) -> Bytes:
    """Anonymous memory that begins where a page does."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)
