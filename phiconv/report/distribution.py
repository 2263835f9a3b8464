"""Small summaries of per-position KL divergences, enough to plot them without the raw values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phiconv.report.results import Histogram, PositionError

# A quarter of a decade a bin, from below float64's noise to a lost model.
_EDGES = tuple(exponent / 4 for exponent in range(-48, 9))
_POSITION_BINS = 32


def kl_histogram(kl_divergence: NDArray[np.floating[Any]]) -> Histogram:
    """Distribution of KL divergences (any shape, nats) over fixed logarithmic bins.

    The bins are the same for every measurement, so histograms can be laid over each other. Zeros
    count in the first bin.
    """
    floor = 10.0 ** _EDGES[0]
    exponents = np.log10(np.maximum(kl_divergence.astype(np.float64).ravel(), floor))
    bins = np.clip(np.searchsorted(_EDGES, exponents, side="right") - 1, 0, len(_EDGES) - 2)
    counts = np.bincount(bins, minlength=len(_EDGES) - 1)
    return Histogram(_EDGES, tuple(int(count) for count in counts))


def kl_by_position(kl_divergence: NDArray[np.floating[Any]]) -> PositionError:
    """Mean and 90th percentile of KL divergences [n, T] in at most 32 bins of positions."""
    length = kl_divergence.shape[1]
    width = max(1, math.ceil(length / _POSITION_BINS))
    starts = range(0, length, width)
    parts = [kl_divergence[:, start : start + width].astype(np.float64) for start in starts]
    return PositionError(
        starts=tuple(starts),
        mean=tuple(float(part.mean()) for part in parts),
        p90=tuple(float(np.percentile(part, 90)) for part in parts),
    )
