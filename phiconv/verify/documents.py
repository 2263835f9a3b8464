"""What a release's statement and bill of materials say of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phiconv.checkpoint.json_object import read_json_object
from phiconv.errors import CheckpointError
from phiconv.verify.results import Problem
from phiconv.verify.sums import SUMS, is_portable

PROVENANCE = "provenance.intoto.json"
SBOM = "sbom.cdx.json"
CARD = "README.md"
REPORTS = "reports"

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
SBOM_FORMAT = ("CycloneDX", "1.6")


class DocumentError(Exception):
    """A document does not hold what it should."""


def read_subjects(folder: Path) -> dict[str, str]:
    """sha256 by path, as the statement says.

    Raises:
        DocumentError: It is no in-toto statement of SLSA provenance about files.
    """
    statement = _read(folder / PROVENANCE)
    kinds = (statement.get("_type"), statement.get("predicateType"))
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise DocumentError("is no in-toto statement of SLSA provenance")
    found: dict[str, str] = {}
    for subject in _objects(statement.get("subject"), "subject"):
        name, digests = subject.get("name"), subject.get("digest")
        sha256 = digests.get("sha256") if isinstance(digests, dict) else None
        if not isinstance(name, str) or not is_portable(name) or not isinstance(sha256, str):
            raise DocumentError("has a subject without path or sha256")
        if name in found:
            raise DocumentError(f"has the subject {name} twice")
        found[name] = sha256
    return found


def read_components(folder: Path) -> dict[str, str]:
    """sha256 by path of the files in the bill of materials.

    Raises:
        DocumentError: It is no CycloneDX document about files.
    """
    document = _read(folder / SBOM)
    if (document.get("bomFormat"), document.get("specVersion")) != SBOM_FORMAT:
        raise DocumentError(f"is no {' '.join(SBOM_FORMAT)} document")
    found: dict[str, str] = {}
    pending = _objects(document.get("components"), "components")
    while pending:
        component = pending.pop()
        pending += _objects(component.get("components", []), "components")
        hashes = _objects(component.get("hashes", []), "hashes")
        sha256 = [item.get("content") for item in hashes if item.get("alg") == "SHA-256"]
        if component.get("type") == "file" and sha256:
            found[str(component.get("name"))] = str(sha256[0])
    return found


def document_problems(
    folder: Path, actual: Mapping[str, str], damaged: set[str], *, partial: bool
) -> list[Problem]:
    """Compares the files that statement and bill of materials list with those that are there.

    Args:
        folder: The release.
        actual: sha256 by path of every file.
        damaged: Files already known to be damaged.
        partial: Whether files may be missing.
    """
    problems: list[Problem] = []
    left_out = {SUMS, PROVENANCE}
    readers: tuple[tuple[str, Callable[[Path], dict[str, str]]], ...] = (
        (PROVENANCE, read_subjects),
        (SBOM, read_components),
    )
    for name, read in readers:
        if name in damaged or name not in actual:
            continue
        left_out.add(name)
        try:
            listed = read(folder)
        except DocumentError as error:
            problems.append(Problem(name, str(error)))
            continue
        expected = {key: value for key, value in actual.items() if key not in left_out}
        problems += [
            Problem(name, f"says another sha256 of {key} than it has")
            for key, value in listed.items()
            if key in expected and key not in damaged and value != expected[key]
        ]
        problems += [Problem(name, f"does not list {key}") for key in expected if key not in listed]
        if not partial:
            problems += [
                Problem(name, f"lists {key}, which is not there")
                for key in listed
                if key not in expected and key not in damaged
            ]
    return problems


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except CheckpointError as error:
        raise DocumentError(error.message) from error


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DocumentError(f"its {what} is no list of objects")
    return list(value)
