"""Stage `imatrix`: which inputs of each matrix matter, measured on calibration texts.

The plan adds it where a `convert-gguf` asks for an importance matrix; every conversion of a
checkpoint on the same texts shares one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from phiconv.errors import PhiconvError
from phiconv.stages.reference import Reference, TokenSetParams, check_tokens, key_of_tokens
from phiconv.stages.stage import (
    IMATRIX,
    JSON,
    Estimate,
    InputRef,
    Requirement,
    StageContext,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phiconv.checkpoint import ModelConfig

IMATRIX_FILE = "imatrix.gguf"


class ImatrixParams(TokenSetParams):
    """Parameters of `imatrix`."""

    tokens: str = Field(
        "default",
        min_length=1,
        description="default for the calibration texts that ship with phiconv, or a .jsonl, .json "
        "or text file (JSON: objects with a string text), relative to the recipe's folder, or "
        "hub:ORG/NAME@COMMIT/FILE for a .jsonl, .json or .txt file of a dataset.",
    )
    windows: int = Field(64, ge=1, description="How many windows, spread evenly over the texts.")


class Imatrix:
    """Runs the model layer by layer and writes an importance matrix as llama-imatrix does."""

    name: ClassVar[str] = "imatrix"
    version: ClassVar[int] = 1
    params: ClassVar[type[ImatrixParams]] = ImatrixParams
    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = IMATRIX

    def tools(self) -> tuple[str, ...]:
        return ("gguf", *Reference().tools())

    def check(self, params: ImatrixParams, config: ModelConfig) -> list[PhiconvError]:
        return check_tokens(params, config, self.name)

    def key_params(self, params: ImatrixParams) -> dict[str, JSON]:
        return key_of_tokens(params, "calibration")

    def requires(self, params: ImatrixParams) -> tuple[Requirement, ...]:
        return Reference().requires(params)

    def estimate(
        self, params: ImatrixParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> Estimate:
        """The reference's memory; a float for each column."""
        columns = 3 * config.hidden_size + config.intermediate_size
        ram_bytes = Reference().estimate(params, config, inputs).ram_bytes
        return Estimate(4 * columns * config.num_hidden_layers, ram_bytes)

    def run(self, params: ImatrixParams, ctx: StageContext) -> dict[str, JSON]:
        import numpy as np

        from phiconv.gguf.importance import ImportanceMatrix
        from phiconv.gguf.plan import gguf_names
        from phiconv.runtimes.activations import square_sums
        from phiconv.tokens import load_token_set

        token_set = load_token_set(
            params.tokens,
            ctx.checkpoint,
            windows=params.windows,
            window_length=params.window_length,
            packaged="calibration",
        )
        layers = ctx.checkpoint.config.num_hidden_layers
        ctx.progress.start(token_set.windows.size * layers, "tokens x layers")
        found = square_sums(
            ctx.checkpoint,
            token_set.windows,
            device=params.reference_device,
            threads=ctx.threads,
            advance=ctx.progress.advance,
        )
        names = gguf_names(found, ctx.checkpoint.config)
        matrix = ImportanceMatrix(
            sums={names[weight]: one.sums.astype(np.float32) for weight, one in found.items()},
            counts={names[weight]: one.tokens for weight, one in found.items()},
            datasets=(f"{token_set.name} {token_set.ids_digest}",),
            chunks=len(token_set.windows),
            chunk_size=params.window_length,
        )
        matrix.save(ctx.out / IMATRIX_FILE)
        return {
            "entries": len(found),
            "tokens": int(token_set.windows.size),
            "available_tokens": token_set.available_tokens,
            "ids_digest": token_set.ids_digest,
        }
