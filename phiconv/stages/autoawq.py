"""`backend: autoawq` of the stage awq: what it needs, what it cannot do, and its overlay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phiconv.errors import PhiconvError, RecipeError
from phiconv.stages.stage import JSON, Requirement, StageContext

if TYPE_CHECKING:
    from phiconv.checkpoint import ModelConfig
    from phiconv.stages.awq import AwqParams
    from phiconv.tokens import TokenSet

INSTALL = (
    'pip install "phiconv[autoawq]" && pip install --no-deps autoawq==0.2.9 (its dependency triton '
    "is large and not needed), or use backend: phiconv"
)
REQUIREMENTS = tuple(
    Requirement("module", name, remedy=INSTALL)
    for name in ("awq", "accelerate", "datasets", "zstandard")
)


def check_autoawq(params: AwqParams, config: ModelConfig) -> list[PhiconvError]:
    """Finds parameters and models that AutoAWQ cannot do, or does wrongly."""
    wrong = {
        "bits": params.bits != 4 and "AutoAWQ makes 4 bits",
        "rounding": params.rounding != "nearest" and "AutoAWQ only rounds to the nearest",
        # with rounding gptq the default of search is another
        "search": (params.rounding, params.search) == ("nearest", "mse")
        and "AutoAWQ chooses a group's scale by its range",
        "scale": not params.scale and "AutoAWQ always scales",
        "calibration.compute": params.calibration.compute != "fp32" and "AutoAWQ is run in fp32",
    }
    errors: list[PhiconvError] = [
        RecipeError(why, where=f"awq: {key}", remedy="take the key out, or use backend: phiconv")
        for key, why in wrong.items()
        if why
    ]
    if config.num_key_value_heads != config.num_attention_heads:
        errors.append(
            RecipeError(
                f"AutoAWQ corrupts models with grouped queries: it divides the rows of "
                f"{config.num_key_value_heads} value heads by the scales of "
                f"{config.num_attention_heads} query heads",
                where="awq: backend",
                remedy="use backend: phiconv, which ties the scales of a group",
            )
        )
    return errors


def run_autoawq(params: AwqParams, token_set: TokenSet, ctx: StageContext) -> dict[str, JSON]:
    """Writes the overlay of AutoAWQ's scales and clip limits to `ctx.out`.

    Raises:
        EnvironmentLacksError: AutoAWQ cannot be imported.
        StageError: AutoAWQ failed.
    """
    from phiconv.awq.autoawq_backend import search_with_autoawq
    from phiconv.checkpoint.overlay import CalibrationTokens, Overlay
    from phiconv.checkpoint.weight_source import Grid

    tokens = int(token_set.windows.size)
    ctx.progress.start(tokens * ctx.checkpoint.config.num_hidden_layers, "tokens x layers")
    grid = Grid(params.bits, params.group_size, params.symmetric)
    found = search_with_autoawq(
        ctx.checkpoint,
        token_set.windows,
        grid,
        clip=params.clip,
        threads=ctx.threads,
        advance=ctx.progress.advance,
    )
    windows, length = token_set.windows.shape
    Overlay(
        ctx.checkpoint.digest,
        grid,
        columns=found.columns,
        rows=found.rows,
        clips=found.clips,
        groups=tuple(found.records),
        tokens=CalibrationTokens(token_set.name, token_set.ids_digest, windows, length, tokens),
    ).write(ctx.out)
    return {
        "tokens": tokens,
        "ids_digest": token_set.ids_digest,
        "scaled_groups": len(found.columns),
        "clipped_weights": len(found.clips),
        "rounded_weights": 0,
    }
