"""Stage `reference`: the Hugging Face model in fp32 over a token set, as final hidden states.

The plan adds it wherever a validation needs it; every validation of a checkpoint on the same
tokens shares one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from phiconv.errors import PhiconvError, RecipeError
from phiconv.stages.stage import (
    JSON,
    REFERENCE,
    Estimate,
    InputRef,
    Requirement,
    StageContext,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phiconv.checkpoint import ModelConfig

# What Python, torch and transformers take before the first weight is read.
INTERPRETER_BYTES = 600 << 20


class TokenSetParams(BaseModel):
    """Which tokens a measurement is made on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: str = Field(
        "default",
        min_length=1,
        description="default for the held-out texts that ship with phiconv, or a .jsonl, .json or "
        "text file (JSON: objects with a string text), relative to the recipe's folder, or "
        "hub:ORG/NAME@COMMIT/FILE for a .jsonl, .json or .txt file of a dataset.",
    )
    windows: int = Field(8, ge=1, description="How many windows, spread evenly over the texts.")
    window_length: int = Field(512, ge=2, description="Tokens a window.")
    reference_device: Literal["cpu", "cuda"] = Field(
        "cpu", description="Where the fp32 reference is computed."
    )

    @field_validator("tokens")
    @classmethod
    def _beside_the_recipe(cls, value: str, info: ValidationInfo) -> str:
        folder = (info.context or {}).get("folder")
        if value == "default" or value.startswith("hub:") or folder is None:
            return value
        return str(Path(folder) / value)


def check_tokens(
    params: TokenSetParams,
    config: ModelConfig,
    where: str,
    packaged: Literal["validation", "calibration"] = "validation",
) -> list[PhiconvError]:
    """Finds an unreadable token file, or windows longer than the model's context."""
    from phiconv.texts import check_texts

    errors: list[PhiconvError] = []
    try:
        check_texts(params.tokens, packaged)
    except RecipeError as error:
        errors.append(error)
    if params.window_length > config.max_position_embeddings:
        errors.append(
            RecipeError(
                f"window_length {params.window_length} exceeds the model's context of "
                f"{config.max_position_embeddings}",
                where=f"{where}: window_length",
                remedy=f"set it to at most {config.max_position_embeddings}",
            )
        )
    return errors


def key_of_tokens(
    params: TokenSetParams, packaged: Literal["validation", "calibration"] = "validation"
) -> dict[str, JSON]:
    """What of a token set enters a cache key; asks the Hub nothing."""
    from phiconv.texts import texts_key

    return {
        "text_digest": texts_key(params.tokens, packaged),
        "windows": params.windows,
        "window_length": params.window_length,
        "reference_device": params.reference_device,
    }


class Reference:
    """Runs the model layer by layer; peak memory is about one layer and the activations."""

    name: ClassVar[str] = "reference"
    version: ClassVar[int] = 2
    params: ClassVar[type[TokenSetParams]] = TokenSetParams
    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = REFERENCE

    def tools(self) -> tuple[str, ...]:
        return ("tokenizers", "torch", "transformers")

    def check(self, params: TokenSetParams, config: ModelConfig) -> list[PhiconvError]:
        return check_tokens(params, config, self.name)

    def key_params(self, params: TokenSetParams) -> dict[str, JSON]:
        return key_of_tokens(params)

    def requires(self, params: TokenSetParams) -> tuple[Requirement, ...]:
        return (
            Requirement("module", "torch", remedy="pip install torch"),
            Requirement("module", "transformers", remedy="pip install transformers"),
        )

    def preload(self) -> None:
        """Imports torch and transformers' Phi-3."""
        import tokenizers  # noqa: F401

        from phiconv.runtimes.reference import modeling_module

        modeling_module()

    def estimate(
        self, params: TokenSetParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> Estimate:
        """One layer in fp32, its largest tensor as stored, and the activations."""
        stream = params.windows * params.window_length * config.hidden_size * 4
        attention = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        layer = 4 * config.hidden_size * (2 * attention + 3 * config.intermediate_size)
        batch = max(1024, params.window_length) * 3 * config.intermediate_size * 4
        return Estimate(
            disk_bytes=stream, ram_bytes=INTERPRETER_BYTES + 2 * layer + 2 * stream + batch
        )

    def run(self, params: TokenSetParams, ctx: StageContext) -> dict[str, JSON]:
        import torch
        import transformers

        from phiconv.runtimes.reference import final_hidden_states
        from phiconv.runtimes.stored_reference import save_reference
        from phiconv.tokens import load_token_set

        token_set = load_token_set(
            params.tokens,
            ctx.checkpoint,
            windows=params.windows,
            window_length=params.window_length,
        )
        layers = ctx.checkpoint.config.num_hidden_layers
        ctx.progress.start(token_set.windows.size * layers, "tokens x layers")
        hidden = final_hidden_states(
            ctx.checkpoint,
            token_set.windows,
            device=params.reference_device,
            threads=ctx.threads,
            advance=ctx.progress.advance,
        )
        save_reference(
            ctx.out,
            hidden,
            token_set,
            device=params.reference_device,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )
        return {
            "tokens": int(token_set.windows.size),
            "available_tokens": token_set.available_tokens,
            "ids_digest": token_set.ids_digest,
        }
