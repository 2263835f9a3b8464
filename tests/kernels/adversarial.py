"""Weights that a quantizer or a cast gets wrong first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def rows(k: int, dtype: Any, seed: int = 0, repeats: int = 3) -> npt.NDArray[Any]:
    """Rows `[10 * repeats, k]` of `dtype` (float32 or float16), all finite."""
    rng = np.random.default_rng(seed)
    limits = np.finfo(dtype)
    largest, smallest = float(limits.max), float(limits.smallest_subnormal)
    made: list[npt.NDArray[np.float64]] = []
    for _ in range(repeats):
        normal = rng.standard_normal(k)
        signs = rng.choice([-1.0, 1.0], k)
        made += [
            np.where(rng.random(k) < 0.5, 0.0, -0.0),  # zeros of both signs
            rng.integers(-300, 300, k) * smallest,  # subnormal scales, overflowing reciprocals
            rng.integers(-2, 3, k) * smallest,  # scales that round to zero
            signs * rng.choice([0.5, 1.0, 3.0]),  # largest and smallest tie
            rng.integers(-16, 17, k) / 4.0,  # codes halfway between two
            np.abs(normal),
            -np.abs(normal),
            normal * largest / 8,
            signs * np.where(np.arange(k) // 16 % 2, largest, 0),  # the range itself overflows
            np.where(rng.random(k) < 0.03, normal, 0) * 10.0 ** rng.uniform(-7, 4),
        ]
    return np.clip(np.array(made), -largest, largest).astype(dtype)
