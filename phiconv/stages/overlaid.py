"""The overlay among a stage's inputs, and what a recipe's steps must agree on to use one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from phiconv.errors import StageError
from phiconv.stages.stage import OVERLAY, Artifact, InputRef, StageContext

if TYPE_CHECKING:
    from phiconv.checkpoint.weight_source import WeightSource
    from phiconv.onnx.graph import OnnxGraph


@runtime_checkable
class OverlayParams(Protocol):
    """Parameters of a stage that makes an overlay.

    Attributes:
        bits: Bits of a weight on the grid that it is made for.
        group_size: Input features that share a scale there.
        symmetric: Whether there are no zero points.
        search: How a group's scale was chosen while it was searched.
        clip: Whether groups are clipped.
        rounding: `nearest`, or `gptq` for codes.
    """

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...
    @property
    def search(self) -> str: ...
    @property
    def clip(self) -> bool: ...
    @property
    def rounding(self) -> str: ...


def overlay_params(inputs: Sequence[InputRef]) -> OverlayParams | None:
    """What the overlay among the inputs is made with; None without one, or if not known."""
    for ref in inputs:
        if ref.kind == OVERLAY and ref.made_by:
            params = ref.made_by[-1][1]
            return params if isinstance(params, OverlayParams) else None
    return None


def overlay_input(ctx: StageContext) -> Artifact | None:
    """The overlay among the inputs of a run."""
    return next((artifact for artifact in ctx.inputs if artifact.kind == OVERLAY), None)


def weight_source(ctx: StageContext) -> WeightSource:
    """The checkpoint, read through the overlay among the inputs if there is one.

    Raises:
        StageError: The overlay is damaged, or another checkpoint's.
    """
    from phiconv.checkpoint.overlaid import OverlaidCheckpoint
    from phiconv.checkpoint.overlay import Overlay

    artifact = overlay_input(ctx)
    if artifact is None:
        return ctx.checkpoint
    return OverlaidCheckpoint(ctx.checkpoint, Overlay.load(artifact.path), clip=False)


def check_overlay(graph: OnnxGraph, ctx: StageContext) -> None:
    """Makes sure that a graph is read through the overlay that it was quantized with.

    Scales cancel out between weights, so one half of them alone is another model.

    Raises:
        StageError: The overlay is missing, or another, or the graph has none.
    """
    artifact = overlay_input(ctx)
    key = artifact.key if artifact is not None else None
    if key != graph.overlay:
        has = f"the overlay {graph.overlay[:12]}" if graph.overlay else "no overlay"
        given = f"the overlay {key[:12]}" if key else "none"
        raise StageError(
            f"the graph was quantized with {has}, but is given {given}",
            remedy="take the overlay in the stage quantize, and the same one after it",
        )
