"""Cosines and sines of rotary position embedding, as the graph stores them.

In fp32 as transformers computes them, operation by operation, so that angles are the same; powers,
cosines and sines are rounded from float64, where torch's are up to 1 ulp off, depending on which
instructions the machine has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from phiconv.checkpoint import ModelConfig

# Positions computed at a time: float64 takes twice the memory of the result.
_ROWS = 4096


class RotaryCache(NamedTuple):
    """Cosines and sines, `[positions, rotary_dim / 2]` each."""

    cos: NDArray[np.floating]
    sin: NDArray[np.floating]

    def followed_by(self, other: RotaryCache) -> RotaryCache:
        """Both, one after the other."""
        return RotaryCache(
            np.concatenate([self.cos, other.cos]), np.concatenate([self.sin, other.sin])
        )


def plain_cache(config: ModelConfig, dtype: DTypeLike) -> RotaryCache:
    """The cache of a model without LongRoPE, for its whole context."""
    return _cache(frequencies(config), config.max_position_embeddings, 1.0, dtype)


def short_cache(config: ModelConfig, dtype: DTypeLike) -> RotaryCache:
    """LongRoPE's cache for texts up to the original context length."""
    assert config.rope is not None
    found = frequencies(config, config.rope.short_factor)
    scale = config.rope.attention_factor
    return _cache(found, config.original_max_position_embeddings, scale, dtype)


def long_cache(config: ModelConfig, dtype: DTypeLike) -> RotaryCache:
    """LongRoPE's cache for longer texts, from position 0 on."""
    assert config.rope is not None
    found = frequencies(config, config.rope.long_factor)
    return _cache(found, config.max_position_embeddings, config.rope.attention_factor, dtype)


def frequencies(config: ModelConfig, factors: Sequence[float] = (1.0,)) -> NDArray[np.float32]:
    """Radians a position of each rotated pair, float32 `[rotary_dim / 2]`.

    `1 / (factor * theta ** (2 i / rotary_dim))`, rounded to float32 after each operation.

    Args:
        config: The architecture.
        factors: LongRoPE's divisor of each pair, or one of all.
    """
    dim = config.rotary_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    theta = np.float64(np.float32(config.rope_theta))
    powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    result: NDArray[np.float32] = np.float32(1) / (np.asarray(factors, np.float32) * powers)
    return result


def _cache(
    found: NDArray[np.float32], positions: int, scale: float, dtype: DTypeLike
) -> RotaryCache:
    cache = RotaryCache(
        np.empty((positions, len(found)), dtype), np.empty((positions, len(found)), dtype)
    )
    for start in range(0, positions, _ROWS):
        rows = np.arange(start, min(start + _ROWS, positions), dtype=np.float32)
        angles = np.outer(rows, found).astype(np.float64)
        for out, function in zip(cache, (np.cos, np.sin), strict=True):
            out[start : start + len(rows)] = function(angles).astype(np.float32) * np.float32(scale)
    return cache
