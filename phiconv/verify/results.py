"""What a verification found out, as plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["release", "output", "artifact"]

COPY_AGAIN = "download or copy it again"


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was made.

    Attributes:
        file: The damaged file, relative to what was verified, with forward slashes.
        what: What is wrong with it.
        remedy: What to do about it.
    """

    file: str
    what: str
    remedy: str = COPY_AGAIN

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class Verification:
    """What was verified, and everything that is wrong with it.

    Attributes:
        kind: `release`, `output` of a build, or bare `artifact`.
        path: The folder or file.
        files: How many files it has.
        size_bytes: Their size.
        problems: Sorted by file; () when all is well.
        notes: What could not be checked, and why.
    """

    kind: Kind
    path: Path
    files: int
    size_bytes: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
