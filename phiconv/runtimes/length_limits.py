"""Where results change with the length of the text, and where runtimes leave Hugging Face's there.

Two things of a Phi-3 depend on position beyond the rotary embedding itself: the sliding window and
LongRoPE's switch from its short to its long factors. What the runtimes make of them was measured
(docs/models.md) and read in their sources, named below; it follows from config.json and the
artifact, without running anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from phiconv import machine
from phiconv.report.results import KnownLimit

if TYPE_CHECKING:
    from phiconv.checkpoint import ModelConfig

BoundaryKind = Literal["sliding window", "LongRoPE switch"]

GENAI = "onnxruntime-genai"
# Generator::InitializePhi3RopeThreshold (generators.cpp): a constant, whatever the config says,
# for a single sequence, and on no device that answers SupportsPhi3RopeRewind with false.
GENAI_RECOMPUTES_AT = 4096
GENAI_RECOMPUTES_ON = (machine.CPU, machine.CUDA)


@dataclass(frozen=True)
class Boundary:
    """A length of text at which a model begins to compute something else.

    Attributes:
        kind: Which.
        position: The first position, counted from 0, that is beyond it: the first that no longer
            attends to position 0, or the first of the long factors.
    """

    kind: BoundaryKind
    position: int


def boundaries(config: ModelConfig) -> tuple[Boundary, ...]:
    """The boundaries within the model's context, in the order of their positions."""
    found = []
    context = config.max_position_embeddings
    if config.sliding_window is not None and config.sliding_window < context:
        found.append(Boundary("sliding window", config.sliding_window))
    if config.rope is not None and config.original_max_position_embeddings < context:
        found.append(Boundary("LongRoPE switch", config.original_max_position_embeddings))
    return tuple(sorted(found, key=lambda boundary: boundary.position))


def gguf_limits(config: ModelConfig) -> tuple[KnownLimit, ...]:
    """What llama.cpp does otherwise, whatever the file says."""
    limits = []
    for boundary in boundaries(config):
        position = boundary.position
        if boundary.kind == "sliding window":
            # llama-model.cpp switches it off for phi3
            statement = (
                "llama.cpp has no sliding window for Phi-3: it attends to every position, the "
                f"model to the last {position:,}"
            )
            limits.append(KnownLimit(machine.LLAMA_CPP, statement, position))
        else:
            # llama_model::get_rope_factors goes by n_ctx
            statement = (
                "llama.cpp chooses LongRoPE's factors by the size of the context (-c, rounded up "
                f"to 256), not by the text: with more than {position:,} it uses the long ones from "
                f"the first position, where the model has the short ones for texts of up to "
                f"{position:,} tokens"
            )
            limits.append(KnownLimit(machine.LLAMA_CPP, statement, 0))
    return tuple(limits)


def onnx_limits(config: ModelConfig, provider: str, *, has_window: bool) -> tuple[KnownLimit, ...]:
    """What an ONNX artifact and ONNX Runtime GenAI do otherwise.

    Args:
        config: The checkpoint's configuration.
        provider: The execution provider it is made for, by ONNX Runtime's name.
        has_window: Whether the graph's attention has the model's sliding window.
    """
    runtime = f"{GENAI} ({provider})"
    limits = []
    for boundary in boundaries(config):
        position = boundary.position
        if boundary.kind == "sliding window":
            if has_window:
                continue
            # DmlOperatorGroupQueryAttention.cpp ignores local_window_size
            what = "DirectML's attention" if provider == machine.DML else "this graph's attention"
            statement = (
                f"{what} has no sliding window: it attends to every position, the model to the "
                f"last {position:,}"
            )
        else:
            statement = _switch_statement(position, provider)
        limits.append(KnownLimit(runtime, statement, position))
    return tuple(limits)


def _switch_statement(position: int, provider: str) -> str:
    kept = (
        f"keys cached before position {position:,} keep LongRoPE's short factors when the text "
        "grows beyond it"
    )
    if position == GENAI_RECOMPUTES_AT and provider in GENAI_RECOMPUTES_ON:
        return (
            f"{kept} through append_tokens or in a batch; generate_next_token of a single sequence "
            "computes them anew, as Hugging Face's generate() does"
        )
    but = (
        "not on DirectML"
        if provider == machine.DML
        else f"only for a switch at {GENAI_RECOMPUTES_AT:,}"
    )
    return f"{kept}; Hugging Face's generate() computes them anew there, ONNX Runtime GenAI {but}"
