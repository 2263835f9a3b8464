"""Reads the JSON objects of a checkpoint: config.json, the weight index, safetensors headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from phiconv.errors import CheckpointError


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parses one JSON object, strictly: UTF-8, no duplicate key, no NaN or Infinity.

    Args:
        data: The bytes of the JSON text.
        where: The file, for error messages.

    Raises:
        CheckpointError: It is no valid JSON, or not an object.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
        )
    # a hostile file can nest deeper than the parser can follow
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"not valid JSON: {error}", where=where, remedy="download or copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"must hold a JSON object, but holds {type(value).__name__}",
            where=where,
            remedy="download or copy the file again",
        )
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        CheckpointError: The file cannot be read or is no valid JSON object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return parse_json_object(data, str(path))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} stands twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
