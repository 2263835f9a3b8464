"""The output folder of a build against its manifest, and that against the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phiconv.checkpoint.json_object import read_json_object
from phiconv.errors import CheckpointError, StageError
from phiconv.publish import ARTIFACT, MANIFEST, MANIFEST_VERSION, REPORT
from phiconv.report import REPORT_JSON
from phiconv.report.results import RunResult
from phiconv.verify.listing import Listing
from phiconv.verify.results import Problem
from phiconv.verify.sums import FEW_DIGITS, differing_digits

_BUILD = "build it again: nothing has to be recomputed"


def is_output(folder: Path) -> bool:
    """Whether a folder is the output of `phiconv build`."""
    return (folder / MANIFEST).is_file() and (folder / ARTIFACT).is_dir()


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of an output folder.

    Raises:
        StageError: It is missing, damaged or of another version.
    """
    where = str(folder / MANIFEST)
    try:
        document = read_json_object(folder / MANIFEST)
    except CheckpointError as error:
        raise StageError(error.message, where=where, remedy=_BUILD) from error
    if document.get("phiconv") != MANIFEST_VERSION:
        raise StageError("is no manifest of phiconv's", where=where, remedy=_BUILD)
    files = document.get(ARTIFACT)
    if not isinstance(files, dict) or not all(map(_is_stamp, files.values())):
        raise StageError("lists no artifact", where=where, remedy=_BUILD)
    if not isinstance(document.get(REPORT), list):
        raise StageError("lists no report", where=where, remedy=_BUILD)
    return document


def _is_stamp(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("sha256"), str)
        and len(value["sha256"]) == 64
        and isinstance(value.get("size"), int)
    )


def output_problems(listing: Listing, actual: Mapping[str, str | None]) -> list[Problem]:
    """Everything in which an output folder differs from its manifest.

    Args:
        listing: Its files; those beside `artifact/`, `report/` and the manifest are the user's.
        actual: sha256 of every file; None of one that cannot be read.
    """
    try:
        manifest = read_manifest(listing.folder)
    except StageError as error:
        return [Problem(MANIFEST, error.message, _BUILD)]
    problems = artifact_problems(manifest, actual)
    linked = {problem.file for problem in listing.problems}
    problems = [problem for problem in problems if problem.file not in linked]
    reports = {f"{REPORT}/{name}" for name in manifest[REPORT]}
    found = {name for name in actual if name.startswith(f"{REPORT}/")}
    problems += [Problem(name, "is missing", _BUILD) for name in sorted(reports - found - linked)]
    problems += [Problem(name, f"{MANIFEST} does not list it") for name in sorted(found - reports)]
    try:
        result = read_result(listing.folder)
    except StageError as error:
        return [*problems, Problem(f"{REPORT}/{REPORT_JSON}", error.message, _BUILD)]
    return problems + contradictions(manifest, result)


def artifact_problems(
    manifest: Mapping[str, Any], actual: Mapping[str, str | None]
) -> list[Problem]:
    """The artifact's files against the manifest's digests; `actual` is as in `output_problems`."""
    listed = {f"{ARTIFACT}/{name}": stamp["sha256"] for name, stamp in manifest[ARTIFACT].items()}
    problems = []
    for name, digest in listed.items():
        found = actual.get(name)
        if name not in actual:
            problems.append(Problem(name, "is missing", _BUILD))
        elif found is None:
            problems.append(Problem(name, "cannot be read", _BUILD))
        elif found != digest and differing_digits(found, digest) <= FEW_DIGITS:
            problems.append(Problem(MANIFEST, f"its digest of {name} is damaged", _BUILD))
        elif found != digest:
            what = f"its sha256 is {found}, not {digest} as {MANIFEST} says"
            problems.append(Problem(name, what, _BUILD))
    problems += [
        Problem(name, f"{MANIFEST} does not list it")
        for name in actual
        if name.startswith(f"{ARTIFACT}/") and name not in listed
    ]
    return problems


def read_result(folder: Path) -> RunResult:
    """What report.json of an output folder holds.

    Raises:
        StageError: It is missing, damaged or of another version.
    """
    from phiconv.report.document import read_report_file

    return read_report_file(folder / REPORT / REPORT_JSON)


def contradictions(manifest: Mapping[str, Any], result: RunResult) -> list[Problem]:
    """What manifest and report both say, and say differently; or a digest that does not hold."""
    recipe = _mapping(manifest.get("recipe"))
    stamps = {name: (f"sha256:{stamp['sha256']}", stamp["size"])
              for name, stamp in manifest[ARTIFACT].items()}  # fmt: skip
    pairs: dict[str, tuple[Any, Any]] = {
        "recipe.name": (recipe.get("name"), result.recipe),
        "recipe.digest": (recipe.get("digest"), result.recipe_digest),
        "recipe.resolved": (_digest(recipe.get("resolved")), result.recipe_digest),
        "checkpoint": (manifest.get("checkpoint"), asdict(result.checkpoint)),
        "checkpoint.files": (_digest(dict(result.checkpoint.files)), result.checkpoint.digest),
        "verdict": (manifest.get("verdict"), result.status),
        "validations": (
            manifest.get("validations"),
            [
                {"stage": item.stage, "status": item.status, "verdict": item.verdict}
                for item in result.validations
            ],
        ),
        "tools": (
            {"phiconv": manifest.get("phiconv_version"), **_mapping(manifest.get("tools"))},
            dict(result.tools),
        ),
        "steps": (
            _steps(manifest.get("steps"), result),
            {stage.id: (stage.uses, stage.key) for stage in result.stages},
        ),
        "release_path": (manifest.get("release_path"), result.release_path),
        ARTIFACT: (stamps, {file.path: (file.digest, file.size_bytes) for file in result.files}),
    }
    return [
        Problem(
            MANIFEST, f"{key}: {MANIFEST} and {REPORT}/{REPORT_JSON} contradict each other", _BUILD
        )
        for key, (one, other) in pairs.items()
        if one != other
    ]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _steps(value: Any, result: RunResult) -> dict[Any, tuple[Any, Any]]:
    """What the manifest says of the stages that were needed; those at hand alone are reported."""
    steps = [_mapping(step) for step in value] if isinstance(value, list) else []
    reported = {stage.id for stage in result.stages}
    return {
        step.get("id"): (step.get("uses"), step.get("key"))
        for step in steps
        if step.get("id") in reported
    }


def _digest(value: Any) -> str:
    """sha256 of canonical JSON, as recipes and checkpoints are digested."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
