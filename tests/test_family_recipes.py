"""recipes/<model>/<target>.yaml are the table's, and fit the models that they are for."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest

from phiconv.checkpoint.config import ModelConfig
from phiconv.recipe import Recipe, load
from phiconv.recipe.document import read
from phiconv.recipe.schema import recipe_schema
from phiconv.runtimes.length_limits import boundaries
from phiconv.stages.registry import STAGES

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = sorted(RECIPES.glob("*/*.yaml"))

_COMMON: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "original_max_position_embeddings": 4096,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_MINI = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
_MEDIUM = {
    "vocab_size": 32064,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}


def _longrope(pairs: int) -> dict[str, Any]:
    """The published factors' number, not their values."""
    factors = {"short_factor": [1.0] * pairs, "long_factor": [1.0 + i for i in range(pairs)]}
    return {"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", **factors}}


# What config.json of the published models says, as far as a recipe can go wrong by it.
PUBLISHED: dict[str, dict[str, Any]] = {
    "phi-3-mini-4k-instruct": {**_MINI, "sliding_window": 2047},
    "phi-3-mini-128k-instruct": {**_MINI, "sliding_window": 262144, **_longrope(48)},
    "phi-3-medium-4k-instruct": {**_MEDIUM, "sliding_window": 2047},
    "phi-3-medium-128k-instruct": {**_MEDIUM, "sliding_window": 131072, **_longrope(64)},
    "phi-3.5-mini-instruct": {**_MINI, "sliding_window": 262144, **_longrope(48)},
    "phi-4": {
        **_MEDIUM,
        "vocab_size": 100352,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rope_theta": 250000,
        "sliding_window": None,
        "bos_token_id": 100257,
        "eos_token_id": 100265,
        "pad_token_id": 100349,
    },
    "phi-4-mini-instruct": {
        **_MINI,
        "vocab_size": 200064,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "bos_token_id": 199999,
        "eos_token_id": 199999,
        "pad_token_id": 199999,
        **_longrope(48),
    },
}


@cache
def config_of(folder: str) -> ModelConfig:
    return ModelConfig.from_dict({**_COMMON, **PUBLISHED[folder]}, f"{folder}/config.json")


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("family_recipes", RECIPES / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for a class's module
    spec.loader.exec_module(module)
    return module


def test_the_recipes_are_those_of_the_table() -> None:
    written = {f.relative_to(RECIPES).as_posix(): f.read_text(encoding="utf-8") for f in FILES}
    assert written == generator().recipes(), "run python recipes/generate.py"


def test_every_member_of_the_family_has_recipes() -> None:
    assert {file.parent.name for file in FILES} == set(PUBLISHED)
    names = [load(file).text.name for file in FILES]
    assert len(names) == len(set(names)), "two builds would have one name"


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_shapes_are_read(model: str) -> None:
    config = config_of(model)
    assert config.head_dim in (96, 128)
    assert config.rotary_dim // 2 % 8 == 0, "the fused rotary embedding takes 8 pairs at a time"
    found = {boundary.kind: boundary.position for boundary in boundaries(config)}
    assert found == {
        "phi-3-mini-4k-instruct": {"sliding window": 2047},
        "phi-3-medium-4k-instruct": {"sliding window": 2047},
        "phi-4": {},
    }.get(model, {"LongRoPE switch": 4096})
    (entry,) = (m for m in generator().MODELS if m.name.lower() == model)
    assert entry.boundary == bool(found)
    assert entry.tied == config.tie_word_embeddings


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_recipe_fits_its_model(file: Path) -> None:
    jsonschema.Draft7Validator(_schema()).validate(read(file).data)
    recipe = load(file)
    config = config_of(file.parent.name)
    for use in recipe.stages:
        assert STAGES[use.stage.name].check(use.params, config) == [], use.id
    check = recipe.stages[-1].params.model_dump()
    assert check["length_probes"] == bool(boundaries(config))
    assert check["gates"]
    release = recipe.text.release
    assert release is not None
    assert release.path == "gguf" or release.path.endswith(file.stem)


@cache
def _schema() -> dict[str, Any]:
    return recipe_schema()


def test_the_recipes_beside_them_make_the_same_artifacts() -> None:
    """recipes/*.yaml are Phi-3-mini-4k's by shorter names."""
    compared = 0
    family = [load(file) for file in FILES if file.parent.name == "phi-3-mini-4k-instruct"]
    for file in sorted(RECIPES.glob("*.yaml")):
        short = load(file)
        for long in family:
            if _made_by(long) == _made_by(short):
                compared += 1
                assert long.text.model == short.text.model
                assert long.text.release == short.text.release
    assert compared == len(family)


def _made_by(recipe: Recipe) -> list[tuple[str, Any]]:
    """The stages that shape the artifact."""
    return [
        (use.stage.name, use.params.model_dump())
        for use in recipe.stages
        if use.stage.name != "validate"
    ]
