"""Standard errors of the difference of a metric between two measurements of the same tokens.

Both measurements share the difficulty of every position, so what is looked at is the difference at
each position, which varies far less than either side.
"""

from __future__ import annotations

import math

import numpy as np

from phiconv.metrics.positions import PositionValues
from phiconv.metrics.standard_error import INFLUENCES, standard_error


def paired_errors(baseline: PositionValues, candidate: PositionValues) -> dict[str, float]:
    """Standard errors of candidate minus baseline, by metric; those that are not finite left out.

    Args:
        baseline: One measurement.
        candidate: Another, of the same windows.

    Raises:
        ValueError: The windows are not of one shape.
    """
    shapes = (baseline.kl_divergence.shape, candidate.kl_divergence.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"windows of shape {shapes[0]} against {shapes[1]}")
    with np.errstate(all="ignore"):
        found = {
            name: standard_error(influence(candidate) - influence(baseline))
            for name, influence in INFLUENCES.items()
        }
    return {name: error for name, error in found.items() if math.isfinite(error)}
