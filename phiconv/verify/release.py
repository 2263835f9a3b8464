"""A release against its own lists: which file is damaged, and whether it is a list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from phiconv.verify.documents import (
    CARD,
    PROVENANCE,
    SBOM,
    DocumentError,
    document_problems,
    read_subjects,
)
from phiconv.verify.listing import Listing
from phiconv.verify.results import Problem
from phiconv.verify.sums import FEW_DIGITS, SUMS, differing_digits, parse_sums

_WRITTEN = (CARD, SBOM, PROVENANCE)
_STRANGER = "move it away, or make the release again"


def is_release(folder: Path) -> bool:
    """Whether a folder says that it is a release."""
    return (folder / SUMS).is_file() or (folder / PROVENANCE).is_file()


def release_problems(
    listing: Listing, actual: Mapping[str, str | None], *, partial: bool
) -> tuple[list[Problem], set[str]]:
    """Everything in which a release differs from what its lists say.

    Args:
        listing: Its files.
        actual: sha256 of every file but SHA256SUMS; None of one that cannot be read.
        partial: Whether files may be missing.

    Returns:
        The problems, and the files that are listed and not there.
    """
    folder = listing.folder
    if SUMS not in listing.sizes:
        return [Problem(SUMS, "is missing")], set()
    try:
        listed, faults = parse_sums((folder / SUMS).read_bytes())
    except OSError as error:
        return [Problem(SUMS, f"cannot be read: {error.strerror}")], set()
    known_bad = {problem.file for problem in listing.problems}
    absent = listed.keys() - actual.keys() - known_bad
    lists = _Lists(listed, _subjects(folder), actual)
    problems = [Problem(SUMS, fault) for fault in faults]
    problems += lists.differences()
    problems += lists.strangers(bool(faults))
    if not partial:
        problems += [Problem(name, "is missing") for name in absent - lists.renamed]
    problems += [
        Problem(name, "is missing")
        for name in _WRITTEN
        if name not in actual and name not in listed
    ]
    damaged = {problem.file for problem in problems}
    known = {name: digest for name, digest in actual.items() if digest is not None}
    problems += document_problems(folder, known, damaged | known_bad, partial=partial)
    return problems, absent


def _subjects(folder: Path) -> dict[str, str]:
    try:
        return read_subjects(folder)
    except DocumentError:
        return {}


@dataclass
class _Lists:
    """SHA256SUMS and the statement's subjects beside the files' digests."""

    listed: Mapping[str, str]
    subjects: Mapping[str, str]
    actual: Mapping[str, str | None]
    renamed: set[str] = field(default_factory=set)

    def differences(self) -> list[Problem]:
        """Files whose digest is not the listed one, or the lines that list it wrong."""
        problems = []
        for name, digest in self.listed.items():
            found = self.actual.get(name, digest)
            if found is None:
                problems.append(Problem(name, "cannot be read"))
            elif found != digest:
                problems.append(self._difference(name, digest, found))
        return problems

    def _difference(self, name: str, digest: str, found: str) -> Problem:
        digits = differing_digits(found, digest)
        if digits <= FEW_DIGITS:
            what = f"its digest of {name} differs from the file's in {digits} of 64 digits"
            return Problem(SUMS, what)
        if self.subjects.get(name) == found:
            return Problem(SUMS, f"its digest of {name} is neither the file's nor {PROVENANCE}'s")
        return Problem(name, f"its sha256 is {found}, not {digest} as {SUMS} says")

    def strangers(self, faulty: bool) -> list[Problem]:
        """Files that SHA256SUMS does not list.

        Args:
            faulty: Whether it has lines that cannot be read, which may have listed them.
        """
        problems = []
        for name, digest in self.actual.items():
            if name in self.listed:
                continue
            known = name == PROVENANCE or self.subjects.get(name) == digest
            alias = next((other for other, listed in self.listed.items()
                          if listed == digest and other not in self.actual), None)  # fmt: skip
            if alias is not None:
                self.renamed.add(alias)
                place = SUMS if known else name
                problems.append(Problem(place, f"{SUMS} lists {alias} where {name} is"))
            elif not known:
                problems.append(Problem(name, f"{SUMS} does not list it", _STRANGER))
            elif not faulty:
                problems.append(Problem(SUMS, f"does not list {name}"))
        return problems
