"""Disk space, durability and disk-full errors."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from phiconv.errors import EnvironmentLacksError
from phiconv.units import size_text

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_OPEN_FILES_STAY = os.name == "nt"
_PATIENCE_SECONDS = 3.0


def existing_parent(path: Path) -> Path:
    """The closest folder of `path` that exists.

    Raises:
        EnvironmentLacksError: There is none: on Windows, no such drive or share.
    """
    found = path.absolute()
    # unlike Path.exists, it raises nothing when a folder may not be entered
    while not os.path.exists(found):  # noqa: PTH110
        if found == found.parent:
            raise EnvironmentLacksError(
                f"there is no {found}",
                where=str(path),
                remedy="name a drive that is there",
            )
        found = found.parent
    return found


def free_bytes(path: Path) -> int:
    """Bytes that a user may still write where `path` is or will be."""
    return shutil.disk_usage(existing_parent(path)).free


def same_device(one: Path, other: Path) -> bool:
    """Whether the two places share their free space."""
    return existing_parent(one).stat().st_dev == existing_parent(other).stat().st_dev


def disk_full(
    error: BaseException, folder: Path, needed: int | None
) -> EnvironmentLacksError | None:
    """Returns the error to raise when `error`, or what caused it, is a full disk, else None.

    Args:
        error: What was caught.
        folder: What was being written.
        needed: Estimated bytes that the artifact takes, when known.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            wanted = f", about {size_text(needed)} is needed" if needed else ""
            return EnvironmentLacksError(
                f"the disk is full: {size_text(free_bytes(folder))} free{wanted}",
                where=str(existing_parent(folder)),
                remedy="free some space, `phiconv cache gc`, or set PHICONV_HOME to a larger disk",
            )
        cause = cause.__cause__ or cause.__context__
    return None


def flush_file(path: Path) -> None:
    """Makes the file's bytes durable."""
    # Windows flushes only through a handle that may write.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Makes the folder's names durable, where the system can (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Renames a file or a folder to what is not there yet, patiently; see `rename_over`."""
    _patiently(lambda: source.rename(target))


def rename_over(source: Path, target: Path) -> None:
    """Puts a file in the place of another.

    Windows renames no file that is open, and no folder in which one is. Virus scanners and
    indexers open what was just written, for a moment: so it is tried again for a few seconds.

    Raises:
        OSError: Such as a file that stays open.
    """
    _patiently(lambda: source.replace(target))


def _patiently(move: Callable[[], object]) -> None:
    end, pause = time.monotonic() + _PATIENCE_SECONDS, 0.01
    while True:
        try:
            move()
            return
        except PermissionError:
            if not _OPEN_FILES_STAY or time.monotonic() >= end:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
