from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phiconv.errors import PhiconvError, Problems, RecipeError
from phiconv.recipe import Overrides, Recipe, load
from phiconv.recipe.document import parse
from phiconv.recipe.overrides import split_key
from phiconv.stages import registry as real
from tests.toy_stages import RECIPE, MeasureParams, QuantizeParams, registry


def load_text(folder: Path, text: str, *settings: str, **overrides: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, Overrides(settings=settings, **overrides), registry())


def errors_of(folder: Path, text: str, *settings: str) -> list[PhiconvError]:
    with pytest.raises(RecipeError) as caught:
        load_text(folder, text, *settings)
    error = caught.value
    return error.errors if isinstance(error, Problems) else [error]


def test_resolves_a_recipe(tmp_path: Path) -> None:
    recipe = load_text(tmp_path, RECIPE + "release: {path: cpu/int4}\n")
    assert [use.id for use in recipe.stages] == ["onnx", "int4", "check"]
    assert [use.inputs for use in recipe.stages] == [(), ("onnx",), ("int4",)]
    assert recipe.stages[1].params == QuantizeParams(block_size=64)
    assert recipe.stages[1].place == f"{tmp_path / 'r.yaml'}:6"
    assert recipe.text.release is not None
    assert recipe.text.release.path == "cpu/int4"
    assert recipe.warnings == ()


def test_every_error_is_listed_with_its_line(tmp_path: Path) -> None:
    text = """\
schema: 2
nmae: toy
model: {source: model, revison: main}
stages:
  - {id: onnx, uses: export-onnx, with: {provider: cpuu}}
  - id: int4
    uses: quantise
  - id: int8
    uses: quantize
    from: onx
    with:
      bits: 5
      blok_size: 64
      overrides: {head: {bitz: 3}}
release: {path: ../elsewhere}
"""
    found = {(str(e.where).removeprefix(f"{tmp_path / 'r.yaml'}:"), e.message, e.remedy)
             for e in errors_of(tmp_path, text)}  # fmt: skip
    assert found == {
        ("1", "schema: Input should be 1, not 2".replace("Input", "input"), None),
        ("1", "name: is missing", None),
        ("2", "nmae: unknown key", "did you mean 'name'?"),
        ("3", "model.revison: unknown key", "did you mean 'revision'?"),
        ("5", "stages.onnx.with.provider: input should be 'cpu', 'cuda' or 'dml', not 'cpuu'",
         None),
        ("7", "there is no stage 'quantise'", "did you mean 'quantize'?"),
        ("8", "stage 'int8' (quantize) takes unknown stage 'onx'", "did you mean 'onnx'?"),
        ("12", "stages.int8.with.bits: input should be 4 or 8, not 5", None),
        ("13", "stages.int8.with.blok_size: unknown key", "did you mean 'block_size'?"),
        ("14", "stages.int8.with.overrides.head.bitz: unknown key", "did you mean 'bits'?"),
        ("15", "release.path: must be a relative path with forward slashes and without '..', "
         "not '../elsewhere'", None),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("schema: 1\nname: a\nname: b\n", "key 'name' is given twice", 3),
        ("a: &x {b: 1}\nc: *x\n", "YAML aliases (*name) are not supported", 1),
        ("a: !!python/object:os.system {}\n", "YAML tag", 1),
        ("a: !!set {b}\n", "YAML tag", 1),
        ("a: !!int x\n", "'x' is not of type int", 1),
        ("a: !!python/name:os.system ''\n", "YAML tag", 1),
        ("1: a\n", "a key that is not text", 1),
        ("b: 1\n[a]: 1\n", "a key that is not text", 2),
        ("a: [1\nb: 2\n", "not valid YAML", 2),
        ("a: 1\n---\nb: 1\n", "not valid YAML", 2),
    ],
)
def test_refuses_dangerous_or_broken_yaml(text: str, message: str, line: int) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert message in str(caught.value)
    assert f"r.yaml:{line}" in str(caught.value)


def test_refuses_characters_that_yaml_has_not() -> None:
    with pytest.raises(RecipeError, match=r"not valid YAML: .*special characters are not allowed"):
        parse("name: a\x00b\n", "r.yaml")


def test_refuses_what_is_no_mapping(tmp_path: Path) -> None:
    for text in ("", "- 1\n", "text\n"):
        assert "mapping" in errors_of(tmp_path, text)[0].message
    with pytest.raises(RecipeError, match="no recipe file"):
        load(tmp_path / "absent.yaml", registry=registry())
    (tmp_path / "r.yaml").write_bytes(b"name: a\n# \xff\xfe")
    with pytest.raises(RecipeError, match="is not UTF-8 text") as caught:
        load(tmp_path / "r.yaml", registry=registry())
    assert caught.value.where == f"{tmp_path / 'r.yaml'}:2"
    with pytest.raises(RecipeError, match="cannot read the recipe file"):
        load(tmp_path, registry=registry())


def test_refuses_what_is_nested_too_deeply() -> None:
    with pytest.raises(RecipeError, match="nested far too deeply"):
        parse("[" * 100_000, "r.yaml")


def test_an_alias_is_refused_once_for_each_value() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("a: &x {b: 1}\nc: [*x, *x, *x]\n", "r.yaml")
    assert str(caught.value).count("aliases") == 1


def test_wrong_values_are_told_in_words_of_yaml(tmp_path: Path) -> None:
    text = """\
schema: 1
name: -x
model: y
stages:
  - {id: a, uses: export-onnx, with: [3]}
  - {id: b, uses: quantize, with: {bits: , overrides: 3, block_size: 3.5}}
  - {id: c, uses: validate, with: {tokens: "", windows: many, gates: {cosine: {max: x}}}}
"""
    pattern = "^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(Problems) as caught:
        load(tmp_path / "r.yaml", registry=real.STAGES)
    assert {error.message for error in caught.value.errors} == {
        f"name: must have the form {pattern}, not '-x'",
        "model: input should be a mapping of keys, not 'y'",
        "stages.a.with: input should be a mapping of keys, not [3]",
        "stages.b.with.bits: input should be 4 or 8, but the value is left out",
        "stages.b.with.overrides: input should be a list, not 3",
        "stages.b.with.block_size: input should be 16, 32, 64, 128 or 256, not 3.5",
        "stages.c.with.tokens: must not be empty",
        "stages.c.with.windows: input should be a whole number, not 'many'",
        "stages.c.with.gates.cosine.max: input should be a number, not 'x'",
    }
    empty = "schema: 1\nname: x\nmodel: {source: y}\nstages: []\n"
    assert [error.message for error in errors_of(tmp_path, empty)] == [
        "stages: needs at least 1 item"
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-3", -3),
        ("010", 10),
        ("0x10", 16),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("true", True),
        ("'1'", "1"),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    assert parse(f"key: {text}", "r").data == {"key": value}


def test_a_number_where_text_belongs_says_to_quote_it(tmp_path: Path) -> None:
    [error] = errors_of(tmp_path, RECIPE.replace("source: model", "source: model, revision: 12"))
    assert error.remedy == "put the value in quotes"


def test_model_and_revision_are_overridden(tmp_path: Path) -> None:
    text = RECIPE.replace("source: model", "source: a/b, revision: main")
    assert load_text(tmp_path, text).text.model.revision == "main"
    assert load_text(tmp_path, text, model="c/d").text.model.revision is None
    assert load_text(tmp_path, text, model="c/d").source == "c/d"
    assert load_text(tmp_path, text, revision="v2").text.model.revision == "v2"
    assert load_text(tmp_path, text.replace("model: {source: a/b, revision: main}\n", ""),
                     model="c/d").source == "c/d"  # fmt: skip


def test_measurements_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    recipe = load(path, Overrides(skip_validation=True), registry())
    assert [use.id for use in recipe.stages] == ["onnx", "int4"]
    assert [entry["id"] for entry in recipe.resolved()["stages"]] == ["onnx", "int4"]  # type: ignore[index]


def test_source_is_found_here_or_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there / "model"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert load_text(there, RECIPE).source == str(there / "model")
    (here / "model").mkdir()
    assert load_text(there, RECIPE).source == "model"
    assert load_text(there, RECIPE).source_name == "model"


def test_settings_replace_parameters(tmp_path: Path) -> None:
    recipe = load_text(
        tmp_path,
        RECIPE,
        "int4.bits=8",
        "int4.overrides.lm.head.bits=3",
        "check.gates.kl_divergence.mean.max=1e-3",
        "check.gates.top1_agreement={min: 0.5, max: 1}",
    )
    assert recipe.stages[1].params == QuantizeParams.model_validate(
        {"bits": 8, "block_size": 64, "overrides": {"lm.head": {"bits": 3}}}
    )
    assert recipe.stages[2].params.limits() == {  # type: ignore[attr-defined]
        "top1_agreement": {"min": 0.5, "max": 1},
        "kl_divergence.mean": {"max": 1e-3},
    }


@pytest.mark.parametrize(
    ("parts", "data", "keys"),
    [
        ("gates.a.b.max", {}, ["gates", "a.b", "max"]),
        ("gates.a.b.max", {"gates": {"a.b": {"min": 1}}}, ["gates", "a.b", "max"]),
        ("gates.a", {}, ["gates", "a"]),
        ("gatez.a", {}, None),
        ("provider", {}, ["provider"]),
    ],
)
def test_dotted_keys_are_cut_by_what_there_is(
    parts: str, data: dict[str, Any], keys: list[str] | None
) -> None:
    assert split_key(parts.split("."), data, [MeasureParams]) == keys


@pytest.mark.parametrize(
    ("setting", "message", "remedy"),
    [
        ("int4", "--set wants stage.key=value", "such as --set int4.block_size=32"),
        ("int4.bits", "--set wants stage.key=value", "such as --set int4.block_size=32"),
        ("in4.bits=4", "the recipe has no stage 'in4'", "did you mean 'int4'?"),
        ("int4.bitz=4", "stages.int4.with.bitz: unknown key", "did you mean 'bits'?"),
        ("int4.bits=6", "stages.int4.with.bits: input should be 4 or 8, not 6", None),
        ("int4.block_size.x=6", "'block_size' is 64, which has no keys to set", None),
    ],
)
def test_wrong_settings_name_themselves(
    tmp_path: Path, setting: str, message: str, remedy: str | None
) -> None:
    [error] = errors_of(tmp_path, RECIPE, setting)
    assert (error.message, error.remedy) == (message, remedy)
    assert error.where == f"--set {setting}"


def test_a_setting_may_hold_an_equals_sign(tmp_path: Path) -> None:
    [error] = errors_of(tmp_path, RECIPE, "int4.bits=a=b")
    assert error.message == "stages.int4.with.bits: input should be 4 or 8, not 'a=b'"


@pytest.mark.parametrize(
    ("stages", "messages"),
    [
        ("  - text\n  - {id: int4, uses: quantize}\n", ["stages.0", "no stage 'onnx'"]),
        ("  - {id: 7, uses: quantize}\n", ["stages.0.id: ", "no stage 'onnx'"]),
        ("  - {id: onnx, uses: 7}\n", ["stages.onnx.uses: "]),
        ("  - {id: onnx, uses: nothing}\n", ["there is no stage 'nothing'"]),
        (
            "  {onnx: {uses: quantize}}\n",
            ["the recipe has no stage 'onnx'", "stages: input should be a list"],
        ),
    ],
)
def test_what_is_wrong_with_the_recipe_is_told_beside_settings(
    tmp_path: Path, stages: str, messages: list[str]
) -> None:
    found = errors_of(tmp_path, STAGES + stages, "onnx.a.b=1")
    for message in messages:
        assert any(message in error.message for error in found)
    assert len(found) == len(messages)


STAGES = "schema: 1\nname: toy\nmodel: {source: m}\nstages:\n"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("  - {id: a, uses: quantize}\n", "needs an input of kind onnx-graph"),
        (
            "  - {id: a, uses: export-onnx}\n  - {id: b, uses: export-onnx, from: a}\n",
            "reads the checkpoint itself",
        ),
        (
            "  - {id: a, uses: export-onnx}\n  - {id: c, uses: measure}\n"
            "  - {id: b, uses: quantize}\n",
            "takes onnx-graph, but stage 'c' (measure) makes measurement",
        ),
        (
            "  - {id: a, uses: export-onnx}\n  - {id: a, uses: quantize}\n",
            "two stages have the id 'a'",
        ),
        (
            "  - {id: a, uses: quantize, from: b}\n  - {id: b, uses: quantize, from: a}\n",
            "stages take each other's output in a circle: 'a', 'b'",
        ),
        (
            "  - {id: a, uses: export-onnx}\n  - {id: b, uses: export-onnx}\n"
            "  - {id: c, uses: quantize, from: [a, b]}\n",
            "takes two inputs of one kind",
        ),
        (
            "  - {id: a, uses: exprt-onnx}\n  - {id: b, uses: quantize}\n",
            "there is no stage 'exprt-onnx'",
        ),
        ("  - {id: a.b, uses: export-onnx}\n", "stages.a.b.id: must have the form "),
        ("  []\n", "stages: needs at least 1 item"),
    ],
)
def test_refuses_stages_that_do_not_fit(tmp_path: Path, stages: str, message: str) -> None:
    assert message.lower() in str(errors_of(tmp_path, STAGES + stages)[0]).lower()


def test_warns_of_output_that_nothing_takes(tmp_path: Path) -> None:
    stages = "  - {id: a, uses: export-onnx}\n  - {id: b, uses: export-onnx}\n"
    stages += "  - {id: check, uses: measure}\n"  # nobody takes what was measured, either
    [warning] = load_text(tmp_path, STAGES + stages).warnings
    assert warning == f"{tmp_path / 'r.yaml'}:5: nothing takes the output of stage 'a'"


@pytest.mark.parametrize("name", ["con", "NUL.txt", "a/b", "a.", "-a", ""])
def test_refuses_names_that_are_no_folder(tmp_path: Path, name: str) -> None:
    text = RECIPE.replace("name: toy", f"name: '{name}'")
    assert "name" in errors_of(tmp_path, text)[0].message


def test_resolved_recipe_has_no_path(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    recipe = load_text(tmp_path, RECIPE, model=str(tmp_path / "model"))
    assert recipe.resolved()["model"] == {"source": "model"}
    assert str(tmp_path) not in repr(recipe.resolved())
    assert recipe.resolved() == load_text(tmp_path, RECIPE + "\n# comment\n").resolved()
