"""The weight files of a checkpoint: one safetensors file, or shards and their index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from phiconv.checkpoint.folder import is_relative_name, member
from phiconv.checkpoint.json_object import read_json_object
from phiconv.checkpoint.problems import attempt, combined, name_list
from phiconv.checkpoint.safetensors_file import (
    FLOATS,
    SafetensorsFile,
    StoredDtype,
    TensorInfo,
)
from phiconv.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Dtypes: TypeAlias = Mapping[str, tuple[StoredDtype, int]]

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Weights:
    """The opened weight files.

    Attributes:
        files: The files by name, sorted.
        tensors: Every tensor by name, in the order of the files and within each as stored.
    """

    files: Mapping[str, SafetensorsFile]
    tensors: Mapping[str, TensorInfo]


def open_weights(folder: Path, names: Iterable[str], dtypes: Dtypes = FLOATS) -> Weights:
    """Opens the weight files of a folder and checks them against their index.

    As in transformers, `model.safetensors` goes before an index.

    Args:
        folder: The checkpoint's folder.
        names: The names of the files in it.
        dtypes: What their tensors may be stored as: `FLOATS`, or `NUMBERS` where weights are
            quantized.

    Raises:
        CheckpointError: There are none, or one is missing, broken, outside the folder, or not
            what the index says. Everything found is reported.
    """
    names = frozenset(names)
    if SINGLE_FILE in names:
        file = _open_file(folder, SINGLE_FILE, dtypes)
        return Weights({SINGLE_FILE: file}, file.tensors)
    if INDEX_FILE not in names:
        raise no_weights(names, str(folder))
    weight_map = read_weight_map(member(folder, INDEX_FILE))
    files: dict[str, SafetensorsFile] = {}
    errors: list[CheckpointError] = []
    for name in sorted(set(weight_map.values())):
        shard = attempt(errors, _open_file, folder, name, dtypes)
        if shard is not None:
            files[name] = shard
    errors.extend(_check_index(weight_map, files, str(folder / INDEX_FILE)))
    if errors:
        raise combined(errors)
    tensors = {name: info for file in files.values() for name, info in file.tensors.items()}
    return Weights(files, tensors)


def read_weight_map(index: Path) -> dict[str, str]:
    """Reads which shard holds which tensor.

    Returns:
        Tensor name to shard name, relative to the folder.

    Raises:
        CheckpointError: The index is malformed, or names a shard outside the folder.
    """
    weight_map: Any = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map must name the file of every tensor", where=str(index))
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"weight_map: the file of {tensor!r} must be a string", where=str(index)
            )
    outside = sorted({shard for shard in weight_map.values() if not is_relative_name(shard)})
    if outside:
        raise CheckpointError(
            f"{name_list(outside)} leads out of the checkpoint's folder",
            where=str(index),
            remedy="trust no checkpoint that asks for files elsewhere",
        )
    return weight_map


def no_weights(names: Iterable[str], where: str) -> CheckpointError:
    """The error for a checkpoint without safetensors weights, by what it holds instead."""
    names = sorted(names)
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return CheckpointError(
            f"the weights are pickled ({name_list(pickles)}); phiconv never loads pickle, "
            "which can run any code",
            where=where,
            remedy="convert them to safetensors: load them in transformers in a sandbox and "
            "call save_pretrained",
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    found = f"; found {name_list(others)}" if others else ""
    return CheckpointError(
        f"there is neither {SINGLE_FILE} nor {INDEX_FILE}{found}",
        where=where,
        remedy="give the folder of a Hugging Face checkpoint with all of its files",
    )


def _open_file(folder: Path, name: str, dtypes: Dtypes) -> SafetensorsFile:
    return SafetensorsFile(member(folder, name), name, dtypes)


def _check_index(
    weight_map: Mapping[str, str], files: Mapping[str, SafetensorsFile], where: str
) -> list[CheckpointError]:
    """Compares the index with what the readable shards hold."""
    errors: list[CheckpointError] = []
    holders: dict[str, str] = {}
    for name, file in files.items():
        listed = {tensor for tensor, shard in weight_map.items() if shard == name}
        if absent := sorted(listed - file.tensors.keys()):
            errors.append(
                CheckpointError(
                    f"{name} lacks what the index says it holds: {name_list(absent)}", where=where
                )
            )
        twice = sorted(holders.keys() & file.tensors.keys())
        if twice:
            also = sorted({holders[tensor] for tensor in twice})
            errors.append(
                CheckpointError(
                    f"{name} holds tensors that {name_list(also)} holds too: {name_list(twice)}",
                    where=where,
                )
            )
        unlisted = sorted(file.tensors.keys() - weight_map.keys())
        if unlisted:
            errors.append(
                CheckpointError(
                    f"{name} holds tensors that the index does not list: {name_list(unlisted)}",
                    where=where,
                )
            )
        holders |= dict.fromkeys(file.tensors, name)
    return errors
