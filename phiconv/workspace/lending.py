"""Artifacts lent to output folders: what ships is moved there, and written to the disk but once.

A lent entry keeps its manifest, which says where the artifact lies; it is a hit while every file
there is as it was published, and a miss afterwards. Nothing reads a lent artifact in place, because
its owner may change it meanwhile: a stage that needs it gets a copy, `take_back`, whose sha256 was
checked. An output that gives way to another gives its artifact back, `reclaim`. The manifest names
the place before the artifact moves there, so it lies in one of two places that are looked at, at
whatever moment a process is killed.

`reclaim` apart, every function is called under the entry's lock.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from phiconv.workspace.disk import flush_file, flush_folder, rename, same_device
from phiconv.workspace.entry import ARTIFACT, Entry, read_manifest, unchanged, write_manifest
from phiconv.workspace.session import Session, oldest_start
from phiconv.workspace.store import Workspace

_PROBE = "probe"
_COPY_BYTES = 4 << 20


def may_lend(session: Session, entry: Entry, new: Path) -> bool:
    """Whether an entry's artifact can be moved to an output, and nobody else is reading it.

    A session that begins later finds the entry under its lock, so after the move.

    Args:
        session: The session that would lend it.
        entry: The entry.
        new: An existing folder in the output folder.
    """
    if entry.is_lent or not same_device(entry.folder, new):
        return False
    if oldest_start(session.workspace, but=session.folder.name) is not None:
        return False
    # One device may be mounted twice, and a folder may be closed to renames.
    probe = entry.folder / _PROBE
    try:
        probe.mkdir(exist_ok=True)
        probe.rename(new / _PROBE)
        (new / _PROBE).rmdir()
    except OSError:
        shutil.rmtree(probe, ignore_errors=True)
        return False
    return True


def lend(entry: Entry, place: Path) -> Entry:
    """Notes that an entry's artifact will lie at `place`; the caller moves it there next."""
    entry = replace(entry, lent_to=str(place))
    write_manifest(entry)
    return entry


def take_back(session: Session, entry: Entry) -> Entry | None:
    """Copies a lent artifact into the store again, for a stage to read.

    Returns:
        The entry, its artifact in the store; None when what was lent is not what it was.

    Raises:
        OSError: Such as a full disk.
    """
    if not entry.is_lent:
        return entry
    source = entry.path
    with session.scratch() as folder:
        for name, stamp in entry.files.items():
            target = folder / ARTIFACT / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                digest = _copy(source / name, target)
            except FileNotFoundError:
                return None
            if digest != stamp.sha256:
                return None
            os.utime(target, ns=(stamp.mtime_ns, stamp.mtime_ns))
            flush_file(target)
        for made in {path.parent for path in (folder / ARTIFACT).rglob("*")}:
            flush_folder(made)
        rename(folder / ARTIFACT, entry.folder / ARTIFACT)
    entry = replace(entry, lent_to=None)
    write_manifest(entry)
    return entry


def reclaim(workspace: Workspace, place: Path, artifact: Path) -> None:
    """Moves what was lent to `place`, and lies at `artifact` now, back into the store.

    What is no more as it was lent is let be, and its entry is a miss. Takes the entry's lock, but
    never waits for it: who holds it makes the entry anew.
    """
    for entry in workspace.entries():
        if entry.lent_to != str(place) or not unchanged(entry.files, artifact):
            continue
        with workspace.try_lock(entry.key) as held:
            known = read_manifest(entry.folder) if held else None
            if known is not None and known.is_lent and known.lent_to == str(place):
                with suppress(OSError):
                    rename(artifact, entry.folder / ARTIFACT)
                    write_manifest(replace(known, lent_to=None))


def _copy(source: Path, target: Path) -> str:
    """Copies a file and returns its sha256."""
    digest = hashlib.sha256()
    buffer = bytearray(_COPY_BYTES)
    view = memoryview(buffer)
    with source.open("rb", buffering=0) as read, target.open("xb", buffering=0) as write:
        while count := read.readinto(buffer):
            digest.update(view[:count])
            rest = view[:count]
            while rest:
                rest = rest[write.write(rest) :]
    return digest.hexdigest()
