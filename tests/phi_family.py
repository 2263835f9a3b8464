"""The members of the Phi family in miniature: each published model's peculiarities, tiny sizes.

What is kept is what conversion can get wrong: the ratio of query to key/value heads, the width of
a head, the rotated part of it, LongRoPE's factors and its scale, the sliding window, whether the
head is tied, and how config.json spells it. Lengths are divided, so that a window or a switch is
crossed within a hundred tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.phi3_checkpoints import write_phi3_checkpoint

CONTEXT = 512
# llama.cpp rounds the length of a context up to a multiple of this, and goes by that length.
SWITCH = 256
WINDOW = 47


@dataclass(frozen=True)
class Member:
    """One model of the family.

    Attributes:
        keys: Its keys of config.json, but those of the rotary embedding.
        rope: Those, in the spelling of transformers 5; with `rope_type: longrope` the boundary is
            `SWITCH`.
    """

    keys: Mapping[str, Any]
    rope: Mapping[str, Any] = field(default_factory=lambda: PLAIN)

    @property
    def longrope(self) -> bool:
        return bool(self.rope["rope_type"] == "longrope")

    @property
    def window(self) -> int | None:
        """The sliding window, where it is shorter than the context."""
        window: int | None = self.keys.get("sliding_window")
        return window if window is not None and window < CONTEXT else None

    def config_keys(self, *, old_spelling: bool) -> dict[str, Any]:
        """Keys for `write_phi3_checkpoint`."""
        keys = dict(self.keys)
        if self.longrope:
            keys["original_max_position_embeddings"] = SWITCH
        if not old_spelling:
            own = {"original_max_position_embeddings": SWITCH} if self.longrope else {}
            return keys | {"rope_parameters": {**self.rope, **own}}
        rope = dict(self.rope)
        keys["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            keys["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type")
        keys["rope_scaling"] = {"type": kind, **rope} if kind == "longrope" else None
        return keys


PLAIN: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}


def longrope(pairs: int, short: float, long: float, **keys: Any) -> dict[str, Any]:
    """LongRoPE whose factors grow from 1 to `short` and to `long` over the rotated pairs."""
    steps = [index / (pairs - 1) for index in range(pairs)]
    return {
        **PLAIN,
        "rope_type": "longrope",
        "short_factor": [round(short**step, 6) for step in steps],
        "long_factor": [round(long**step, 6) for step in steps],
        **keys,
    }


# Heads of 96 columns as in Phi-3-mini, of 64 where the published model has 128.
_MINI: dict[str, Any] = {
    "hidden_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_MEDIUM: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
_NEVER = 2 * CONTEXT  # a window longer than the context, as the long-context models have it

FAMILY: dict[str, Member] = {
    "phi-3-mini-4k": Member({**_MINI, "sliding_window": WINDOW}),
    "phi-3-mini-128k": Member(
        {**_MINI, "sliding_window": _NEVER}, longrope(48, short=2.5, long=32.0)
    ),
    "phi-3-medium-4k": Member({**_MEDIUM, "sliding_window": WINDOW}),
    "phi-3-medium-128k": Member(
        {**_MEDIUM, "sliding_window": _NEVER}, longrope(32, short=1.8, long=24.0)
    ),
    "phi-3.5-mini": Member({**_MINI, "sliding_window": _NEVER}, longrope(48, short=3.0, long=60.0)),
    "phi-4": Member({**_MEDIUM, "sliding_window": None}, {**PLAIN, "rope_theta": 250_000.0}),
    "phi-4-mini": Member(
        {
            "hidden_size": 192,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "sliding_window": _NEVER,
            "tie_word_embeddings": True,
        },
        longrope(24, short=1.0, long=32.0, partial_rotary_factor=0.75),
    ),
}


def write_member(
    path: Path,
    name: str,
    *,
    dtype: str = "bf16",
    shards: int = 1,
    old_spelling: bool = True,
    **overrides: Any,
) -> Path:
    """Writes a seeded checkpoint of a member of `FAMILY` with a context of `CONTEXT` tokens."""
    keys: dict[str, Any] = {
        "intermediate_size": 320,
        "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": CONTEXT,
        **FAMILY[name].config_keys(old_spelling=old_spelling),
        **overrides,
    }
    return write_phi3_checkpoint(path, dtype=dtype, shards=shards, **keys)
