"""The documents that are generated are as they would be generated now, and say what is so."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import jsonschema
import pytest

from phiconv import allowances
from phiconv.cli import cli
from phiconv.gates import BUILT_IN, DEFAULT, DEFAULT_GENERATION
from phiconv.metrics import METRICS
from phiconv.recipe.document import read
from phiconv.recipe.schema import recipe_schema
from phiconv.stages.registry import STAGES

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["cli.md", "recipe.md", "recipe.schema.json", "report.schema.json"]
)
def test_generated_documents_do_not_drift(name: str) -> None:
    documents = generator().documents()
    found = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert found == documents[name], "run `make docs`"


def test_every_stage_parameter_and_option_is_described() -> None:
    def undescribed(schema: dict[str, Any], path: str) -> list[str]:
        missing = []
        for name, value in schema.get("properties", {}).items():
            if not (value.get("description") or "$ref" in value):
                missing.append(f"{path}.{name}")
        for name, value in schema.get("$defs", {}).items():
            missing += undescribed(value, f"{path}.{name}")
        return missing

    for stage in STAGES.values():
        assert undescribed(stage.params.model_json_schema(), stage.name) == []
    commands = [cli, *cli.commands.values()]
    commands += [sub for item in commands[1:] if isinstance(item, click.Group)
                 for sub in item.commands.values()]  # fmt: skip
    for command in commands:
        assert command.help
        for parameter in command.params:
            assert not isinstance(parameter, click.Option) or parameter.help, parameter.name


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    codes = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE)
             for code in row.split(",")}  # fmt: skip
    assert codes == {0, 2, 3, 4, 5, 130, 141, 143}


def test_validation_is_documented_as_it_is() -> None:
    text = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
    for name in METRICS:
        parent, _, last = name.partition(".")
        assert f"`{name}`" in text or (f"`{parent}." in text and f"`.{last}`" in text), name
    for name, limits in {**DEFAULT, **DEFAULT_GENERATION}.items():
        for bound, limit in limits.items():
            words = {"min": "at least", "max": "at most"}[bound]
            assert f"`{name}` {words} {limit:g}" in " ".join(text.split()), name
    for name in BUILT_IN:
        assert text.count(f"`{name}`") >= 2, name
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*[\d.]+) \|$", text, re.MULTILINE))
    for name, allowance in allowances.DEFAULT.items():
        if allowance != allowances.Allowance(by_default=True):
            assert f"{allowance.absolute:g}" in rows[name], name
            share = f"{allowance.relative:.0%}".replace("%", " %")
            assert not allowance.relative or share in rows[name], name


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    schema = recipe_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_schema_takes_the_shipped_recipes(
    recipe: Path, validator: jsonschema.Draft7Validator
) -> None:
    validator.validate(read(recipe).data)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("schema: 1", "schema: 2"),
        ("name: ", "nmae: "),
        ("uses: quantize", "uses: quantise"),
        ("block_size: 32", "blok_size: 32"),
        ("bits: 4", "bits: 5"),
        ("provider: cpu", "provider: tpu"),
        ("{max: 0.05}", "{mx: 0.05}"),
        ("path: ", "pth: "),
    ],
)
def test_the_schema_refuses_what_phiconv_refuses(
    old: str, new: str, validator: jsonschema.Draft7Validator, tmp_path: Path
) -> None:
    text = (ROOT / "recipes" / "int4-cpu.yaml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "r.yaml").write_text(text.replace(old, new), encoding="utf-8")
    data = json.loads(json.dumps(read(tmp_path / "r.yaml").data))
    assert list(validator.iter_errors(data))
