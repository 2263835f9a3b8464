"""`--model`, `--revision` and `--set stage.key=value`, applied to a recipe before it is checked."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from phiconv.errors import PhiconvError, RecipeError
from phiconv.recipe.document import Document, KeyPath, parse_value
from phiconv.recipe.keys import child_types, did_you_mean, takes_any_key
from phiconv.stages.stage import Stage


@dataclass(frozen=True)
class Overrides:
    """What the command line changes in a recipe.

    Attributes:
        model: Replaces `model.source`; the recipe's revision, which belongs to its own source, is
            dropped.
        revision: Replaces `model.revision`.
        settings: Texts `stage.key=value`; the value is YAML, nested keys are joined with dots.
        skip_validation: Leave out the stages that measure; the artifact is then not validated.
    """

    model: str | None = None
    revision: str | None = None
    settings: tuple[str, ...] = ()
    skip_validation: bool = False


def apply(
    document: Document, overrides: Overrides, registry: Mapping[str, Stage]
) -> tuple[Document, list[PhiconvError]]:
    """Returns the document with the overrides in it, and what is wrong with them."""
    data = copy.deepcopy(document.data)
    if not isinstance(data, dict):
        return document, []
    places = dict(document.places)
    if overrides.model is not None:
        data["model"] = {"source": overrides.model}
        places[("model", "source")] = f"--model {overrides.model}"
    if overrides.revision is not None and isinstance(data.get("model"), dict):
        data["model"]["revision"] = overrides.revision
        places[("model", "revision")] = f"--revision {overrides.revision}"
    errors: list[PhiconvError] = []
    for text in overrides.settings:
        try:
            path = _set(data, text, registry)
        except PhiconvError as error:
            errors.append(error)
        else:
            places[path] = f"--set {text}"
    return replace(document, data=data, places=places), errors


def _set(data: dict[str, Any], text: str, registry: Mapping[str, Stage]) -> KeyPath:
    where = f"--set {text}"
    target, equals, value_text = text.partition("=")
    stage_id, dot, key = target.strip().partition(".")
    if not (equals and dot and stage_id and key):
        raise RecipeError(
            "--set wants stage.key=value", where=where, remedy="such as --set int4.block_size=32"
        )
    value = parse_value(value_text, where)
    given = data.get("stages")
    stages = given if isinstance(given, list) else []
    by_id = {
        stage.get("id"): index for index, stage in enumerate(stages) if isinstance(stage, dict)
    }
    if stage_id not in by_id:
        remedy = did_you_mean(stage_id, [name for name in by_id if isinstance(name, str)])
        raise RecipeError(f"the recipe has no stage {stage_id!r}", where=where, remedy=remedy)
    index = by_id[stage_id]
    stage = stages[index]
    if not isinstance(stage.get("with"), dict):
        stage["with"] = {}
    uses = stage.get("uses")
    known = isinstance(uses, str) and uses in registry
    types = [registry[uses].params] if known else []
    parts = key.split(".")
    keys = split_key(parts, stage["with"], types) or parts
    _assign(stage["with"], keys, value, where)
    return ("stages", index, "with", *keys)


def _assign(data: dict[str, Any], keys: Sequence[str], value: Any, where: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        inner = data.get(key)
        if inner is None:
            inner = data[key] = {}
        if not isinstance(inner, dict):
            name = ".".join(keys[: depth + 1])
            raise RecipeError(f"{name!r} is {inner!r}, which has no keys to set", where=where)
        data = inner
    data[keys[-1]] = value


def split_key(parts: Sequence[str], data: Any, types: Sequence[Any]) -> list[str] | None:
    """Cuts a dotted key into the keys of nested mappings.

    Keys may contain dots themselves (`gates.kl_divergence.mean.max` is `gates`,
    `kl_divergence.mean`, `max`), so at each level the longest key that `data` has is taken, else
    the longest that the types know, else, where the keys are the user's to choose, the longest
    that leaves something the values' type knows.

    Args:
        parts: The key, cut at every dot.
        data: What the recipe has at this level.
        types: The types that may stand at this level.

    Returns:
        The keys, or None when no cut fits.
    """
    if not parts:
        return []
    sizes = range(len(parts), 0, -1)
    for size in sizes:
        key = ".".join(parts[:size])
        if isinstance(data, Mapping) and key in data:
            children = [child for kind in types for child in child_types(kind, key)]
            rest = split_key(parts[size:], data[key], children)
            if rest is not None:
                return [key, *rest]
    for kind in types:
        chosen = takes_any_key(kind)
        for size in (*sizes[1:], len(parts)) if chosen else sizes:
            key = ".".join(parts[:size])
            children = child_types(kind, key)
            rest = split_key(parts[size:], None, children) if children else None
            if rest is not None:
                return [key, *rest]
    return None
