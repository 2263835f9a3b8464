from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phiconv import machine
from phiconv.cache_key import digest
from phiconv.errors import EnvironmentLacksError, PhiconvError, Problems, StageError
from phiconv.plan import Plan, as_json
from phiconv.preflight import lacking, preflight
from phiconv.stages.stage import Estimate
from phiconv.summary import plan_text
from tests.toy_stages import RECIPE, Bench, Export, Quantize, WriteOnnx, registry

STAMPED = RECIPE.replace(
    "  - {id: check", "  - {id: mark, uses: stamp, with: {file: mark.txt}}\n  - {id: check"
)


def keys(plan: Plan) -> dict[str, str]:
    return {step.id: step.key for step in plan.steps}


def test_adds_the_steps_that_the_recipe_leaves_out(bench: Bench) -> None:
    plan = bench.plan()
    assert [(step.id, step.stage.name, step.added) for step in plan.steps] == [
        ("onnx", "export-onnx", False),
        ("int4", "quantize", False),
        ("int4.onnx", "write-onnx", True),
        ("tokens", "tokens", True),
        ("check", "measure", False),
    ]
    inputs = {step.id: [item.id for item in step.inputs] for step in plan.steps}
    assert inputs["check"] == ["int4.onnx", "tokens"]
    assert plan.shipped == "int4.onnx"
    made_by = [name for name, _ in plan.step("int4.onnx").inputs[0].made_by]
    assert made_by == ["export-onnx", "quantize"]
    assert [step.state for step in plan.steps] == ["build"] * 5


def test_consumers_share_what_is_added(bench: Bench) -> None:
    text = RECIPE + "  - {id: check2, uses: measure, from: int4}\n"
    assert len(bench.plan(text).steps) == 6


def test_a_stage_may_have_the_id_of_an_added_step(bench: Bench) -> None:
    text = RECIPE.replace("id: int4", "id: tokens")
    assert [step.id for step in bench.plan(text).steps] == [
        "onnx",
        "tokens",
        "tokens.onnx",
        "check.tokens",
        "check",
    ]


def test_a_written_artifact_is_not_written_again(bench: Bench) -> None:
    text = RECIPE.replace("  - {id: check", "  - {id: out, uses: write-onnx}\n  - {id: check")
    plan = bench.plan(text)
    assert plan.shipped == "out"
    assert [step.id for step in plan.steps] == ["onnx", "int4", "out", "tokens", "check"]


def test_stages_run_after_their_inputs_whatever_the_order(bench: Bench) -> None:
    text = """\
schema: 1
name: toy
model: {source: model}
stages:
  - {id: int4, uses: quantize, from: onnx, with: {block_size: 32}}
  - {id: onnx, uses: export-onnx}
  - {id: last, uses: quantize, from: int4, with: {block_size: 32}}
"""
    assert [step.id for step in bench.plan(text).steps] == ["onnx", "int4", "last", "last.onnx"]


def test_keys_are_full_digests_of_canonical_json(bench: Bench) -> None:
    plan = bench.plan()
    onnx, int4 = plan.step("onnx"), plan.step("int4")
    assert onnx.key_of == {
        "key_schema": 1,
        "stage": "export-onnx",
        "version": 1,
        "params": {"provider": "cpu", "precision": "fp32"},
        "inputs": [],
        "tools": {"onnx": machine.version("onnx")},
        "checkpoint": plan.checkpoint.digest,
    }
    assert int4.key_of["inputs"] == [onnx.key]
    assert "checkpoint" not in int4.key_of
    assert digest(json.loads(json.dumps(int4.key_of))) == int4.key
    assert len(int4.key) == 64
    assert digest({"b": 1, "a": "é"}) == digest({"a": "é", "b": 1})


def test_a_key_changes_with_all_that_shapes_the_bytes_and_nothing_else(bench: Bench) -> None:
    base = keys(bench.plan())

    def changed(*settings: str, text: str = RECIPE, **stages: Any) -> set[str]:
        other = keys(bench.plan(text, registry(**stages), *settings))
        return {name for name, key in other.items() if base.get(name) != key}

    assert changed() == set()
    assert changed("int4.bits=8") == {"int4", "int4.onnx", "check"}
    assert changed("onnx.provider=cuda") == {"onnx", "int4", "int4.onnx", "check"}
    assert changed("check.gates.top1_agreement.min=0.9") == set()
    assert changed(text=RECIPE.replace("name: toy", "name: other")) == set()

    class Newer(Quantize):
        version = 2

    class OtherTool(Export):
        def tools(self) -> tuple[str, ...]:
            return ("onnx", "numpy")

    assert changed(quantize=Newer()) == {"int4", "int4.onnx", "check"}
    assert changed(export_onnx=OtherTool()) == {"onnx", "int4", "int4.onnx", "check"}


def test_a_key_changes_with_a_tools_version(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    base = keys(bench.plan())
    monkeypatch.setattr(machine, "version", lambda name: "0")
    assert keys(bench.plan())["onnx"] != base["onnx"]


def test_a_key_does_not_depend_on_paths(bench: Bench, tmp_path: Path, toy_checkpoint: Path) -> None:
    import shutil

    moved = shutil.copytree(toy_checkpoint, tmp_path / "elsewhere" / "moved")
    other = Bench(tmp_path / "elsewhere", moved)
    for place in (bench, other):
        (place.folder / "mark.txt").write_text("same")
    assert keys(bench.plan(STAMPED)) == keys(other.plan(STAMPED))
    (other.folder / "mark.txt").write_text("different")
    assert keys(bench.plan(STAMPED))["mark"] != keys(other.plan(STAMPED))["mark"]


def test_a_key_depends_on_what_a_stage_can_do_without(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = "check.provider=DmlExecutionProvider"
    without = bench.plan(RECIPE, None, setting)
    assert [item.name for item in without.step("check").missing] == ["DmlExecutionProvider"]
    monkeypatch.setattr(machine, "providers", lambda: ("DmlExecutionProvider",))
    with_it = bench.plan(RECIPE, None, setting)
    assert with_it.step("check").missing == ()
    assert with_it.step("check").key != without.step("check").key
    assert with_it.step("int4").key == without.step("int4").key


def test_checks_of_all_stages_are_reported_with_their_place(bench: Bench) -> None:
    text = RECIPE.replace("block_size: 64", "block_size: 48")
    text += "  - {id: more, uses: quantize, from: onnx, with: {block_size: 17}}\n"
    with pytest.raises(Problems) as caught:
        bench.plan(text)
    assert [error.where for error in caught.value.errors] == [
        f"{bench.folder / 'toy.yaml'}:6",
        f"{bench.folder / 'toy.yaml'}:8",
    ]
    assert all(isinstance(error, StageError) for error in caught.value.errors)
    assert caught.value.exit_code == 3


def states(plan: Plan) -> dict[str, str]:
    return {step.id: step.state for step in plan.steps}


def forget(bench: Bench, *steps: str) -> None:
    import shutil

    for entry in bench.workspace.entries():
        if entry.step in steps:
            shutil.rmtree(entry.folder)


def test_only_what_is_needed_is_built(bench: Bench) -> None:
    bench.build()
    assert set(states(bench.plan()).values()) == {"hit"}
    assert states(bench.plan(RECIPE, None, "int4.bits=8")) == {
        "onnx": "hit",
        "int4": "build",
        "int4.onnx": "build",
        "tokens": "hit",
        "check": "build",
    }
    forget(bench, "onnx", "int4", "tokens")
    assert states(bench.plan()) == {
        "onnx": "unneeded",
        "int4": "unneeded",
        "int4.onnx": "hit",
        "tokens": "unneeded",
        "check": "hit",
    }
    forget(bench, "int4.onnx")
    assert states(bench.plan()) == {
        "onnx": "build",
        "int4": "build",
        "int4.onnx": "build",
        "tokens": "unneeded",
        "check": "hit",
    }


def test_output_that_nothing_takes_is_not_built(bench: Bench) -> None:
    text = RECIPE.replace("  - {id: int4", "  - {id: extra, uses: export-onnx}\n  - {id: int4")
    plan = bench.plan(text.replace("quantize,", "quantize, from: onnx,"))
    assert states(plan)["extra"] == "unneeded"
    assert len(plan.warnings) == 1


def test_planning_touches_nothing(bench: Bench) -> None:
    bench.plan()
    assert not bench.workspace.artifacts.exists()
    assert not bench.out.exists()


class Large(WriteOnnx):
    """Estimates more than any machine has."""

    def __init__(self, **estimate: int) -> None:
        super().__init__()
        self._estimate = Estimate(**estimate)

    def estimate(self, params: Any, config: Any, inputs: Any) -> Estimate:
        return self._estimate


def test_a_build_needs_the_disk_of_all_steps_and_the_memory_of_one(bench: Bench) -> None:
    class SmallExport(Export):
        def estimate(self, params: Any, config: Any, inputs: Any) -> Estimate:
            return Estimate(disk_bytes=7, ram_bytes=50)

    large = Large(disk_bytes=100, ram_bytes=30)
    stages = registry(export_onnx=SmallExport(), write_onnx=large)
    plan = bench.plan(RECIPE, stages)
    assert (plan.disk_bytes, plan.ram_bytes) == (107, 50)
    assert plan.step("int4").estimate is None
    found = as_json(plan)
    assert (found["disk_bytes"], found["ram_bytes"]) == (107, 50)
    bench.build(RECIPE, stages)
    done = bench.plan(RECIPE, stages)
    assert (done.disk_bytes, done.ram_bytes) == (0, 0), "only what is still to be built counts"


def test_tools_are_named_in_the_same_order_by_every_process(bench: Bench) -> None:
    names = ("rich", "onnx", "numpy", "click", "pydantic", "pyyaml", "jinja2", "psutil")

    class Tools(Export):
        def tools(self) -> tuple[str, ...]:
            return names

    tools = bench.plan(RECIPE, registry(export_onnx=Tools())).tools
    assert list(tools) == sorted({*names, *bench.plan().tools})
    assert tools["numpy"] == machine.version("numpy")


@pytest.mark.parametrize(
    ("estimate", "message"),
    [
        # Once: the output takes what the workspace holds.
        ({"disk_bytes": 10**18}, "about 1000000.0 TB of disk is needed, "),
        ({"ram_bytes": 10**18}, "about 1000000.0 TB of memory is needed, this machine has "),
    ],
)
def test_too_little_disk_or_memory_is_said_before_any_work(
    bench: Bench, estimate: dict[str, int], message: str
) -> None:
    stages = registry(write_onnx=Large(**estimate))
    with pytest.raises(EnvironmentLacksError) as caught:
        bench.build(RECIPE, stages)
    assert caught.value.message.startswith(message)
    assert caught.value.exit_code == 5
    assert bench.workspace.entries() == []


def test_space_for_the_output_counts_where_it_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = bench.plan(RECIPE, registry(write_onnx=Large(disk_bytes=100)))
    monkeypatch.setattr("phiconv.preflight.same_device", lambda one, other: False)
    monkeypatch.setattr(
        "phiconv.preflight.free_bytes", lambda path: 99 if path == bench.out else 101
    )
    with pytest.raises(EnvironmentLacksError, match="100 B of disk is needed, 99 B is free"):
        preflight([(plan, bench.out)], bench.workspace)


def test_a_missing_requirement_ends_the_build_unless_it_is_optional(bench: Bench) -> None:
    (bench.folder / "mark.txt").write_text("x")
    setting = "mark.provider=DmlExecutionProvider"
    with pytest.raises(PhiconvError) as caught:
        bench.build(STAMPED, None, setting)
    assert caught.value.exit_code == 5
    assert caught.value.message == "stage 'mark' needs DmlExecutionProvider, which is not present"
    assert caught.value.remedy == "buy one"
    assert bench.workspace.entries() == []

    class WithoutIt(type(registry()["stamp"])):  # type: ignore[misc]
        def requires(self, params: Any) -> Any:
            return tuple(
                type(item)(item.kind, item.name, optional=True) for item in super().requires(params)
            )

    plan = bench.plan(STAMPED, registry(stamp=WithoutIt()), setting)
    assert lacking(plan) == []
    assert "missing: DmlExecutionProvider, stage 'mark' goes on without" in plan_text(plan)


def test_a_plan_can_be_read_and_parsed(bench: Bench) -> None:
    plan = bench.plan()
    text = plan_text(plan)
    for step in plan.steps:
        assert step.id in text
        assert step.key[:12] in text
    assert "needs about 3.1 KB of disk" in text
    document = json.loads(json.dumps(as_json(plan)))
    assert [step["state"] for step in document["steps"]] == ["build"] * 5
    assert document["steps"][0]["key"] == plan.steps[0].key
