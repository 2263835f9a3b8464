"""Overlays in recipes: who takes one, whose key it changes, and what a plan refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict

from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.weight_source import Grid
from phiconv.errors import PhiconvError, StageError
from phiconv.plan import Plan, make_plan
from phiconv.progress import QuietDisplay
from phiconv.recipe.resolve import load
from phiconv.run import Runner
from phiconv.stages.registry import STAGES
from phiconv.stages.stage import (
    JSON,
    ONNX_GRAPH,
    OVERLAY,
    Artifact,
    Requirement,
    Stage,
    StageContext,
)
from phiconv.stages.write_onnx import WriteOnnx, WriteOnnxParams
from phiconv.workspace import Workspace
from phiconv.workspace.session import open_session
from tests.overlays import random_overlay, write_codes

CHAIN: list[dict[str, Any]] = [
    {"id": "scales", "uses": "random-scales"},
    {"id": "onnx", "uses": "export-onnx"},
    {"id": "int4", "uses": "quantize", "from": ["onnx", "scales"], "with": {"symmetric": False}},
]


class RandomScalesParams(BaseModel):
    """Parameters of `random-scales`, by the names of every stage that makes overlays."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    search: Literal["none", "mse"] = "none"
    clip: bool = True
    rounding: Literal["nearest", "gptq"] = "nearest"
    seed: int = 0


class RandomScales:
    """Makes an overlay of random factors."""

    name: ClassVar[str] = "random-scales"
    version: ClassVar[int] = 1
    params: ClassVar[type[RandomScalesParams]] = RandomScalesParams
    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = OVERLAY

    def tools(self) -> tuple[str, ...]:
        return ()

    def check(self, params: RandomScalesParams, config: Any) -> list[PhiconvError]:
        return []

    def key_params(self, params: RandomScalesParams) -> dict[str, JSON]:
        return params.model_dump()

    def requires(self, params: RandomScalesParams) -> tuple[Requirement, ...]:
        return ()

    def run(self, params: RandomScalesParams, ctx: StageContext) -> dict[str, JSON]:
        from dataclasses import replace

        grid = Grid(params.bits, params.group_size, params.symmetric)
        overlay = random_overlay(ctx.checkpoint, grid, clip=params.clip, seed=params.seed)
        overlay = replace(overlay, rounding=params.rounding)
        overlay.write(ctx.out)
        if params.rounding == "gptq":
            write_codes(ctx.out, ctx.checkpoint, overlay)
        return {}


REGISTRY: dict[str, Stage] = {**STAGES, "random-scales": RandomScales()}


@pytest.fixture
def checkpoint(toy_checkpoint: Path) -> Checkpoint:
    return Checkpoint(toy_checkpoint)


def plan(checkpoint: Checkpoint, folder: Path, *stages: dict[str, Any], **changes: Any) -> Plan:
    """A plan of these stages; `changes` are parameters by stage id."""
    uses = [{**stage, "with": {**stage.get("with", {}), **changes.get(stage["id"], {})}}
            for stage in stages]  # fmt: skip
    recipe = {"schema": 1, "name": "x", "model": {"source": str(checkpoint.path)}, "stages": uses}
    file = folder / "x.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return make_plan(
        load(file, registry=REGISTRY), checkpoint, Workspace(folder / "home"), REGISTRY
    )


def test_the_writer_takes_its_graphs_overlay(checkpoint: Checkpoint, tmp_path: Path) -> None:
    cast = {"id": "fp16", "uses": "cast", "from": "onnx"}
    quantize = {**CHAIN[2], "from": ["fp16", "scales"]}
    found = plan(checkpoint, tmp_path, CHAIN[0], CHAIN[1], cast, quantize)
    writer = found.step("int4.onnx")
    assert [ref.id for ref in writer.inputs] == ["int4", "scales"]
    assert writer.estimate is not None and writer.estimate.disk_bytes > 0
    assert found.shipped == "int4.onnx"


def test_a_later_stage_takes_it_too(checkpoint: Checkpoint, tmp_path: Path) -> None:
    head = {"id": "head", "uses": "quantize", "from": "int4", "with": {"overrides": []}}
    explicit = {"id": "written", "uses": "write-onnx", "from": "head"}
    found = plan(checkpoint, tmp_path, *CHAIN, head, explicit, head={"symmetric": False})
    assert [ref.id for ref in found.step("head").inputs] == ["int4", "scales"]
    assert [ref.id for ref in found.step("written").inputs] == ["head", "scales"]


def test_another_overlay_is_another_key(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = plan(checkpoint, tmp_path, *CHAIN)
    other = plan(checkpoint, tmp_path, *CHAIN, scales={"seed": 1})
    same = plan(checkpoint, tmp_path, *CHAIN)
    for name in ("int4", "int4.onnx"):
        assert found.step(name).key == same.step(name).key != other.step(name).key
    assert found.step("onnx").key == other.step("onnx").key


def test_gguf_takes_one_only_when_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    scales, gguf = CHAIN[0], {"id": "gguf", "uses": "convert-gguf", "with": {"file_type": "Q4_0"}}
    plain = plan(checkpoint, tmp_path, scales, gguf)
    assert plain.step("gguf").inputs == ()
    matrix = {"importance": {"windows": 2, "window_length": 48}}
    told = plan(checkpoint, tmp_path, scales, {**gguf, "from": "scales"}, gguf=matrix)
    assert [ref.id for ref in told.step("gguf").inputs] == ["scales", "imatrix"]
    assert told.step("gguf").key_of["checkpoint"] == checkpoint.digest
    other = plan(checkpoint, tmp_path, scales, {**gguf, "from": "scales"}, gguf=matrix,
                 scales={"seed": 1})  # fmt: skip
    assert other.step("gguf").key != told.step("gguf").key
    assert other.step("imatrix").key == told.step("imatrix").key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": {"group_size": 64}}, "made for block_size 64, not 32"),
        ({"scales": {"bits": 8}}, "made for bits 8, not 4"),
        ({"int4": {"symmetric": True}}, "made for symmetric false, not true"),
        ({"scales": {"clip": False, "rounding": "gptq"}, "int4": {"bits": 8}}, "bits 4, not 8"),
        ({"int4": {"symmetric": False, "search": "mse"}}, 'made for search "none", not "mse"'),
        ({"scales": {"search": "mse"}}, 'made for search "mse", not "none"'),
    ],
)
def test_another_grid_is_refused(
    changes: dict[str, Any], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(PhiconvError, match=message) as caught:
        plan(checkpoint, tmp_path, *CHAIN, **changes)
    assert "x.yaml" in str(caught.value)
    assert caught.value.exit_code == 2


def test_what_awq_makes_is_known_to_the_plan(checkpoint: Checkpoint, tmp_path: Path) -> None:
    awq = {"id": "scales", "uses": "awq", "with": {"group_size": 64}}
    with pytest.raises(PhiconvError, match="made for block_size 64, not 32"):
        plan(checkpoint, tmp_path, awq, *CHAIN[1:])
    factors = {"clip": False, "rounding": "nearest"}
    free = plan(checkpoint, tmp_path, awq, *CHAIN[1:], scales=factors)
    assert [ref.id for ref in free.step("int4.onnx").inputs] == ["int4", "scales"]


def test_codes_fit_any_search(checkpoint: Checkpoint, tmp_path: Path) -> None:
    codes = {"rounding": "gptq", "search": "mse"}
    found = plan(checkpoint, tmp_path, *CHAIN, scales=codes)
    assert [ref.id for ref in found.step("int4").inputs] == ["onnx", "scales"]


def test_scales_alone_fit_any_grid(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = plan(
        checkpoint, tmp_path, *CHAIN, scales={"clip": False, "group_size": 128, "search": "mse"}
    )
    assert [ref.id for ref in found.step("int4").inputs] == ["onnx", "scales"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{**CHAIN[2], "from": "scales"}], "needs an input of kind onnx-graph besides overlay"),
        ([{"id": "cast", "uses": "cast", "from": ["onnx", "scales"]}], "takes onnx-graph, but"),
        ([{"id": "matrix", "uses": "imatrix", "from": "scales"}], "reads the checkpoint itself"),
        (
            [
                {"id": "more", "uses": "random-scales", "with": {"seed": 1}},
                CHAIN[2],
                {**CHAIN[2], "id": "again", "from": ["int4", "more"]},
            ],
            "two overlays for one graph: scales, more",
        ),
    ],
)
def test_inputs_that_make_no_sense_are_refused(
    stages: list[dict[str, Any]], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(PhiconvError, match=message):
        plan(checkpoint, tmp_path, *CHAIN[:2], *stages)


def test_builds_copy_codes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = plan(checkpoint, tmp_path, *CHAIN, scales={"rounding": "gptq"})
    with open_session(Workspace(tmp_path / "home")) as session:
        runner = Runner(found, session, 2, QuietDisplay())
        made = runner.ensure(found.step("int4.onnx"))
        facts = runner.made["int4"].entry.facts
    assert facts["copied_weights"] == 2 * 4 + 2
    assert made.entry.path == found.step("int4.onnx").path
    again = plan(checkpoint, tmp_path, *CHAIN, scales={"rounding": "gptq"})
    assert again.step("int4.onnx").state == "hit"


def test_a_graph_is_not_written_without_its_overlay(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = plan(checkpoint, tmp_path, *CHAIN)
    with open_session(Workspace(tmp_path / "home")) as session:
        runner = Runner(found, session, 2, QuietDisplay())
        graph = runner.ensure(found.step("int4")).entry.path
        plain = runner.ensure(found.step("onnx")).entry.path
        overlay = runner.made["scales"].entry.path
        key = found.step("scales").key

    def write(graph: Path, *overlays: Artifact) -> None:
        inputs = [Artifact("graph", ONNX_GRAPH, "", graph), *overlays]
        WriteOnnx().run(WriteOnnxParams(), StageContext(tmp_path, inputs, checkpoint))

    with pytest.raises(StageError, match=f"quantized with the overlay {key[:12]}, but is given no"):
        write(graph)
    with pytest.raises(StageError, match="but is given the overlay 999999999999"):
        write(graph, Artifact("scales", OVERLAY, "9" * 64, overlay))
    with pytest.raises(StageError, match="quantized with no overlay, but is given the overlay"):
        write(plain, Artifact("scales", OVERLAY, key, overlay))
