"""Stage `export-onnx`: a checkpoint becomes a lazy ONNX graph for one execution provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from phiconv.errors import PhiconvError, RecipeError
from phiconv.stages.stage import JSON, ONNX_GRAPH, Requirement, StageContext

if TYPE_CHECKING:
    from phiconv.checkpoint import ModelConfig

# What ONNX Runtime's attention operators accept with a KV cache, by provider. The GenAI builder
# lays out the other combinations with operators that have no cache or no kernel.
SUPPORTED = {"cpu": ("fp32",), "cuda": ("fp16",), "dml": ("fp16",)}


class ExportOnnxParams(BaseModel):
    """Parameters of `export-onnx`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    provider: Literal["cpu", "cuda", "dml"] = Field(
        "cpu", description="Execution provider that the graph is laid out for."
    )
    precision: Literal["fp32", "fp16"] | None = Field(
        None,
        description="Type of inputs, outputs and activations: fp32 for cpu, fp16 for cuda and dml "
        "(the default). A cast stage turns the cpu graph into fp16.",
    )

    def resolved_precision(self) -> Literal["fp32", "fp16"]:
        """The precision, with the provider's default filled in."""
        return self.precision or ("fp32" if self.provider == "cpu" else "fp16")


class ExportOnnx:
    """Lays out the graph; reads no weight data.

    The weights of a quantized checkpoint (AutoAWQ, GPTQ) become MatMulNBits at once, whose integers
    are the checkpoint's own.
    """

    name: ClassVar[str] = "export-onnx"
    version: ClassVar[int] = 1
    params: ClassVar[type[ExportOnnxParams]] = ExportOnnxParams
    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = ONNX_GRAPH

    def tools(self) -> tuple[str, ...]:
        return ("onnxruntime-genai", "transformers", "tokenizers", "onnx-ir")

    def check(self, params: ExportOnnxParams, config: ModelConfig) -> list[PhiconvError]:
        precision = params.resolved_precision()
        if precision in SUPPORTED[params.provider]:
            return []
        wanted = " or ".join(SUPPORTED[params.provider])
        return [
            RecipeError(
                f"precision {precision} has no attention with a KV cache on provider "
                f"{params.provider}",
                where="export-onnx: precision",
                remedy=f"use precision {wanted}"
                + (" and a cast stage after it" if params.provider == "cpu" else ""),
            )
        ]

    def key_params(self, params: ExportOnnxParams) -> dict[str, JSON]:
        return {"provider": params.provider, "precision": params.resolved_precision()}

    def requires(self, params: ExportOnnxParams) -> tuple[Requirement, ...]:
        remedy = "pip install 'phiconv[cpu]' (or [cuda], [dml])"
        return (Requirement("module", "onnxruntime_genai", remedy=remedy),)

    def preload(self) -> None:
        """Imports torch, transformers and the builder."""
        from phiconv.onnx.builder import import_builder

        import_builder()

    def run(self, params: ExportOnnxParams, ctx: StageContext) -> dict[str, JSON]:
        from phiconv.onnx.builder import build_graph
        from phiconv.onnx.graph import GENAI_FOLDER
        from phiconv.onnx.quantize import take_codes

        graph = build_graph(
            ctx.checkpoint,
            provider=params.provider,
            precision=params.resolved_precision(),
            genai=ctx.out / GENAI_FOLDER,
        )
        copied = take_codes(graph, ctx.checkpoint)
        graph.save(ctx.out)
        facts: dict[str, JSON] = {"nodes": len(graph.model.graph), "weights": len(graph.weights)}
        if copied:
            facts["copied_weights"] = copied
        return facts
