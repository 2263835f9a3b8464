"""Stage `write-onnx`: a lazy ONNX graph becomes the folder that ships."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from phiconv.errors import PhiconvError
from phiconv.stages.cast import CastParams
from phiconv.stages.export_onnx import ExportOnnxParams
from phiconv.stages.quantize import QuantizeParams, WeightParams
from phiconv.stages.stage import (
    JSON,
    ONNX,
    ONNX_GRAPH,
    OVERLAY,
    Estimate,
    InputRef,
    Requirement,
    StageContext,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phiconv.checkpoint import ModelConfig

# Interpreter, numba and onnx_ir, and the buffers of a few threads.
_RAM_BYTES = 700 << 20


class WriteOnnxParams(BaseModel):
    """`write-onnx` has no parameters: all that shapes the bytes is in the graph."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WriteOnnx:
    """Computes every weight once and writes model, external data and side files."""

    name: ClassVar[str] = "write-onnx"
    version: ClassVar[int] = 3
    params: ClassVar[type[WriteOnnxParams]] = WriteOnnxParams
    accepts: ClassVar[tuple[str, ...]] = (ONNX_GRAPH,)
    accepts_also: ClassVar[tuple[str, ...]] = (OVERLAY,)
    produces: ClassVar[str] = ONNX

    def tools(self) -> tuple[str, ...]:
        return ("onnx-ir",)

    def check(self, params: WriteOnnxParams, config: ModelConfig) -> list[PhiconvError]:
        return []

    def key_params(self, params: WriteOnnxParams) -> dict[str, JSON]:
        return {}

    def requires(self, params: WriteOnnxParams) -> tuple[Requirement, ...]:
        return ()

    def estimate(
        self, params: WriteOnnxParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> Estimate:
        """Bytes of the weights in the formats that the steps before chose."""
        graph = next(ref for ref in inputs if ref.kind != OVERLAY)
        weights, _ = artifact_bytes(config, graph.made_by)
        return Estimate(disk_bytes=weights, ram_bytes=_RAM_BYTES)

    def run(self, params: WriteOnnxParams, ctx: StageContext) -> dict[str, JSON]:
        import shutil

        from phiconv.onnx.graph import DATA_FILE, GENAI_FOLDER, OnnxGraph
        from phiconv.onnx.writer import write_model
        from phiconv.stages.overlaid import check_overlay, weight_source

        folder = ctx.input(ONNX_GRAPH).path
        graph = OnnxGraph.load(folder)
        check_overlay(graph, ctx)
        written = write_model(
            graph, weight_source(ctx), ctx.out, threads=ctx.threads, progress=ctx.progress
        )
        ctx.record_digest(DATA_FILE, written.data_sha256)
        shutil.copytree(folder / GENAI_FOLDER, ctx.out, dirs_exist_ok=True)
        shutil.copyfile(ctx.checkpoint.path / "config.json", ctx.out / "config.json")
        return {
            "data_bytes": written.data_bytes,
            "source_bytes": written.source_bytes,
            "tensors": written.tensors,
        }


def artifact_bytes(config: ModelConfig, made_by: Sequence[tuple[str, Any]]) -> tuple[int, int]:
    """Bytes of an artifact's weights, and of the embedding among them; overrides left out.

    Args:
        config: The checkpoint's.
        made_by: The steps that chose the formats, see `phiconv.stages.stage.InputRef`.
    """
    item_bytes = 4.0
    quantized: QuantizeParams | None = None
    for _, before in made_by:
        match before:
            case ExportOnnxParams():
                item_bytes = 4.0 if before.resolved_precision() == "fp32" else 2.0
            case CastParams():
                item_bytes = 2.0
            case QuantizeParams():
                quantized = before
    shapes = config.expected_tensors()
    embedding = config.vocab_size * config.hidden_size
    matrices = {name: rows * k for name, (rows, *rest) in shapes.items() for k in rest}
    body = sum(count for name, count in matrices.items() if name.startswith("model.layers."))
    head_bytes = body_bytes = embedding_bytes = item_bytes
    if quantized is not None:
        body_bytes = _bytes_per_weight(quantized, None, item_bytes)
        head_bytes = _bytes_per_weight(quantized, quantized.lm_head, item_bytes)
        settings = quantized.embedding or WeightParams(keep_float=True)
        embedding_bytes = _bytes_per_weight(quantized, settings, item_bytes)
    if (stored := config.quantization) is not None:
        scale_bytes = item_bytes + stored.bits / 8
        body_bytes = stored.bits / 8 + scale_bytes / max(stored.group_size, 16)
    total = body * body_bytes + embedding * (head_bytes + embedding_bytes)
    return int(total), int(embedding * embedding_bytes)


def _bytes_per_weight(
    params: QuantizeParams, settings: WeightParams | None, scale_bytes: float
) -> float:
    """Packed integer, its share of a scale, and of a zero point."""
    if settings is not None and settings.keep_float:
        return scale_bytes
    bits = (settings and settings.bits) or params.bits
    block_size = (settings and settings.block_size) or params.block_size
    return bits / 8 + scale_bytes / block_size + (0 if params.symmetric else bits / 8 / block_size)
