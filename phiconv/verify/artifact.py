"""The structure of artifacts: ONNX folders and GGUF files, without running them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from phiconv.errors import CheckpointError, PhiconvError, StageError
from phiconv.verify.results import COPY_AGAIN, Problem

GENAI_CONFIG, CONFIG = "genai_config.json", "config.json"


def structure_problems(
    folder: Path, names: Iterable[str], damaged: Collection[str]
) -> tuple[list[Problem], list[str]]:
    """What is wrong with the artifacts among a folder's files.

    Args:
        folder: The folder.
        names: Its files, by their paths with forward slashes.
        damaged: Files already known to be damaged or missing; an artifact that has one is not
            looked into.

    Returns:
        The problems, and what could not be checked.
    """
    names = sorted(names)
    problems: list[Problem] = []
    notes: list[str] = []
    for name in names:
        if name.endswith(".gguf") and name not in damaged:
            problems += _gguf_problems(folder, name)
    models: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".onnx") or PurePosixPath(name).name == GENAI_CONFIG:
            models.setdefault(PurePosixPath(name).parent.as_posix(), []).append(name)
    spoilt = {PurePosixPath(name).parent.as_posix() for name in damaged}
    for place in models:
        members = {name for name in names if PurePosixPath(name).parent.as_posix() == place}
        if place not in spoilt:
            found, said = _onnx_problems(folder, "" if place == "." else f"{place}/", members)
            problems += found
            notes += said
    return problems, notes


def _gguf_problems(folder: Path, name: str) -> list[Problem]:
    from phiconv.gguf.structure import read_structure

    try:
        read_structure(folder / name)
    except StageError as error:
        return [Problem(name, error.message, error.remedy or COPY_AGAIN)]
    return []


def _onnx_problems(
    folder: Path, prefix: str, members: Collection[str]
) -> tuple[list[Problem], list[str]]:
    from phiconv.onnx.folder import open_folder
    from phiconv.onnx.structure import structure_problems as stored_problems

    models = [name for name in members if name.endswith(".onnx")]
    if not models:
        return [Problem(f"{prefix}{GENAI_CONFIG}", "stands there without an ONNX model")], []
    damaged = [
        Problem(name, what) for name in sorted(models) for what in stored_problems(folder / name)
    ]
    if damaged:
        return damaged, []
    try:
        open_folder(folder / prefix)
    except PhiconvError as error:
        return [Problem(sorted(models)[0], error.message, error.remedy or COPY_AGAIN)], []
    if f"{prefix}{GENAI_CONFIG}" not in members:
        return [], [f"{prefix or 'the folder'} has no {GENAI_CONFIG}: it was not compared"]
    return _config_problems(folder, prefix)


def _config_problems(folder: Path, prefix: str) -> tuple[list[Problem], list[str]]:
    """genai_config.json against the graph, with the sizes of config.json."""
    from phiconv.checkpoint import ModelConfig
    from phiconv.checkpoint.json_object import read_json_object
    from phiconv.parity.graph_signature import signature_findings

    artifact = folder / prefix
    try:
        genai = read_json_object(artifact / GENAI_CONFIG)
    except CheckpointError as error:
        return [Problem(f"{prefix}{GENAI_CONFIG}", error.message)], []
    try:
        sizes = ModelConfig.from_dict(read_json_object(artifact / CONFIG), str(artifact / CONFIG))
    except CheckpointError as error:
        return [], [f"{prefix}{GENAI_CONFIG} was not compared with the graph: {error.message}"]
    return [
        Problem(
            f"{prefix}{GENAI_CONFIG}",
            f"{finding.what}: expected {finding.expected}, found {finding.found}",
            finding.remedy,
        )
        for finding in signature_findings(artifact, genai, sizes)
        if finding.severity == "error"
    ], []
