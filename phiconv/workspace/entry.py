"""One entry of the store: `artifact/` and the `manifest.json` that was written after it.

The artifact may lie in an output folder instead, lent to it (phiconv/workspace/lending.py); the
manifest then says where. An entry is trusted when its manifest is whole and every file has the
size and modification time that the manifest records; where only the time differs, the file's
sha256 decides. Anything else is a miss, never an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from phiconv.errors import StageError
from phiconv.workspace.disk import flush_file, flush_folder, rename_over

ARTIFACT = "artifact"
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class FileStamp:
    """A file as it was when its entry was published."""

    sha256: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Entry:
    """An artifact of the store.

    Attributes:
        kind: Kind of the artifact.
        key: Its cache key.
        step: Id of the step that made it.
        stage: Name of that step's stage.
        recipe: Name of the recipe that was built then.
        created: UTC time, ISO 8601.
        facts: What the stage said about it.
        usage: What making it cost: `wall_s`, `cpu_s`, `peak_rss_bytes`.
        key_of: What the key was computed from.
        files: By path relative to `path`, with forward slashes.
        folder: The entry's folder.
        lent_to: Where the artifact lies, absolute, when the entry's folder does not hold it.
    """

    kind: str
    key: str
    step: str
    stage: str
    recipe: str
    created: str
    facts: Mapping[str, Any]
    usage: Mapping[str, float]
    key_of: Mapping[str, Any]
    files: Mapping[str, FileStamp]
    folder: Path
    lent_to: str | None = None

    @property
    def path(self) -> Path:
        """The artifact itself."""
        own = self.folder / ARTIFACT
        return own if self.lent_to is None or own.is_dir() else Path(self.lent_to)

    @property
    def is_lent(self) -> bool:
        """Whether the artifact lies in an output folder, where it may change or go at any time."""
        return self.lent_to is not None and not (self.folder / ARTIFACT).is_dir()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(stamp.size for stamp in self.files.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the files that lie in the store."""
        return 0 if self.is_lent else self.size_bytes

    @property
    def used(self) -> float:
        """When the entry was made or last hit: seconds since the epoch; 0 if it is gone."""
        try:
            return (self.folder / MANIFEST).stat().st_mtime
        except OSError:
            return 0.0

    def touch(self) -> None:
        """Notes that the entry is in use now."""
        os.utime(self.folder / MANIFEST)


def sha256_file(path: Path) -> str:
    """sha256 of a file in hexadecimal, read through a small buffer."""
    digest = hashlib.sha256()
    buffer = bytearray(_BUFFER_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def stamp_files(artifact: Path, known: Mapping[str, str]) -> dict[str, FileStamp]:
    """Stamps and flushes every file of an artifact.

    Args:
        artifact: The folder.
        known: sha256 by relative path, of files that need not be read again.

    Raises:
        StageError: There is no file, a link, or a digest was handed over for a file that is not
            there.
    """
    stamps: dict[str, FileStamp] = {}
    for path in sorted(artifact.rglob("*")):
        name = path.relative_to(artifact).as_posix()
        if path.is_symlink():
            raise StageError(f"the artifact holds a symbolic link: {name}")
        if path.is_file():
            # Copies of read-only files could be neither flushed nor removed on Windows.
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
            flush_file(path)
            status = path.stat()
            digest = known.get(name) or sha256_file(path)
            stamps[name] = FileStamp(digest, status.st_size, status.st_mtime_ns)
    if not stamps:
        raise StageError("the stage wrote no file")
    if absent := known.keys() - stamps.keys():
        raise StageError(f"digests were recorded of files that do not exist: {sorted(absent)}")
    return stamps


def write_manifest(entry: Entry) -> None:
    """Writes the manifest of an entry, durably; the files must be there already."""
    document = asdict(entry)
    del document["folder"]
    text = json.dumps({"manifest": MANIFEST_VERSION, **document}, indent=1, sort_keys=True)
    partial = entry.folder / (MANIFEST + ".partial")
    partial.write_text(text + "\n", encoding="utf-8", newline="\n")
    flush_file(partial)
    rename_over(partial, entry.folder / MANIFEST)
    flush_folder(entry.folder)


def read_manifest(folder: Path) -> Entry | None:
    """Reads an entry without looking at its files; None when the manifest is not whole."""
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if document.pop("manifest") != MANIFEST_VERSION:
            return None
        files = {_inside(name): FileStamp(**stamp) for name, stamp in document.pop("files").items()}
        return Entry(**document, files=files, folder=folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def verified(folder: Path) -> Entry | None:
    """Reads an entry and makes sure of its files; None when anything is amiss.

    Files whose time alone changed are hashed, and stamped anew when they are as they were.
    """
    entry = read_manifest(folder)
    if entry is None:
        return None
    renewed: dict[str, FileStamp] = {}
    artifact = entry.path
    try:
        for name, stamp in entry.files.items():
            status = (artifact / name).stat()
            if status.st_size != stamp.size:
                return None
            if status.st_mtime_ns != stamp.mtime_ns:
                if sha256_file(artifact / name) != stamp.sha256:
                    return None
                renewed[name] = replace(stamp, mtime_ns=status.st_mtime_ns)
        if renewed:
            entry = replace(entry, files={**entry.files, **renewed})
            write_manifest(entry)
    except OSError:
        return None
    return entry


def unchanged(files: Mapping[str, FileStamp], artifact: Path) -> bool:
    """Whether a folder holds these files, by size and time alone."""
    try:
        stats = {name: (artifact / name).stat() for name in files}
    except OSError:
        return False
    return all(
        (stats[name].st_size, stats[name].st_mtime_ns) == (stamp.size, stamp.mtime_ns)
        for name, stamp in files.items()
    )


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"a path that leaves the artifact: {name!r}")
    return name
