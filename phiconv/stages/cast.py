"""Stage `cast`: a lazy fp32 ONNX graph becomes fp16."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from phiconv.errors import PhiconvError, RecipeError
from phiconv.stages.stage import JSON, ONNX_GRAPH, Requirement, StageContext

if TYPE_CHECKING:
    from phiconv.checkpoint import ModelConfig


class CastParams(BaseModel):
    """Parameters of `cast`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    to: Literal["fp16"] = Field("fp16", description="Type of weights, activations and KV cache.")
    overflow: Literal["error", "clamp"] = Field(
        "error",
        description="What happens to weights beyond ±65504, fp16's range: error names every such "
        "tensor and fails; clamp saturates them.",
    )


class Cast:
    """Rewrites the graph's types; the weights are rounded when the model is written."""

    name: ClassVar[str] = "cast"
    version: ClassVar[int] = 1
    params: ClassVar[type[CastParams]] = CastParams
    accepts: ClassVar[tuple[str, ...]] = (ONNX_GRAPH,)
    produces: ClassVar[str] = ONNX_GRAPH

    def tools(self) -> tuple[str, ...]:
        return ("onnx-ir",)

    def check(self, params: CastParams, config: ModelConfig) -> list[PhiconvError]:
        if config.quantization is None:
            return []
        return [
            RecipeError(
                "the checkpoint is quantized already: its graph cannot be cast",
                where="cast",
                remedy="export for cuda or dml, whose graphs are fp16 from the start",
            )
        ]

    def key_params(self, params: CastParams) -> dict[str, JSON]:
        return {"to": params.to, "overflow": params.overflow}

    def requires(self, params: CastParams) -> tuple[Requirement, ...]:
        return ()

    def run(self, params: CastParams, ctx: StageContext) -> dict[str, JSON]:
        from phiconv.onnx.cast import cast_graph
        from phiconv.onnx.graph import OnnxGraph

        graph = OnnxGraph.load(ctx.input(ONNX_GRAPH).path)
        changed = cast_graph(graph, overflow=params.overflow)
        graph.save(ctx.out)
        return {"values": changed}
