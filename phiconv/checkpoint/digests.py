"""BLAKE3 digests of files, and a cache of them.

Files are hashed side by side, and by several threads each where there are fewer files than cores;
one core hashes about 6.5 GiB/s. 16 MiB of a file are in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phiconv.errors import CheckpointError

BUFFER_BYTES = 16 << 20
"""Large, as the interpreter lock is waited for twice a buffer where other threads import.

The file is read, not mapped: that takes no more time, and a file that is cut off meanwhile is an
error, where a mapping would end the process with SIGBUS.
"""
RACY_NANOSECONDS = 2_000_000_000
"""A file changed this recently may change again within one tick of its file system's clock."""

CACHE_FILE = "digests.json"
CACHE_VERSION = 1

OnBytes = Callable[[int], None]

_DIGEST = re.compile(r"blake3:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What changes when a file's content changes: size, time of modification, inode."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileIdentity:
        """The identity in the result of a stat call."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)

    def settled(self, now_ns: int) -> bool:
        """Whether a change from `now_ns` on must show in `mtime_ns` (git's racy-file rule)."""
        return now_ns - self.mtime_ns >= RACY_NANOSECONDS


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A digest, and the file it was computed from.

    Attributes:
        digest: `blake3:<64 hexadecimal digits>`.
        identity: The file's identity before and after it was read.
        settled: Whether the identity proves the content.
    """

    digest: str
    identity: FileIdentity
    settled: bool


def digest_file(path: Path, on_bytes: OnBytes | None = None, threads: int = 1) -> FileDigest:
    """Hashes a file's content.

    Args:
        path: The file.
        on_bytes: Called with the count of bytes hashed since the last call.
        threads: How many threads hash it.

    Raises:
        CheckpointError: The file cannot be read, or was changed meanwhile.
    """
    from blake3 import blake3

    hasher = blake3(max_threads=threads)
    started = time.time_ns()
    try:
        with path.open("rb", buffering=0) as handle:
            before = FileIdentity.of(os.fstat(handle.fileno()))
            buffer = memoryview(bytearray(min(BUFFER_BYTES, before.size + 1)))
            while count := handle.readinto(buffer):
                hasher.update(buffer[:count])
                if on_bytes:
                    on_bytes(count)
            after = FileIdentity.of(os.fstat(handle.fileno()))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if before != after:
        raise CheckpointError(
            "the file was changed while it was hashed",
            where=str(path),
            remedy="run again once nothing writes to the checkpoint",
        )
    return FileDigest(f"blake3:{hasher.hexdigest()}", after, after.settled(started))


def digest_files(
    paths: Sequence[Path],
    *,
    cache: DigestCache | None = None,
    threads: int | None = None,
    on_bytes: OnBytes | None = None,
) -> list[str]:
    """Hashes several files, those not in the cache side by side.

    Args:
        paths: The files.
        cache: Where digests are looked up and kept.
        threads: How many hash at a time; by default one for each core.
        on_bytes: Called, from any of the threads, with counts of bytes hashed. The bytes of a
            file found in the cache count at once.

    Returns:
        The digests in the order of `paths`, each `blake3:<64 hexadecimal digits>`.

    Raises:
        CheckpointError: A file cannot be read, or was changed meanwhile.
    """
    cached = cache.find(paths) if cache else {}
    if on_bytes:
        for known in cached.values():
            on_bytes(known.identity.size)
    missing = [path for path in dict.fromkeys(paths) if path not in cached]
    threads = threads or os.cpu_count() or 1
    large = sum(file_size(path) > BUFFER_BYTES for path in missing)
    each = max(1, threads // max(1, large))
    with ThreadPoolExecutor(max_workers=threads) as pool:
        found = pool.map(lambda path: digest_file(path, on_bytes, each), missing)
        hashed = dict(zip(missing, found, strict=True))
    if cache and hashed:
        cache.add(hashed)
    return [(cached | hashed)[path].digest for path in paths]


def file_size(path: Path) -> int:
    """Bytes of a file.

    Raises:
        CheckpointError: There is no such file.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error


class DigestCache:
    """Digests of files, kept in one small file in a folder.

    An entry is keyed by the file's resolved path and holds while its size, time of modification
    and inode stay the same. A damaged cache file counts as empty, and losing an entry to a
    concurrent writer costs no more than hashing again. Thread-safe.

    Args:
        folder: The folder that holds the cache file; made when first written to.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = threading.Lock()

    def find(self, paths: Sequence[Path]) -> dict[Path, FileDigest]:
        """The digests of those files that have not changed since they were hashed."""
        entries = self._load()
        now = time.time_ns()
        found: dict[Path, FileDigest] = {}
        for path in paths:
            with suppress(OSError):
                identity = FileIdentity.of(path.stat())
                known = entries.get(_key(path))
                if known and known.identity == identity and identity.settled(now):
                    found[path] = known
        return found

    def add(self, digests: Mapping[Path, FileDigest]) -> None:
        """Keeps digests whose files are settled, and drops those of files that are gone."""
        with self._lock:
            entries = self._load()
            entries |= {_key(path): entry for path, entry in digests.items() if entry.settled}
            # unlike Path.exists, it raises nothing when a folder may not be entered
            self._save({k: entry for k, entry in entries.items() if os.path.exists(k)})  # noqa: PTH110

    def _load(self) -> dict[str, FileDigest]:
        try:
            stored = json.loads((self._folder / CACHE_FILE).read_bytes())
            entries = stored["entries"]
            if stored["version"] != CACHE_VERSION or stored["checksum"] != _checksum(entries):
                return {}
            return {key: _entry(*values) for key, values in entries.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}

    def _save(self, entries: Mapping[str, FileDigest]) -> None:
        rows = {
            key: [
                entry.identity.size,
                entry.identity.mtime_ns,
                entry.identity.inode,
                entry.digest,
            ]
            for key, entry in sorted(entries.items())
        }
        content = {"version": CACHE_VERSION, "checksum": _checksum(rows), "entries": rows}
        # a cache that cannot be written, or is being read on Windows, only costs time
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{CACHE_FILE}.", dir=self._folder)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(content, file)
                Path(temporary).replace(self._folder / CACHE_FILE)
            except OSError:
                Path(temporary).unlink(missing_ok=True)
                raise


def _key(path: Path) -> str:
    return str(path.resolve())


def _entry(size: int, mtime_ns: int, inode: int, digest: str) -> FileDigest:
    if not all(type(number) is int for number in (size, mtime_ns, inode)):
        raise ValueError("size, mtime_ns and inode must be integers")
    if not _DIGEST.fullmatch(digest):
        raise ValueError("not a digest")
    return FileDigest(digest, FileIdentity(size, mtime_ns, inode), settled=True)


def _checksum(rows: Any) -> str:
    text = json.dumps(rows, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
