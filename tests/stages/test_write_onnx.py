from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from phiconv.stages.cast import Cast, CastParams
from phiconv.stages.export_onnx import ExportOnnx, ExportOnnxParams
from phiconv.stages.quantize import Quantize, QuantizeParams
from phiconv.stages.stage import ONNX_GRAPH, Artifact, InputRef, Stage, StageContext
from phiconv.stages.write_onnx import WriteOnnx, WriteOnnxParams
from tests.onnx.models import open_checkpoint
from tests.phi3_checkpoints import write_phi3_checkpoint

STAGES: dict[type[BaseModel], Stage] = {
    ExportOnnxParams: ExportOnnx(),
    CastParams: Cast(),
    QuantizeParams: Quantize(),
}


def params(kind: type[BaseModel], **values: Any) -> BaseModel:
    return kind.model_validate(values)


@pytest.mark.parametrize(
    "chain",
    [
        [params(ExportOnnxParams)],
        [params(ExportOnnxParams, provider="cuda")],
        [params(ExportOnnxParams), params(CastParams)],
        [params(ExportOnnxParams), params(QuantizeParams, lm_head={"bits": 8})],
        [
            params(ExportOnnxParams, provider="dml"),
            params(QuantizeParams, symmetric=False, block_size=128, embedding={"bits": 8}),
        ],
    ],
    ids=["fp32", "fp16", "cast", "int4", "int4-dml"],
)
def test_estimated_size_is_what_is_written(tmp_path: Path, chain: list[BaseModel]) -> None:
    path = write_phi3_checkpoint(
        tmp_path / "checkpoint", hidden_size=256, intermediate_size=512, max_position_embeddings=32
    )
    checkpoint = open_checkpoint(path)
    inputs: list[Artifact] = []
    for index, step in enumerate(chain):
        out = tmp_path / str(index)
        out.mkdir()
        STAGES[type(step)].run(step, StageContext(out, inputs, checkpoint))
        inputs = [Artifact(str(index), ONNX_GRAPH, "", out)]
    out = tmp_path / "written"
    out.mkdir()
    facts = WriteOnnx().run(WriteOnnxParams(), StageContext(out, inputs, checkpoint))

    made_by = tuple((STAGES[type(step)].name, step) for step in chain)
    ref = InputRef("graph", ONNX_GRAPH, "", tmp_path, made_by)
    estimate = WriteOnnx().estimate(WriteOnnxParams(), checkpoint.config, [ref])
    assert isinstance(facts["data_bytes"], int)
    assert estimate.disk_bytes == pytest.approx(facts["data_bytes"], rel=0.05)
    assert (out / "config.json").read_bytes() == (path / "config.json").read_bytes()


def test_side_files_ship_beside_the_model(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_phi3_checkpoint(tmp_path / "checkpoint"))
    graph, out = tmp_path / "graph", tmp_path / "out"
    graph.mkdir()
    out.mkdir()
    ExportOnnx().run(ExportOnnxParams(), StageContext(graph, [], checkpoint))
    context = StageContext(out, [Artifact("graph", ONNX_GRAPH, "", graph)], checkpoint, threads=2)
    WriteOnnx().run(WriteOnnxParams(), context)
    assert sorted(file.name for file in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert set(context.digests) == {"model.onnx.data"}
