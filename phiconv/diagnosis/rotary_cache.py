"""The cos and sin caches of rotary embedding: what they should be, and what they are instead."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import ModelConfig

# Angles are computed in fp32, so their error grows with the position.
_ANGLE_ERROR = 3e-7
_TOLERANCES = {"float16": 2e-3, "float32": 2e-5}
_SHIFTS = (1, -1, 2, -2)
# How well frequencies must agree with a law for the law to be named.
_FIT = 2e-2


class RotaryCache(NamedTuple):
    """Cosines and sines, `[positions, rotary_dim / 2]` each."""

    cos: NDArray[np.float64]
    sin: NDArray[np.float64]

    def rows(self, start: int, stop: int) -> RotaryCache:
        """Positions `[start, stop)`."""
        return RotaryCache(self.cos[start:stop], self.sin[start:stop])


def cache_kinds(config: ModelConfig) -> tuple[str, ...]:
    """The caches a graph may hold, see `expected_cache`."""
    return ("plain",) if config.rope is None else ("short", "long", "joined")


def expected_cache(config: ModelConfig, kind: str, positions: int) -> RotaryCache:
    """A cache as it should be, float64.

    Args:
        config: The checkpoint's configuration.
        kind: ``plain`` without LongRoPE; with it ``short`` or ``long``, or ``joined``: the short
            one up to the original context length with the long one after it, as the GenAI model
            builder lays it out for DirectML.
        positions: Number of rows.
    """
    import numpy as np

    if config.rope is None:
        return _cache(config, np.ones(config.rotary_dim // 2), 1.0, positions)
    factors = {"short": config.rope.short_factor, "long": config.rope.long_factor}
    if kind in factors:
        return _cache(config, np.array(factors[kind]), config.rope.attention_factor, positions)
    original = min(config.original_max_position_embeddings, positions)
    parts = [
        expected_cache(config, "short", original),
        expected_cache(config, "long", positions - original),
    ]
    return RotaryCache(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))


def _cache(
    config: ModelConfig, factors: NDArray[np.float64], scale: float, positions: int
) -> RotaryCache:
    import numpy as np

    angles = np.outer(np.arange(positions), _frequencies(config.rope_theta, factors))
    return RotaryCache(np.cos(angles) * scale, np.sin(angles) * scale)


def _frequencies(theta: float, factors: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    pairs = len(factors)
    result: NDArray[np.float64] = 1.0 / (factors * theta ** (np.arange(pairs) / pairs))
    return result


def matches(found: RotaryCache, expected: RotaryCache, dtype: str) -> bool:
    """Whether a cache is another, up to the rounding of its type and of fp32 angles."""
    import numpy as np

    rows = min(len(found.cos), len(expected.cos))
    if not rows or found.cos.shape[1:] != expected.cos.shape[1:]:
        return False
    scale = float(np.hypot(expected.cos[0], expected.sin[0]).max())
    tolerance = _TOLERANCES.get(dtype, 2e-5) + _ANGLE_ERROR * np.arange(rows)[:, None]
    return all(
        bool((np.abs(a[:rows] - b[:rows]) <= scale * tolerance).all())
        for a, b in zip(found, expected, strict=True)
    )


def explain(found: RotaryCache, expected: RotaryCache, config: ModelConfig, dtype: str) -> str:
    """Says what a cache that does not match is instead."""
    import numpy as np

    if not all(np.isfinite(part).all() for part in found):
        return "it holds NaN or infinity"
    if found.cos.shape[1] != expected.cos.shape[1]:
        width = found.cos.shape[1]
        return f"it rotates {2 * width} dimensions, the checkpoint {config.rotary_dim}"
    if matches(RotaryCache(found.sin, found.cos), expected, dtype):
        return "cos and sin are swapped"
    for shift in _SHIFTS:
        first = max(shift, 0)
        moved = expected.rows(first, len(expected.cos))
        own = found.rows(max(-shift, 0), len(found.cos))
        if matches(own, moved, dtype):
            return f"it is shifted: row {max(-shift, 0)} holds position {first}"
    return _law(found, config, dtype) or _difference(found, expected)


def _law(found: RotaryCache, config: ModelConfig, dtype: str) -> str | None:
    """The theta, factor or scale that the first rows follow."""
    import numpy as np

    if len(found.cos) < 2:
        return None
    scale = float(np.median(np.hypot(found.cos[1], found.sin[1])))
    frequencies = np.arctan2(found.sin[1], found.cos[1])
    if scale <= 0 or (frequencies <= 0).any():
        return None
    wanted_scale = 1.0 if config.rope is None else config.rope.attention_factor
    factors = [np.ones(len(frequencies))]
    if config.rope is not None:
        factors = [np.array(config.rope.short_factor), np.array(config.rope.long_factor)]
    for factor in factors:
        expected = _frequencies(config.rope_theta, factor)
        ratio = frequencies / expected
        if np.abs(ratio - 1).max() < _FIT and abs(scale / wanted_scale - 1) > _FIT:
            return f"it is scaled by {scale:.3g}, expected {wanted_scale:.3g}"
        if np.abs(ratio / ratio[0] - 1).max() < _FIT and abs(ratio[0] - 1) > _FIT:
            return f"its positions are multiplied by {ratio[0]:.3g}"
        theta = _theta(frequencies * factor)
        if theta is not None and abs(theta / config.rope_theta - 1) > _FIT:
            return f"it follows rope_theta {theta:.4g}, the checkpoint has {config.rope_theta:.6g}"
    return None


def _theta(frequencies: NDArray[np.float64]) -> float | None:
    """The base of frequencies `theta ** (-2 i / rotary_dim)`, if they follow such a law."""
    import numpy as np

    pairs = len(frequencies)
    if pairs < 2:
        return None
    exponents = np.arange(pairs) / pairs
    logarithms = np.log(frequencies)
    slope = float((exponents * logarithms).sum() / (exponents * exponents).sum())
    if np.abs(logarithms - slope * exponents).max() > _FIT:
        return None
    return math.exp(-slope)


def _difference(found: RotaryCache, expected: RotaryCache) -> str:
    import numpy as np

    rows = min(len(found.cos), len(expected.cos))
    differences = np.maximum(
        *(np.abs(a[:rows] - b[:rows]).max(axis=1) for a, b in zip(found, expected, strict=True))
    )
    row = int(differences.argmax())
    return f"it differs by up to {differences[row]:.3g}, most at position {row}"
