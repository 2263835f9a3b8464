"""Stage `export-awq`: a checkpoint in AutoAWQ's format, from what the stage awq found."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from phiconv.errors import PhiconvError, RecipeError
from phiconv.stages.overlaid import overlay_params
from phiconv.stages.stage import (
    AWQ_CHECKPOINT,
    JSON,
    OVERLAY,
    Estimate,
    InputRef,
    Requirement,
    StageContext,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phiconv.checkpoint import ModelConfig

_UNITS = {"MB": 10**6, "GB": 10**9}
_OUTPUTS_PER_ITEM = 8
# Interpreter and numba, and a few matrices as codes.
_RAM_BYTES = 500 << 20


class ExportAwqParams(BaseModel):
    """Parameters of `export-awq`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    search: Literal["none", "mse"] = Field(
        "none", description="How a group's scale is chosen: set as in awq and quantize."
    )
    max_shard_size: str = Field(
        "5GB",
        pattern=r"^[1-9][0-9]*(MB|GB)$",
        description="The longest weight file, as transformers' save_pretrained takes it.",
    )

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return int(self.max_shard_size[:-2]) * _UNITS[self.max_shard_size[-2:]]


class ExportAwq:
    """Quantizes while it reads and writes the weight files, one matrix in memory."""

    name: ClassVar[str] = "export-awq"
    version: ClassVar[int] = 1
    params: ClassVar[type[ExportAwqParams]] = ExportAwqParams
    accepts: ClassVar[tuple[str, ...]] = (OVERLAY,)
    produces: ClassVar[str] = AWQ_CHECKPOINT

    def tools(self) -> tuple[str, ...]:
        return ()

    def check(self, params: ExportAwqParams, config: ModelConfig) -> list[PhiconvError]:
        query = config.num_attention_heads * config.head_dim
        key_value = config.num_key_value_heads * config.head_dim
        outputs = {
            "the rows of queries": query,
            "those of keys or values": key_value,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
        }
        return [
            RecipeError(
                f"{name} ({count}) is not a multiple of {_OUTPUTS_PER_ITEM}, which AutoAWQ packs",
                where=self.name,
                remedy="use another format for this model",
            )
            for name, count in outputs.items()
            if count % _OUTPUTS_PER_ITEM
        ]

    def check_fit(
        self, params: ExportAwqParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> list[PhiconvError]:
        """AutoAWQ's format has 4 bits."""
        overlay = overlay_params(inputs)
        if overlay is None or overlay.bits == 4:
            return []
        return [
            RecipeError(
                f"AutoAWQ's format has 4 bits, the overlay is made for {overlay.bits}",
                where=self.name,
                remedy="set bits: 4 in the stage awq",
            )
        ]

    def key_params(self, params: ExportAwqParams) -> dict[str, JSON]:
        return {"search": params.search, "shard_bytes": params.shard_bytes}

    def requires(self, params: ExportAwqParams) -> tuple[Requirement, ...]:
        return ()

    def preload(self) -> None:
        """Imports the kernels."""
        import phiconv.awq.checkpoint_writer  # noqa: F401

    def estimate(
        self, params: ExportAwqParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> Estimate:
        """Half a byte a weight and its group's scale; embedding and head in fp16."""
        overlay = overlay_params(inputs)
        group_size = overlay.group_size if overlay is not None else 128
        shapes = config.expected_tensors()
        body = sum(
            rows * columns
            for name, (rows, *rest) in shapes.items()
            for columns in rest
            if name.startswith("model.layers.")
        )
        heads = 1 if config.tie_word_embeddings else 2
        size = (
            body / 2 + body / group_size * 2.5 + 2 * heads * config.vocab_size * config.hidden_size
        )
        return Estimate(disk_bytes=int(size), ram_bytes=_RAM_BYTES)

    def run(self, params: ExportAwqParams, ctx: StageContext) -> dict[str, JSON]:
        from phiconv.awq.checkpoint_writer import write_awq_checkpoint
        from phiconv.checkpoint.overlaid import OverlaidCheckpoint
        from phiconv.checkpoint.overlay import Overlay

        overlay = Overlay.load(ctx.input(OVERLAY).path)
        written = write_awq_checkpoint(
            OverlaidCheckpoint(ctx.checkpoint, overlay, clip=False),
            ctx.out,
            search=params.search,
            shard_bytes=params.shard_bytes,
            threads=ctx.threads,
            progress=ctx.progress,
        )
        return {
            "bytes": written.nbytes,
            "quantized_weights": written.quantized,
            "shards": written.shards,
        }
