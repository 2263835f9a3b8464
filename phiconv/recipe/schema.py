"""The JSON schema of recipes, for editors (yaml-language-server) and for docs/recipe.md."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from phiconv.recipe.model import RecipeText
from phiconv.stages.registry import STAGES
from phiconv.stages.stage import Stage

_DRAFT = "http://json-schema.org/draft-07/schema#"


def recipe_schema() -> dict[str, Any]:
    """The schema of a whole recipe; what `with` takes follows from `uses`."""
    definitions: dict[str, Any] = {}
    schema = _schema_of(RecipeText, definitions)
    entry = definitions["StageEntry"]
    entry["properties"]["uses"]["enum"] = list(STAGES)
    entry["allOf"] = [_choice(name, stage, definitions) for name, stage in STAGES.items()]
    return {"$schema": _DRAFT, **schema, "definitions": dict(sorted(definitions.items()))}


def stage_schema(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema of a stage's `with`, and the definitions it refers to."""
    definitions: dict[str, Any] = {}
    return _schema_of(stage.params, definitions), definitions


def _choice(name: str, stage: Stage, definitions: dict[str, Any]) -> dict[str, Any]:
    """If `uses` is `name`, then `with` is as the stage's parameters say."""
    schema = _schema_of(stage.params, definitions)
    label = stage.params.__name__
    definitions[label] = schema
    then: dict[str, Any] = {"properties": {"with": {"$ref": f"#/definitions/{label}"}}}
    if schema.get("required"):
        then["required"] = ["with"]
    return {"if": {"properties": {"uses": {"const": name}}, "required": ["uses"]}, "then": then}


def _schema_of(model: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    """The model's schema in draft 7's words; what it refers to is added to `definitions`.

    Raises:
        ValueError: Two different models have one name.
    """
    schema: dict[str, Any] = model.model_json_schema(ref_template="#/definitions/{model}")
    for name, definition in schema.pop("$defs", {}).items():
        if definitions.setdefault(name, definition) != definition:
            raise ValueError(f"two parameter models are called {name}")
    return schema
