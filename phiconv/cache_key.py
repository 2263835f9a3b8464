"""The cache key of a step: the digest of everything that can shape its output.

docs/adr/0001-cache-and-publish.md says what belongs to it and why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from pydantic import BaseModel

from phiconv import machine
from phiconv.stages.stage import JSON, InputRef, Requirement, Stage

KEY_SCHEMA = 1


def key_material(
    stage: Stage, params: BaseModel, inputs: Iterable[InputRef], checkpoint_digest: str
) -> dict[str, JSON]:
    """What a step's cache key is the digest of: all that can shape its output, and no more.

    Requirements that a stage can do without belong to it, because whether they are there decides
    what the stage does.
    """
    material: dict[str, JSON] = {
        "key_schema": KEY_SCHEMA,
        "stage": stage.name,
        "version": stage.version,
        "params": stage.key_params(params),
        "inputs": [item.key for item in inputs],
        "tools": {name: machine.version(name) for name in stage.tools()},
    }
    if not stage.accepts:
        material["checkpoint"] = checkpoint_digest
    optional = {item.name: is_present(item) for item in stage.requires(params) if item.optional}
    if optional:
        material["present"] = optional
    return material


def digest(material: Mapping[str, JSON]) -> str:
    """sha256 (hexadecimal) of canonical JSON: sorted keys, no spaces, UTF-8, finite numbers."""
    text = json.dumps(
        material, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def is_present(requirement: Requirement) -> bool:
    """Whether this machine has what a stage requires."""
    if requirement.kind == "provider":
        return requirement.name in machine.providers()
    if requirement.kind == "binding":
        return machine.llama_cpp_binding() is not None
    return machine.has_module(requirement.name)
