"""The checkpoints under examples/, each with the peculiarities of the model it is named after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# No other width of the models, and a few rows more than the tokenizer uses, as in Phi-3.
VOCABULARY = 3_520
HEAD_SIZE = 64


@dataclass(frozen=True)
class TinyModel:
    """One checkpoint: its shape and how it is trained.

    Attributes:
        shape: keys of ``Phi3Config``.
        windows: (until this share of the run, window lengths taken in turn). Long windows last, so
            that positions beyond the first few hundred are trained without paying for them
            throughout.
        steps: optimizer steps of 4,096 tokens.
        peak_learning_rate: after the warm-up.
        start_from: another example, whose weights and tokenizer training starts from.
    """

    shape: dict[str, Any]
    windows: tuple[tuple[float, tuple[int, ...]], ...]
    steps: int
    peak_learning_rate: float
    start_from: str | None = None


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 4 * HEAD_SIZE,
    "intermediate_size": 1_024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4_096,
    "rms_norm_eps": 1e-5,
}
# Phi-4-mini rotates 96 of 128 columns; its window is twice the context, so it never applies.
PARTIAL_ROTARY = 0.75
ROTATED_PAIRS = int(HEAD_SIZE * PARTIAL_ROTARY) // 2
# Phi-4-mini stretches its slowest pair by context / original context and its fastest not at all,
# the others geometrically between.
STRETCH = 4.0
LONG_FACTORS = [round(STRETCH ** (i / (ROTATED_PAIRS - 1)), 4) for i in range(ROTATED_PAIRS)]

TINY_MODELS = {
    "tiny-phi3": TinyModel(
        shape=COMMON
        | {
            "num_key_value_heads": 4,
            "original_max_position_embeddings": 4_096,
            "sliding_window": 2_047,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            "tie_word_embeddings": False,
        },
        windows=((0.55, (256,)), (0.85, (512,)), (1.0, (1_024,))),
        steps=3_600,
        peak_learning_rate=2e-3,
    ),
    "tiny-phi4-mini": TinyModel(
        shape=COMMON
        | {
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 1_024,
            "sliding_window": 8_192,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": PARTIAL_ROTARY,
                "original_max_position_embeddings": 1_024,
                "short_factor": [1.0] * ROTATED_PAIRS,
                "long_factor": LONG_FACTORS,
            },
            "tie_word_embeddings": True,
        },
        # 2,048 tokens are past the switch to the long factors.
        windows=((0.5, (256,)), (0.8, (512,)), (1.0, (1_024, 2_048))),
        steps=560,
        peak_learning_rate=1.5e-3,
        start_from="tiny-phi3",
    ),
}
