"""Rotary position embedding parameters, whichever way a config.json spells them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phiconv.checkpoint.config_keys import ConfigKeys

DEFAULT_THETA = 10_000.0


@dataclass(frozen=True)
class RopeScaling:
    """LongRoPE: one divisor per rotary frequency, one set for short and one for long contexts.

    The frequency of pair i is `1 / (factor[i] * rope_theta ** (2 i / rotary_dim))`, and cos and
    sin are multiplied by `attention_factor`, as transformers' `_compute_longrope_parameters` has
    it (paper: LongRoPE, arXiv 2402.13753).

    Attributes:
        type: Always "longrope"; "su" and "yarn" are older names of it in Phi-3 configs.
        short_factor: `rotary_dim / 2` divisors up to `original_max_position_embeddings`.
        long_factor: The same for longer contexts.
        factor: The context extension: as configured, else `max_position_embeddings /
            original_max_position_embeddings`.
        attention_factor: The multiplier of cos and sin: as configured, else
            `sqrt(1 + ln(factor) / ln(original_max_position_embeddings))`, at least 1.
    """

    type: str
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float
    attention_factor: float


@dataclass(frozen=True)
class RopeParameters:
    """What a config says about RoPE, before it is checked against the head dimension."""

    theta: float
    partial_rotary_factor: float
    original_max_position_embeddings: int
    scaling: RopeScaling | None


def read_rope(keys: ConfigKeys, max_position_embeddings: int) -> RopeParameters:
    """Reads RoPE from both spellings, with the precedence of transformers' Phi3Config.

    Old: `rope_theta`, `partial_rotary_factor` and `rope_scaling: {type, ...}` beside each other.
    New (transformers 5): all of them in `rope_parameters: {rope_type, rope_theta, ...}`.
    """
    original = keys.integer("original_max_position_embeddings", 4096)
    nested = keys.section("rope_scaling") or keys.section("rope_parameters")
    theta = keys.number("rope_theta", DEFAULT_THETA)
    partial = keys.number("partial_rotary_factor", 1.0)
    if nested is None:
        return RopeParameters(theta, partial, original, None)
    theta = nested.number("rope_theta", theta)
    partial = nested.number("partial_rotary_factor", partial)
    kind = nested.text("rope_type", nested.text("type", "default"))
    scaling = None
    if kind in ("longrope", "su", "yarn"):
        scaling = _longrope(nested, max_position_embeddings, original)
    elif kind != "default":
        nested.refuse("rope_type", f"is {kind!r}; Phi-3 has only 'default' and 'longrope'")
    return RopeParameters(theta, partial, original, scaling)


def _longrope(keys: ConfigKeys, maximum: int, original: int) -> RopeScaling:
    own = keys.integer("original_max_position_embeddings", original)
    if own != original:
        keys.refuse(
            "original_max_position_embeddings",
            f"is {own}, but transformers goes by the value beside max_position_embeddings, "
            f"here {original}",
            "make the two equal in config.json",
        )
    factor = keys.number("factor", maximum / original)
    default = 1.0
    if factor > 1.0 and original > 1:
        default = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        type="longrope",
        short_factor=keys.numbers("short_factor"),
        long_factor=keys.numbers("long_factor"),
        factor=factor,
        attention_factor=keys.number("attention_factor", default),
    )


def check_rotary_dim(keys: ConfigKeys, rope: RopeParameters, head_dim: int) -> None:
    """The rotated part of a head must be even, within the head, and fit the scaling factors."""
    rotary_dim = int(head_dim * rope.partial_rotary_factor)
    if rope.partial_rotary_factor > 1 or rotary_dim < 2 or rotary_dim % 2:
        keys.refuse(
            "partial_rotary_factor",
            f"of {rope.partial_rotary_factor} rotates {rotary_dim} of {head_dim} dimensions "
            "of a head; it must be an even number from 2 on",
        )
        return
    if rope.scaling is None:
        return
    factors: Mapping[str, tuple[Any, ...]] = {
        "short_factor": rope.scaling.short_factor,
        "long_factor": rope.scaling.long_factor,
    }
    for key, values in factors.items():
        if len(values) != rotary_dim // 2:
            keys.refuse(
                key,
                f"must hold {rotary_dim // 2} numbers, half the rotary dimension, "
                f"not {len(values)}",
            )
