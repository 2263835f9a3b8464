"""A new file that is written in large blocks, past the page cache where the system can."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from pathlib import Path

BLOCK_BYTES = 4096
"""Offsets, lengths and addresses of direct writes are multiples of this."""

_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_NO_DIRECT_WRITES = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


class DirectFile:
    """A file written with O_DIRECT where the file system has it, else through the page cache.

    The page cache costs a copy, and the kernel slows down writers that fill it faster than the
    disk takes it. Any thread may write.

    Args:
        path: File to create; it must not exist.
        size: Its length in bytes. The space is reserved at once where that is possible.

    Raises:
        FileExistsError: There is such a file.
        OSError: Such as a full disk.
    """

    def __init__(self, path: Path, size: int):
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(path, flags, 0o666)
        self._size = size
        self._lock = threading.Lock()
        try:
            _reserve(self._descriptor, size, path)
            self._direct = _set_direct(self._descriptor, True)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, offset: int, block: memoryview) -> None:
        """Writes a block, and has the disk begin with it.

        Args:
            offset: Where; a multiple of `BLOCK_BYTES`.
            block: What; its address and length are multiples of `BLOCK_BYTES`. It may reach past
                the end of the file: `finish` cuts that off.

        Raises:
            OSError: Such as a full disk.
        """
        done = 0
        while done < len(block):
            try:
                count = self._write_some(offset + done, block[done:])
            except OSError as error:
                # Also after a write that was cut short within a block.
                if not self._direct or error.errno not in _NO_DIRECT_WRITES:
                    raise
                self._direct = _set_direct(self._descriptor, False)
                continue
            if count == 0:
                raise OSError(errno.EIO, "the system wrote nothing")
            done += count
        if not self._direct:
            _begin_write_out(self._descriptor, offset, len(block))

    def _write_some(self, offset: int, block: memoryview) -> int:
        if sys.platform != "win32":
            return os.pwrite(self._descriptor, block, offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.write(self._descriptor, block)

    def finish(self) -> None:
        """Gives the file its length; nothing may be written afterwards."""
        os.ftruncate(self._descriptor, self._size)

    def close(self) -> None:
        """Closes the file; it is not flushed."""
        os.close(self._descriptor)


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Gives the file its length, and its space on the disk, so that a full one is known at once."""
    fallocate = None
    if sys.platform == "linux":
        # Python's posix_fallocate writes a byte to every block where the file system cannot do it.
        fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None and size:
        lengths = (ctypes.c_int64(0), ctypes.c_int64(size))
        if fallocate(ctypes.c_int(descriptor), ctypes.c_int(0), *lengths) == 0:
            return
        code = ctypes.get_errno()
        if code in _NO_SPACE:
            os.ftruncate(descriptor, 0)  # gives back what there was
            raise OSError(code, os.strerror(code), str(path))
    os.ftruncate(descriptor, size)


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Turns direct writes on or off; returns whether they are on."""
    if sys.platform != "linux":
        return False
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))
    except OSError:
        return False
    return direct


def _begin_write_out(descriptor: int, start: int, length: int) -> None:
    """Asks Linux to begin writing a range to the disk; elsewhere, the system decides when."""
    if sys.platform != "linux":
        return
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        offsets = (ctypes.c_int64(start), ctypes.c_int64(length))
        begin(ctypes.c_int(descriptor), *offsets, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
