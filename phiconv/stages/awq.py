"""Stage `awq`: scales, clip limits or GPTQ codes that keep a quantized model close to its source.

One calibration makes an overlay of a few megabytes, which `quantize`, `convert-gguf` and
`export-awq` apply while they read the checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from phiconv import machine
from phiconv.errors import PhiconvError, RecipeError
from phiconv.stages.autoawq import REQUIREMENTS, check_autoawq, run_autoawq
from phiconv.stages.reference import INTERPRETER_BYTES, Reference, TokenSetParams, check_tokens
from phiconv.stages.stage import (
    JSON,
    OVERLAY,
    Estimate,
    InputRef,
    Requirement,
    StageContext,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from phiconv.awq.layer import Settings
    from phiconv.checkpoint import ModelConfig
    from phiconv.tokens import TokenSet


class CalibrationParams(TokenSetParams):
    """On what the inputs of the weights are measured."""

    tokens: str = Field(
        "default",
        min_length=1,
        description="default for the calibration texts that ship with phiconv, or a .jsonl, .json "
        "or text file (JSON: objects with a string text, or messages), relative to the recipe's "
        "folder, or hub:ORG/NAME@COMMIT/FILE for a .jsonl, .json or .txt file of a dataset.",
    )
    chat: bool = Field(
        False, description="Put each text into the checkpoint's chat template, as the user's."
    )
    windows: int = Field(128, ge=1, description="How many windows, spread evenly over the texts.")
    gram_tokens: int = Field(
        16384,
        ge=1,
        description="Tokens, spread evenly over the windows, on which products of inputs are "
        "summed; means are taken over all.",
    )
    compute: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Dtype of the products with the weights while the model runs; bf16 is several "
        "times as fast on processors that have it.",
    )


class AwqParams(BaseModel):
    """Parameters of `awq`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["phiconv", "autoawq"] = Field(
        "phiconv",
        description="Who searches: phiconv, or the package AutoAWQ where it is installed, which "
        "takes far longer and the whole model in memory.",
    )
    bits: Literal[4, 8] = Field(4, description="Bits of a weight on the grid that is aimed at.")
    group_size: Literal[16, 32, 64, 128, 256] = Field(
        128, description="Input features that share a scale there: quantize's block_size."
    )
    symmetric: bool = Field(False, description="Without (true) or with (false) zero points.")
    search: Literal["none", "mse"] = Field(
        "mse",
        description="How a group's scale is chosen: with rounding nearest set as in quantize, and "
        "by default none as there.",
    )
    scale: bool = Field(True, description="Scale input channels (AWQ); false leaves them.")
    clip: bool = Field(
        True, description="Search clip limits; they are used with rounding nearest only."
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "gptq",
        description="gptq makes the codes here; nearest leaves rounding to quantize. By default "
        "nearest with backend autoawq.",
    )
    damping: float = Field(
        0.01, gt=0, lt=1, description="Share of the Gram matrix's diagonal that GPTQ adds to it."
    )
    calibration: CalibrationParams = Field(
        default_factory=lambda: CalibrationParams.model_validate({}),
        description="On what the inputs of the weights are measured.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        """What depends on other keys, where it is left out."""
        if not isinstance(given, Mapping):
            return given
        by_backend = "nearest" if given.get("backend") == "autoawq" else "gptq"
        rounding = given.get("rounding", by_backend)
        search = "mse" if rounding == "gptq" else "none"
        return {"rounding": rounding, "search": search, **given}


class Awq:
    """Runs the model layer by layer and searches each layer on the products of its inputs."""

    name: ClassVar[str] = "awq"
    version: ClassVar[int] = 1
    params: ClassVar[type[AwqParams]] = AwqParams
    accepts: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[str] = OVERLAY

    def tools(self) -> tuple[str, ...]:
        return ("numba", "numpy", *Reference().tools())

    def check(self, params: AwqParams, config: ModelConfig) -> list[PhiconvError]:
        errors = check_tokens(params.calibration, config, "awq: calibration", "calibration")
        if config.quantization is not None:
            errors.append(
                RecipeError(
                    "the checkpoint's weights are integers already",
                    where="awq",
                    remedy="take the checkpoint that this one was quantized from",
                )
            )
        if params.backend == "autoawq":
            errors += check_autoawq(params, config)
        widths = {
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads x head_dim": config.num_attention_heads * config.head_dim,
        }
        errors += [
            RecipeError(
                f"{name} {width} is not a multiple of group_size {params.group_size}",
                where="awq: group_size",
                remedy="choose a group_size that divides it",
            )
            for name, width in widths.items()
            if width % params.group_size
        ]
        return errors

    def key_params(self, params: AwqParams) -> dict[str, JSON]:
        from phiconv.texts import texts_key

        texts = texts_key(params.calibration.tokens, "calibration")
        document: dict[str, JSON] = params.model_dump(mode="json", exclude={"calibration"})
        calibration: dict[str, JSON] = params.calibration.model_dump(
            mode="json", exclude={"tokens"}
        )
        if params.backend == "autoawq":
            document["autoawq"] = machine.version("autoawq")
        return {**document, "calibration": {**calibration, "texts": texts}}

    def requires(self, params: AwqParams) -> tuple[Requirement, ...]:
        needed = Reference().requires(params.calibration)
        return (*needed, *REQUIREMENTS) if params.backend == "autoawq" else needed

    def estimate(
        self, params: AwqParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> Estimate:
        """The residual stream, the statistics of a layer, and its largest weight being searched."""
        hidden, intermediate = config.hidden_size, config.intermediate_size
        attention = config.num_attention_heads * config.head_dim
        rows = attention + 2 * config.num_key_value_heads * config.head_dim
        stream = 4 * params.calibration.windows * params.calibration.window_length * hidden
        grams = 4 * (2 * hidden**2 + attention**2 + intermediate**2)
        weights = hidden * (rows + attention + 3 * intermediate)
        largest = hidden * max(2 * intermediate, rows)
        running = 4 * weights + grams
        searching = 2 * weights // 2 + grams + 4 * intermediate**2 + 12 * largest
        codes = weights * params.bits // 8 if params.rounding == "gptq" else 0
        clips = weights // params.group_size if params.clip and not codes else 0
        factors = 4 * (4 * hidden + 2 * (rows + attention) + 4 * intermediate)
        artifact = config.num_hidden_layers * (codes + clips + factors)
        if params.backend == "autoawq":  # the model in fp32, and the inputs of a layer's weights
            model = weights * config.num_hidden_layers + 2 * hidden * config.vocab_size
            features = stream // hidden * (2 * hidden + attention + intermediate)
            return Estimate(artifact, INTERPRETER_BYTES + 4 * model + 2 * stream + features)
        return Estimate(
            disk_bytes=2 * artifact + 2 * stream,
            ram_bytes=INTERPRETER_BYTES + stream + max(running, searching) + codes,
        )

    def run(self, params: AwqParams, ctx: StageContext) -> dict[str, JSON]:
        with tempfile.TemporaryDirectory() as temporary:
            return _calibrate(params, ctx, ctx.unfinished or Path(temporary))


def _calibrate(params: AwqParams, ctx: StageContext, folder: Path) -> dict[str, JSON]:
    from phiconv.awq.calibrate import calibrate
    from phiconv.awq.resume import FinishedLayers
    from phiconv.checkpoint.overlay import CalibrationTokens

    calibration, layers = params.calibration, ctx.checkpoint.config.num_hidden_layers
    token_set = _token_set(calibration, ctx)
    if params.backend == "autoawq":
        return run_autoawq(params, token_set, ctx)
    settings = _settings(params, ctx.threads)
    finished = FinishedLayers(folder, ctx.checkpoint, settings.grid, params.rounding)
    ctx.progress.start(2 * token_set.windows.size * layers, "tokens x layers, run and searched")
    resumed = calibrate(
        ctx.checkpoint,
        token_set.windows,
        settings,
        finished,
        gram_tokens=calibration.gram_tokens,
        compute=calibration.compute,
        device=calibration.reference_device,
        advance=ctx.progress.advance,
    )
    if resumed:
        ctx.progress.note(f"went on from layer {resumed}")
    sampled = min(token_set.windows.size, calibration.gram_tokens)
    tokens = CalibrationTokens(
        token_set.name,
        token_set.ids_digest,
        calibration.windows,
        calibration.window_length,
        sampled,
    )
    overlay = finished.write_overlay(ctx.out, layers, tokens)
    return {
        "tokens": int(token_set.windows.size),
        "ids_digest": token_set.ids_digest,
        "scaled_groups": sum(group.scaled for group in overlay.groups),
        "clipped_weights": len(overlay.clips),
        "rounded_weights": 4 * layers if params.rounding == "gptq" else 0,
    }


def _token_set(params: CalibrationParams, ctx: StageContext) -> TokenSet:
    from phiconv.tokens import load_token_set

    return load_token_set(
        params.tokens,
        ctx.checkpoint,
        windows=params.windows,
        window_length=params.window_length,
        packaged="calibration",
        chat=params.chat,
    )


def _settings(params: AwqParams, threads: int) -> Settings:
    from phiconv.awq.layer import Settings
    from phiconv.checkpoint.weight_source import Grid

    return Settings(
        Grid(params.bits, params.group_size, params.symmetric),
        params.rounding,
        params.search,
        scale=params.scale,
        clip=params.clip,
        damping=params.damping,
        threads=threads,
    )
