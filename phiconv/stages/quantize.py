"""Stage `quantize`: weights of a lazy ONNX graph become group-wise integers (MatMulNBits)."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from phiconv.errors import PhiconvError, RecipeError, StageError
from phiconv.stages.overlaid import check_overlay, overlay_input, overlay_params, weight_source
from phiconv.stages.stage import JSON, ONNX_GRAPH, OVERLAY, InputRef, Requirement, StageContext

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from phiconv.checkpoint import ModelConfig
    from phiconv.checkpoint.weight_source import Grid
    from phiconv.onnx.graph import OnnxGraph
    from phiconv.onnx.quantize import Target, WeightInfo

Bits = Literal[4, 8]
BlockSize = Literal[16, 32, 64, 128, 256]
Search = Literal["none", "mse"]
AccuracyLevel = Literal[0, 1, 2, 3, 4]


class WeightParams(BaseModel):
    """How some weights differ from the rest; a key that is left out keeps the stage's value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep_float: bool = Field(False, description="Leave these weights in floating point.")
    bits: Bits | None = Field(None, description="Bits of a weight.")
    block_size: BlockSize | None = Field(None, description="Input features that share a scale.")
    symmetric: bool | None = Field(None, description="Without stored zero points.")
    search: Search | None = Field(None, description="How a block's scale is chosen.")
    accuracy_level: AccuracyLevel | None = Field(None, description="MatMulNBits attribute.")


class Override(WeightParams):
    """Settings for the weights whose name matches a pattern."""

    match: str = Field(
        description="Pattern (shell style) over the initializer's name, such as "
        "*.mlp.down_proj.*, or the checkpoint tensor's name."
    )


class QuantizeParams(BaseModel):
    """Parameters of `quantize`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits = Field(4, description="Bits of a weight.")
    block_size: BlockSize = Field(
        32, description="Number of consecutive input features that share one scale."
    )
    symmetric: bool = Field(True, description="Without (true) or with (false) stored zero points.")
    search: Search = Field(
        "none",
        description="How a block's scale is chosen: none is ONNX Runtime's absmax/min-max rule, "
        "byte for byte; mse minimises the squared error of each block.",
    )
    accuracy_level: AccuracyLevel = Field(
        0,
        description="MatMulNBits attribute: least precision of the activations on the CPU "
        "(1 fp32, 2 fp16, 3 bf16, 4 int8; 0 leaves it to the runtime).",
    )
    lm_head: WeightParams | None = Field(
        None, description="Settings for the language-model head; by default as the body."
    )
    embedding: WeightParams | None = Field(
        None, description="Settings for the token embedding; by default it stays floating point."
    )
    overrides: tuple[Override, ...] = Field(
        (), description="Settings by name pattern; the first match wins, before lm_head."
    )


class Quantize:
    """Rewrites the graph; the integers are computed when the model is written.

    With an overlay the weights are read through it. What the overlay has for its own grid only,
    clip limits and codes, does not apply to weights that an override gives another format. Weights
    that a quantized checkpoint has as integers stay as they are: what is set here is for the
    others, but accuracy_level for all.
    """

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = 1
    params: ClassVar[type[QuantizeParams]] = QuantizeParams
    accepts: ClassVar[tuple[str, ...]] = (ONNX_GRAPH,)
    accepts_also: ClassVar[tuple[str, ...]] = (OVERLAY,)
    produces: ClassVar[str] = ONNX_GRAPH

    def tools(self) -> tuple[str, ...]:
        return ("onnx-ir",)

    def check(self, params: QuantizeParams, config: ModelConfig) -> list[PhiconvError]:
        errors = _stored_otherwise(params, config)
        settings = params.embedding
        if settings is None or settings.keep_float:
            return errors
        block_size = settings.block_size or params.block_size
        if config.hidden_size % block_size == 0:
            return errors
        return [
            *errors,
            RecipeError(
                f"the embedding's width {config.hidden_size} is not a multiple of block_size "
                f"{block_size}",
                where="quantize: embedding.block_size",
                remedy="choose a block_size that divides it, or leave embedding out",
            ),
        ]

    def check_fit(
        self, params: QuantizeParams, config: ModelConfig, inputs: Sequence[InputRef]
    ) -> list[PhiconvError]:
        """An overlay with clip limits or codes wants weights on its own grid.

        Clip limits were also chosen by what rounding loses, so they want it done the same way.
        """
        overlay = overlay_params(inputs)
        if overlay is None or not (overlay.clip or overlay.rounding == "gptq"):
            return []
        wanted: dict[str, tuple[JSON, JSON]] = {
            "bits": (params.bits, overlay.bits),
            "block_size": (params.block_size, overlay.group_size),
            "symmetric": (params.symmetric, overlay.symmetric),
        }
        if overlay.rounding == "nearest":
            wanted["search"] = (params.search, overlay.search)
        return [
            RecipeError(
                f"the overlay is made for {key} {json.dumps(theirs)}, not {json.dumps(ours)}",
                where=f"quantize: {key}",
                remedy="set both alike; single weights can differ by overrides",
            )
            for key, (ours, theirs) in wanted.items()
            if ours != theirs
        ]

    def key_params(self, params: QuantizeParams) -> dict[str, JSON]:
        document: dict[str, JSON] = params.model_dump(mode="json")
        return document

    def requires(self, params: QuantizeParams) -> tuple[Requirement, ...]:
        return ()

    def run(self, params: QuantizeParams, ctx: StageContext) -> dict[str, JSON]:
        from phiconv.onnx.graph import OnnxGraph
        from phiconv.onnx.quantize import quantize_graph, set_accuracy_levels

        unused: set[Override | None] = {*params.overrides}

        def choose(weight: WeightInfo) -> Target | None:
            override = _first_match(params.overrides, weight)
            unused.discard(override)
            return _target(params, override, weight.role)

        def keep(weight: WeightInfo, grid: Grid) -> int:
            override = _first_match(params.overrides, weight)
            unused.discard(override)
            return _level(params, override, weight, grid)

        graph = OnnxGraph.load(ctx.input(ONNX_GRAPH).path)
        rounded = _take_overlay(graph, params, ctx)
        set_accuracy_levels(graph, keep)
        done = quantize_graph(graph, choose, rounded)
        if unused:
            patterns = ", ".join(sorted(override.match for override in unused if override))
            raise StageError(
                f"no weight matches the override {patterns}",
                where="quantize: overrides",
                remedy=f"weights are named like {next(iter(done), 'lm_head.MatMul.weight')}",
            )
        graph.save(ctx.out)
        by_bits = {bits: sum(target.bits == bits for target in done.values()) for bits in (4, 8)}
        facts: dict[str, JSON] = {"int4_weights": by_bits[4], "int8_weights": by_bits[8]}
        if rounded:
            facts["copied_weights"] = graph.count_copied()
        return facts


def _take_overlay(
    graph: OnnxGraph, params: QuantizeParams, ctx: StageContext
) -> Mapping[str, Grid]:
    """Notes the overlay in the graph; returns the grids of the weights that have codes.

    Raises:
        StageError: It is damaged, or for another checkpoint, graph or grid.
    """
    from phiconv.checkpoint.overlaid import OverlaidCheckpoint
    from phiconv.checkpoint.weight_source import Grid

    artifact = overlay_input(ctx)
    if artifact is not None and graph.overlay is None:
        graph.overlay = artifact.key
    check_overlay(graph, ctx)
    source = weight_source(ctx)
    if isinstance(source, OverlaidCheckpoint) and source.overlay.needs_grid:
        grid = Grid(params.bits, params.block_size, params.symmetric)
        if grid != source.overlay.grid:
            raise StageError(
                f"the overlay is made for {source.overlay.grid}, not {grid}",
                where="quantize",
                remedy="set bits, block_size and symmetric as the overlay has them",
            )
    return source.rounded.tensors if source.rounded is not None else {}


def _stored_otherwise(params: QuantizeParams, config: ModelConfig) -> list[PhiconvError]:
    """Wishes, spelled out in the recipe, that the weights of a quantized checkpoint do not meet."""
    stored = config.quantization
    if stored is None or stored.varies or stored.group_size < 0:
        return []
    found = {"bits": stored.bits, "block_size": stored.group_size, "symmetric": stored.symmetric}
    return [
        RecipeError(
            f"the checkpoint is quantized already, with {key} {json.dumps(value)}; it is not "
            f"quantized again with {json.dumps(getattr(params, key))}",
            where=f"quantize: {key}",
            remedy=f"set {key}: {json.dumps(value)}, or leave it out and set lm_head and embedding",
        )
        for key, value in found.items()
        if key in params.model_fields_set and getattr(params, key) != value
    ]


def _level(
    params: QuantizeParams, override: Override | None, weight: WeightInfo, grid: Grid
) -> int:
    """The accuracy level of a weight whose integers stay as they are.

    Raises:
        StageError: An override wants it in another format.
    """
    settings: WeightParams = override or WeightParams()
    if override is None and weight.role == "lm_head":
        settings = params.lm_head or settings
    wanted = (settings.bits, settings.block_size, settings.symmetric)
    other = any(
        ours is not None and ours != theirs for ours, theirs in zip(wanted, grid, strict=True)
    )
    if settings.keep_float or other:
        raise StageError(
            f"{weight.name} is an integer weight already, {grid.bits} bits in blocks of "
            f"{grid.group_size}, and is not quantized again",
            where="quantize: overrides" if override else "quantize: lm_head",
            remedy="take the override away, or convert the model that is not quantized",
        )
    return params.accuracy_level if settings.accuracy_level is None else settings.accuracy_level


def _first_match(overrides: tuple[Override, ...], weight: WeightInfo) -> Override | None:
    names = (weight.name, *weight.tensors)
    for override in overrides:
        if any(fnmatchcase(name, override.match) for name in names):
            return override
    return None


def _target(params: QuantizeParams, override: Override | None, role: str) -> Target | None:
    """Resolve the settings of one weight: an override, else its role's, else the stage's."""
    from phiconv.onnx.quantize import Target

    settings: WeightParams | None = override
    if settings is None and role == "lm_head":
        settings = params.lm_head
    elif settings is None and role == "embedding":
        settings = params.embedding or WeightParams(keep_float=True)
    settings = settings or WeightParams()
    if settings.keep_float:
        return None

    return Target(
        bits=settings.bits or params.bits,
        block_size=settings.block_size or params.block_size,
        symmetric=params.symmetric if settings.symmetric is None else settings.symmetric,
        search=settings.search or params.search,
        accuracy_level=params.accuracy_level
        if settings.accuracy_level is None
        else settings.accuracy_level,
    )
