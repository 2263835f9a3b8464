"""The structure of artifacts: ONNX folders and GGUF files, without running them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise
from pathlib import Path, PurePosixPath

from phiconv.errors import CheckpointError, PhiconvError, StageError
from phiconv.verify.results import COPY_AGAIN, Problem

GENAI_CONFIG, CONFIG = "genai_config.json", "config.json"
_EXPORT = "build the artifact again"


def structure_problems(
    folder: Path, names: Iterable[str], damaged: Collection[str]
) -> tuple[list[Problem], list[str]]:
    """What is wrong with the artifacts among a folder's files.

    Args:
        folder: The folder.
        names: Its files, by their paths with forward slashes.
        damaged: Files already known to be damaged; an artifact that has one is not looked into.

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
    for place in models:
        members = {name for name in names if PurePosixPath(name).parent.as_posix() == place}
        if not members & set(damaged):
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

    models = [name for name in members if name.endswith(".onnx")]
    if not models:
        return [Problem(f"{prefix}{GENAI_CONFIG}", "stands there without an ONNX model")], []
    try:
        opened = open_folder(folder / prefix)
    except PhiconvError as error:
        return [Problem(sorted(models)[0], error.message, error.remedy or COPY_AGAIN)], []
    problems = [
        Problem(f"{prefix}{opened.model.name}", what, _EXPORT)
        for what in _data_problems(opened.model)
    ]
    if f"{prefix}{GENAI_CONFIG}" not in members:
        return problems, [f"{prefix or 'the folder'} has no {GENAI_CONFIG}: it was not compared"]
    found, notes = _config_problems(folder, prefix)
    return problems + found, notes


def _data_problems(file: Path) -> list[str]:
    """External data: every tensor has its bytes, and no two share some."""
    import onnx_ir as ir

    from phiconv.onnx.folder import external_tensors

    regions: dict[tuple[str, int, int], str] = {}
    problems: list[str] = []
    for tensor in external_tensors(ir.load(file)):
        offset, length = tensor.offset or 0, tensor.length
        if offset < 0 or (length is not None and length != tensor.nbytes):
            problems.append(
                f"the data of tensor {tensor.name} is {length} bytes at {offset}, not "
                f"{tensor.nbytes}"
            )
        else:
            regions[str(tensor.location), offset, offset + tensor.nbytes] = tensor.name or ""
    for before, after in pairwise(sorted(regions)):
        if before[0] == after[0] and after[1] < before[2]:
            problems.append(f"the data of tensor {regions[after]} begins within {regions[before]}")
    return problems


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
