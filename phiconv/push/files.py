"""The files of a release, as they go to the Hub: those that SHA256SUMS lists, and itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from phiconv.errors import RecipeError, StageError
from phiconv.verify.sums import SUMS, parse_sums


@dataclass(frozen=True)
class PushFile:
    """A file to upload.

    Attributes:
        name: Its path in the release and in the repository, with forward slashes.
        size: Its bytes.
        sha256: Its digest, hexadecimal.
    """

    name: str
    size: int
    sha256: str


def release_files(folder: Path) -> tuple[PushFile, ...]:
    """Lists a release by its own SHA256SUMS; the digests are not computed again.

    Args:
        folder: A release that has been verified.

    Raises:
        RecipeError: The folder is no release.
        StageError: SHA256SUMS is damaged, or a file it lists is missing.
    """
    try:
        data = (folder / SUMS).read_bytes()
    except OSError as error:
        raise RecipeError(
            f"there is no {SUMS} in {folder}: it is no release",
            remedy="make one with `phiconv release`",
        ) from error
    digests, problems = parse_sums(data)
    if problems:
        raise StageError(f"{SUMS} is damaged: {problems[0]}", where=str(folder / SUMS))
    digests[SUMS] = hashlib.sha256(data).hexdigest()
    return tuple(
        PushFile(name, _size(folder / name), digest) for name, digest in sorted(digests.items())
    )


def git_blob_id(path: Path) -> str:
    """The id that git gives a file's content: sha1 over `blob <size>`, a zero byte, the content."""
    data = path.read_bytes()
    # git's own choice of digest; nothing here relies on its strength
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StageError(f"cannot be read: {error.strerror}", where=str(path)) from error
