"""The files of a folder, none of them outside it, and their digests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from phiconv.checkpoint.folder import member
from phiconv.errors import CheckpointError, StageError
from phiconv.verify.results import Problem
from phiconv.workspace.entry import sha256_file

OnBytes = Callable[[int], None]
Digest = Callable[[Path], str]

# What file managers, Git and the Hub's client put beside the files.
_FOREIGN_FILES = {".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes"}
_FOREIGN_FOLDERS = {".git", ".cache"}
_INSIDE = "put the file itself there"


@dataclass(frozen=True)
class Listing:
    """The files below a folder.

    Attributes:
        folder: The folder.
        sizes: Bytes of every regular file, by its path with forward slashes, sorted.
        problems: Links and other things that are no files.
    """

    folder: Path
    sizes: dict[str, int]
    problems: tuple[Problem, ...]


def list_folder(folder: Path) -> Listing:
    """Lists the files below a folder, those of file managers, Git and the Hub's client left out.

    A link counts as its file only within a snapshot of the Hugging Face cache.

    Raises:
        StageError: A folder cannot be listed.
    """
    sizes: dict[str, int] = {}
    problems: list[Problem] = []
    for entry, name in _walk(folder, ""):
        try:
            path = member(folder, name)
            sizes[name] = path.stat().st_size
        except CheckpointError:
            link = entry.is_symlink()
            what = "is a link that leads out of the folder or nowhere" if link else "is no file"
            problems.append(Problem(name, what, _INSIDE))
        except OSError as error:
            problems.append(Problem(name, f"cannot be read: {error.strerror}"))
    return Listing(folder, dict(sorted(sizes.items())), tuple(problems))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Everything below a folder that is no folder; links to folders are not followed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise StageError(f"cannot be listed: {error.strerror}", where=str(folder)) from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if prefix or entry.name not in _FOREIGN_FOLDERS:
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        elif entry.name not in _FOREIGN_FILES:
            yield entry, f"{prefix}{entry.name}"


def digest_all(
    folder: Path,
    names: Sequence[str],
    *,
    threads: int,
    on_bytes: OnBytes | None = None,
    digest: Digest = sha256_file,
) -> dict[str, str | None]:
    """sha256 of files, several at a time; None for one that cannot be read."""

    def one(name: str) -> str | None:
        try:
            path = folder / name
            found = digest(path)
            if on_bytes:
                on_bytes(path.stat().st_size)
        except OSError:
            return None
        return found

    with ThreadPoolExecutor(max_workers=max(threads, 1)) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
