"""Garbage collection: what was not used for long, or least recently, goes first."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from phiconv.errors import RecipeError
from phiconv.workspace.entry import Entry, read_manifest
from phiconv.workspace.session import Session, oldest_start
from phiconv.workspace.store import Workspace

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Collected:
    """What `collect` removed, or would remove.

    Attributes:
        entries: Entries, least recently used first.
        broken: Folders without a whole manifest, or whose artifact is nowhere.
        unfinished: What killed steps could have gone on from.
        freed_bytes: Size of what was removed; outputs are the user's and stay.
        kept_bytes: Size of what stays.
        in_use: Entries that were due but may be in use by a running build.
    """

    entries: tuple[Entry, ...]
    broken: tuple[Path, ...]
    unfinished: tuple[Path, ...]
    freed_bytes: int
    kept_bytes: int
    in_use: int


def parse_duration(text: str) -> timedelta:
    """`30d`, `12h`, `2w`, `90m`, `10s`.

    Raises:
        RecipeError: It is none of these.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"not a duration: {text!r}", remedy="such as 30d, 12h or 2w")
    return timedelta(seconds=float(match[1]) * _SECONDS[match[2]])


def parse_size(text: str) -> int:
    """`20GB` (decimal) or `20GiB` (binary), in bytes.

    Raises:
        RecipeError: It is neither.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"not a size: {text!r}", remedy="such as 20GB or 500MiB")
    power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def collect(
    session: Session,
    *,
    older_than: timedelta | None = None,
    max_bytes: int | None = None,
    dry_run: bool = False,
) -> Collected:
    """Removes entries, folders that are no entry, and unfinished work.

    Nothing is removed that another running session may be using: what it uses it touches, so only
    entries last used before the oldest of them began are taken, each under its key's lock.

    Args:
        session: The session that collects.
        older_than: Remove what was last used longer ago than this; younger unfinished work stays.
        max_bytes: Then remove the least recently used until this much is left.
        dry_run: Remove nothing; say what would go.
    """
    workspace = session.workspace
    now = time.time()
    others = oldest_start(workspace, but=session.folder.name)
    entries = sorted(workspace.entries(), key=lambda entry: entry.used)
    sizes = {entry.key: entry.stored_bytes for entry in entries}
    total = before = sum(sizes.values())
    removed: list[Entry] = []
    in_use = 0
    for entry in entries:
        too_old = older_than is not None and now - entry.used > older_than.total_seconds()
        too_much = max_bytes is not None and total > max_bytes and not entry.is_lent
        if not (too_old or too_much):
            continue
        if not _take(session, entry.key, entry.folder, others, dry_run):
            in_use += 1
            continue
        removed.append(entry)
        total -= sizes[entry.key]
    broken = tuple(folder for folder in workspace.folders() if _is_broken(folder))
    if not dry_run:
        for folder in broken:
            _take(session, folder.name, folder, others, dry_run)
    unfinished = _take_unfinished(session, older_than, now, dry_run)
    if not dry_run:
        _forget_locks(workspace)
    return Collected(tuple(removed), broken, unfinished, before - total, total, in_use)


def _take_unfinished(
    session: Session, older_than: timedelta | None, now: float, dry_run: bool
) -> tuple[Path, ...]:
    """Removes what no running step is at, and returns it."""
    taken: list[Path] = []
    for folder in sorted(session.workspace.unfinished.iterdir()):
        with session.workspace.try_lock(folder.name) as held:
            age = now - folder.stat().st_mtime if held else 0.0
            if not held or (older_than is not None and age <= older_than.total_seconds()):
                continue
            taken.append(folder)
            if not dry_run:
                session.discard(folder)
    return tuple(taken)


def _is_broken(folder: Path) -> bool:
    entry = read_manifest(folder)
    return entry is None or not entry.path.is_dir()


def _take(session: Session, key: str, folder: Path, others: float | None, dry_run: bool) -> bool:
    with session.workspace.try_lock(key) as held:
        if not held:
            return False
        entry = read_manifest(folder)
        if entry is not None and others is not None and entry.used >= others:
            return False
        if not dry_run and folder.exists():
            session.discard(folder)
    return True


def _forget_locks(workspace: Workspace) -> None:
    """Removes lock files of keys that have no entry and that nobody holds."""
    keys = {folder.name for folder in workspace.folders()}
    for file in workspace.locks.glob("*.lock"):
        name = file.name.removesuffix(".lock")
        if name in keys or name.startswith("session-"):
            continue
        with workspace.try_lock(name) as held:
            if held:
                with suppress(OSError):  # Windows does not remove a file that is open
                    file.unlink()
