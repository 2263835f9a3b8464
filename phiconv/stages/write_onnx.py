"""Stage `write-onnx`: a lazy ONNX graph becomes the folder that ships."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from phiconv.errors import PhiconvError
from phiconv.stages.stage import JSON, ONNX, ONNX_GRAPH, Requirement, StageContext

if TYPE_CHECKING:
    from phiconv.checkpoint import ModelConfig


class WriteOnnxParams(BaseModel):
    """`write-onnx` has no parameters: all that shapes the bytes is in the graph."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WriteOnnx:
    """Computes every weight once and writes model, external data and side files."""

    name: ClassVar[str] = "write-onnx"
    version: ClassVar[int] = 1
    params: ClassVar[type[WriteOnnxParams]] = WriteOnnxParams
    accepts: ClassVar[tuple[str, ...]] = (ONNX_GRAPH,)
    produces: ClassVar[str] = ONNX

    def tools(self) -> tuple[str, ...]:
        return ("onnx-ir",)

    def check(self, params: WriteOnnxParams, config: ModelConfig) -> list[PhiconvError]:
        return []

    def key_params(self, params: WriteOnnxParams) -> dict[str, JSON]:
        return {}

    def requires(self, params: WriteOnnxParams) -> tuple[Requirement, ...]:
        return ()

    def run(self, params: WriteOnnxParams, ctx: StageContext) -> dict[str, JSON]:
        import shutil

        from phiconv.onnx.graph import DATA_FILE, GENAI_FOLDER, OnnxGraph
        from phiconv.onnx.writer import write_model

        folder = ctx.input(ONNX_GRAPH).path
        graph = OnnxGraph.load(folder)
        written = write_model(
            graph, ctx.checkpoint, ctx.out, threads=ctx.threads, progress=ctx.progress
        )
        ctx.record_digest(DATA_FILE, written.data_sha256)
        shutil.copytree(folder / GENAI_FOLDER, ctx.out, dirs_exist_ok=True)
        shutil.copyfile(ctx.checkpoint.path / "config.json", ctx.out / "config.json")
        return {
            "data_bytes": written.data_bytes,
            "source_bytes": written.source_bytes,
            "tensors": written.tensors,
        }
