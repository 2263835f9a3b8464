"""Stage `export-onnx`: a checkpoint becomes a lazy ONNX graph for one execution provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from phiconv.errors import CheckpointError, PhiconvError, RecipeError
from phiconv.stages.stage import JSON, ONNX_GRAPH, Requirement, StageContext

if TYPE_CHECKING:
    from phiconv.checkpoint import ModelConfig

# What ONNX Runtime's GroupQueryAttention has kernels for, by provider.
SUPPORTED = {"cpu": ("fp32",), "cuda": ("fp16",), "dml": ("fp16",)}

# The MLP's activation, under both of its names.
SILU = ("silu", "swish")


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
    version: ClassVar[int] = 2
    params: ClassVar[type[ExportOnnxParams]] = ExportOnnxParams
    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = ONNX_GRAPH

    def tools(self) -> tuple[str, ...]:
        return ("numpy", "onnx-ir", "tokenizers")

    def check(self, params: ExportOnnxParams, config: ModelConfig) -> list[PhiconvError]:
        return [*_precision_errors(params), *_activation_errors(config)]

    def key_params(self, params: ExportOnnxParams) -> dict[str, JSON]:
        return {"provider": params.provider, "precision": params.resolved_precision()}

    def requires(self, params: ExportOnnxParams) -> tuple[Requirement, ...]:
        return ()

    def preload(self) -> None:
        """Imports onnx_ir, and the kernels with which every graph is written in the end."""
        import phiconv.onnx.export
        import phiconv.onnx.quantize
        import phiconv.onnx.writer  # noqa: F401
        from phiconv.kernels.floats import load_cast

        load_cast()

    def run(self, params: ExportOnnxParams, ctx: StageContext) -> dict[str, JSON]:
        from phiconv.onnx.export import build_graph
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


def _precision_errors(params: ExportOnnxParams) -> list[PhiconvError]:
    precision = params.resolved_precision()
    if precision in SUPPORTED[params.provider]:
        return []
    wanted = " or ".join(SUPPORTED[params.provider])
    return [
        RecipeError(
            f"precision {precision} has no attention with a KV cache on provider {params.provider}",
            where="export-onnx: precision",
            remedy=f"use precision {wanted}"
            + (" and a cast stage after it" if params.provider == "cpu" else ""),
        )
    ]


def _activation_errors(config: ModelConfig) -> list[PhiconvError]:
    if config.hidden_act in SILU:
        return []
    return [
        CheckpointError(
            f"the activation {config.hidden_act!r} is not exported to ONNX",
            where="config.json: hidden_act",
            remedy="phiconv exports silu, which every published Phi-3 and Phi-4 has",
        )
    ]
