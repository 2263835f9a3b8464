"""Loads a recipe: every error in it is found and reported together, each with its line."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from phiconv.errors import PhiconvError, Problems, RecipeError
from phiconv.recipe.document import Document, KeyPath, read
from phiconv.recipe.graph import Node, connect
from phiconv.recipe.keys import did_you_mean, known_keys
from phiconv.recipe.model import Recipe, RecipeText, StageUse
from phiconv.recipe.overrides import Overrides, apply
from phiconv.stages.registry import STAGES
from phiconv.stages.stage import MEASUREMENT, Stage

Model = TypeVar("Model", bound=BaseModel)

_SHOWN_INPUT = 60  # characters of a wrong value that an error repeats


def load(
    file: Path, overrides: Overrides | None = None, registry: Mapping[str, Stage] = STAGES
) -> Recipe:
    """Reads and checks a recipe.

    Args:
        file: The YAML file.
        overrides: What the command line changes.
        registry: The stages that `uses` may name.

    Raises:
        RecipeError: What is wrong, with `file:line`; `Problems` when there are several.
    """
    overrides = overrides or Overrides()
    document, errors = apply(read(file), overrides, registry)
    if not isinstance(document.data, dict):
        raise RecipeError(
            "a recipe is a mapping of keys", where=document.name, remedy="see docs/recipe.md"
        )
    text, found = _validate(RecipeText, document, (), document.data, context={})
    errors += found
    uses, found = _stages(document, registry, file.parent)
    errors += found
    inputs, found, warnings = connect([node for node, _ in uses], registry)
    # Connections of stages that cannot be made out would only repeat what was said about them.
    errors += found if len(uses) == len(_entries(document)) else []
    if text is None or errors:
        raise errors[0] if len(errors) == 1 else Problems(errors)
    stages = tuple(
        StageUse(node.id, node.stage, params, inputs[node.id], node.place)
        for node, params in uses
        if node.stage is not None and params is not None
    )
    if overrides.skip_validation:
        stages = tuple(use for use in stages if use.stage.produces != MEASUREMENT)
        kept = {use.id for use in stages}
        remaining = tuple(entry for entry in text.stages if entry.id in kept)
        text = text.model_copy(update={"stages": remaining})
    digest = hashlib.sha256(document.text.encode()).hexdigest()
    source = _locate(text.model.source, file.parent)
    return Recipe(text, file, digest, source, stages, tuple(warnings))


def _locate(source: str, folder: Path) -> str:
    """The source, made a path that exists if it is one relative to the recipe's folder."""
    if Path(source).exists():
        return source
    beside = folder / source
    return str(beside) if beside.exists() else source


def _entries(document: Document) -> list[Any]:
    entries = document.data.get("stages")
    return entries if isinstance(entries, list) else []


def _stages(
    document: Document, registry: Mapping[str, Stage], folder: Path
) -> tuple[list[tuple[Node, BaseModel | None]], list[PhiconvError]]:
    """Validates `uses` and `with` of every stage that can be made out."""
    errors: list[PhiconvError] = []
    found: list[tuple[Node, BaseModel | None]] = []
    for index, entry in enumerate(_entries(document)):
        if not isinstance(entry, dict) or not isinstance(entry.get("uses"), str):
            continue
        path: KeyPath = ("stages", index)
        stage = registry.get(entry["uses"])
        params = None
        if stage is None:
            message = f"there is no stage {entry['uses']!r}"
            remedy = did_you_mean(entry["uses"], registry)
            where = document.place((*path, "uses"))
            errors.append(RecipeError(message, where=where, remedy=remedy))
        else:
            given = entry.get("with")
            values = given if isinstance(given, dict) else {}
            place: KeyPath = (*path, "with")
            params, problems = _validate(stage.params, document, place, values, {"folder": folder})
            errors += problems
        sources = entry.get("from")
        named = [sources] if isinstance(sources, str) else sources
        if isinstance(entry.get("id"), str) and (named is None or _all_text(named)):
            known = tuple(named) if named is not None else None
            found.append((Node(entry["id"], stage, known, document.place(path)), params))
    return found, errors


def _all_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _validate(
    model: type[Model], document: Document, path: KeyPath, values: Any, context: dict[str, Any]
) -> tuple[Model | None, list[PhiconvError]]:
    try:
        return model.model_validate(values, context=context), []
    except ValidationError as error:
        return None, _problems(error, model, document, path, values)


def _problems(
    error: ValidationError, model: type[BaseModel], document: Document, path: KeyPath, values: Any
) -> list[PhiconvError]:
    """Translates pydantic's errors; those of a union's members at one place become one."""
    by_place: dict[KeyPath, list[tuple[str, str | None]]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
            continue  # refused elements are not counted: each has an error of its own
        where = _existing(item["loc"], values)
        if item["type"] == "missing":
            where = (*where, item["loc"][-1])
        by_place.setdefault(where, []).append(_message(item, model, where))
    problems: list[PhiconvError] = []
    for where, messages in by_place.items():
        texts = list(dict.fromkeys(text for text, _ in messages))
        remedy = next((remedy for _, remedy in messages if remedy), None)
        name = _readable((*path, *where), document)
        message = f"{name}: {' or '.join(texts)}" if name else " or ".join(texts)
        place = document.place((*path, *where))
        problems.append(RecipeError(message, where=place, remedy=remedy))
    return problems


def _message(item: Any, model: type[BaseModel], where: KeyPath) -> tuple[str, str | None]:
    if item["type"] == "extra_forbidden":
        return "unknown key", did_you_mean(str(where[-1]), known_keys(model, where[:-1]))
    if item["type"] == "missing":
        return "is missing", None
    text = _PHRASES.get(item["type"], item["msg"]).removeprefix("Value error, ")
    text = text.format_map(item.get("ctx", {})) if item["type"] in _PHRASES else text
    if item["type"] in {"too_short", "string_too_short"} or (
        isinstance(item["input"], dict | list | tuple) and item["type"] == "value_error"
    ):
        return text, None
    text = text[:1].lower() + text[1:] if text.startswith("Input") else text
    if item["input"] is None:
        return f"{text}, but the value is left out", None
    given = repr(item["input"])
    shown = given if len(given) <= _SHOWN_INPUT else given[:_SHOWN_INPUT] + "…"
    quoted = item["type"] == "string_type" and isinstance(item["input"], int | float)
    return f"{text}, not {shown}", "put the value in quotes" if quoted else None


_PHRASES = {
    "too_short": "needs at least {min_length} item",
    "tuple_type": "input should be a list",
    "list_type": "input should be a list",
    "dict_type": "input should be a mapping of keys",
    "model_type": "input should be a mapping of keys",
    "string_pattern_mismatch": "must have the form {pattern}",
    "string_too_short": "must not be empty",
    "string_unicode": "must be text in UTF-8",
    "float_parsing": "input should be a number",
    "int_parsing": "input should be a whole number",
    "int_from_float": "input should be a whole number",
}
"""What pydantic says in terms of Python, in terms of YAML; by the type of error."""


def _existing(location: KeyPath, values: Any) -> KeyPath:
    """`location` without the elements that are pydantic's own (tags of union members)."""
    path: list[str | int] = []
    for key in location:
        inside_mapping = isinstance(values, dict) and key in values
        inside_list = isinstance(values, list) and isinstance(key, int) and key < len(values)
        if inside_mapping or inside_list:
            path.append(key)
            values = values[key]
    return tuple(path)


def _readable(path: KeyPath, document: Document) -> str:
    """`stages.int4.with.bits`: stages by id where they have one."""
    parts = [str(key) for key in path]
    if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int):
        entry = _entries(document)[path[1]]
        if isinstance(entry, dict) and isinstance(entry.get("id"), str):
            parts[1] = entry["id"]
    return ".".join(parts)
