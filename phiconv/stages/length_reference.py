"""Stage `length-reference`: the reference on both sides of the model's boundaries of length.

The plan adds it wherever a validation asks for length probes; all of a checkpoint share one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from phiconv.errors import PhiconvError
from phiconv.stages.reference import Reference, TokenSetParams, check_tokens
from phiconv.stages.stage import (
    JSON,
    LENGTH_REFERENCE,
    Estimate,
    InputRef,
    Requirement,
    StageContext,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phiconv.checkpoint import ModelConfig

# The least a token set can be asked for; the lengths follow from the model.
_ONE_WINDOW = {"windows": 1, "window_length": 2}


class LengthReference:
    """Runs the model on texts that end at and beyond each boundary within reach."""

    name: ClassVar[str] = "length-reference"
    version: ClassVar[int] = 2
    params: ClassVar[type[TokenSetParams]] = TokenSetParams
    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = LENGTH_REFERENCE

    def tools(self) -> tuple[str, ...]:
        return ("tokenizers", "torch", "transformers")

    def check(self, params: TokenSetParams, config: ModelConfig) -> list[PhiconvError]:
        return check_tokens(params.model_copy(update=_ONE_WINDOW), config, self.name)

    def key_params(self, params: TokenSetParams) -> dict[str, JSON]:
        """Texts and device: windows are as long as the boundaries demand."""
        from phiconv.texts import texts_key

        return {
            "text_digest": texts_key(params.tokens, "validation"),
            "reference_device": params.reference_device,
        }

    def requires(self, params: TokenSetParams) -> tuple[Requirement, ...]:
        return Reference().requires(params)

    def estimate(
        self, params: TokenSetParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> Estimate:
        """As the reference of one window of the greatest length."""
        from phiconv.runtimes.length_reference import probe_length, probed_boundaries

        lengths = [probe_length(config, found) for found in probed_boundaries(config)]
        longest = {"windows": 1, "window_length": max(lengths, default=2)}
        return Reference().estimate(params.model_copy(update=longest), config, inputs)

    def run(self, params: TokenSetParams, ctx: StageContext) -> dict[str, JSON]:
        from phiconv.runtimes.length_reference import (
            compute,
            probe_length,
            probed_boundaries,
            save,
        )
        from phiconv.tokens import load_token_set

        config = ctx.checkpoint.config
        found = probed_boundaries(config)
        lengths = [probe_length(config, boundary) for boundary in found]
        done = sum(lengths) + sum(b.position for b in found if b.kind == "LongRoPE switch")
        ctx.progress.start(done * config.num_hidden_layers, "tokens x layers")
        references = []
        for boundary, length in zip(found, lengths, strict=True):
            token_set = load_token_set(
                params.tokens, ctx.checkpoint, windows=1, window_length=length
            )
            references.append(
                compute(
                    ctx.checkpoint,
                    boundary,
                    token_set.windows[0],
                    device=params.reference_device,
                    threads=ctx.threads,
                    advance=ctx.progress.advance,
                )
            )
        save(ctx.out, references)
        return {"boundaries": ", ".join(f"{b.kind} at {b.position}" for b in found) or "none"}
