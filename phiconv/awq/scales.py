"""The AWQ search: per-channel scales that lower the output error of a rounded weight.

Candidates have AutoAWQ's form (Lin et al., arXiv:2306.00978): with x the mean magnitude of each
input and w the mean magnitude of its weights relative to their group's largest, `x^r / w^(1-r)`
for a grid of ratios r, normalised by the geometric mean of its extremes. Each is judged by the
error `tr(D H D^T)` that the real rounding leaves on a sample of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from phiconv.awq.groups import FoldingGroup

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phiconv.checkpoint import ModelConfig

RATIOS = 20
"""Ratios tried: 0, 1/20, ..., 19/20, as AutoAWQ's n_grid."""
_SMALLEST = 1e-4  # AutoAWQ's floor for scales and for relative weights


@dataclass(frozen=True)
class Scaling:
    """The scales found best.

    Attributes:
        columns: Factor of each column, float32 [K]; ones where no scale lowers the error.
        ratio: The ratio they were made with; None for ones.
        loss: The error they leave.
    """

    columns: NDArray[np.float32]
    ratio: float | None
    loss: float


def search_scales(
    group: FoldingGroup,
    config: ModelConfig,
    inputs: NDArray[np.float64],
    weights: NDArray[np.float64],
    loss: Callable[[NDArray[np.float32]], float],
    least_gain: float = 0.0,
) -> Scaling:
    """Tries every candidate and keeps the best, or ones.

    Args:
        group: Which scales are tied.
        config: The model's dimensions.
        inputs: Mean magnitude of each input, [K].
        weights: Mean relative magnitude of each column, see `relative_magnitudes`.
        loss: The error that factors of the columns, float32 [K], leave.
        least_gain: Share of the error of ones by which a candidate must be better.
    """
    ones = np.ones(len(inputs), np.float32)
    plain = loss(ones)
    unscaled = Scaling(ones, None, plain)
    best = unscaled
    for ratio, columns in _candidates(group, config, inputs, weights):
        left = loss(columns)
        if left < best.loss:
            best = Scaling(columns, ratio, left)
    return best if best.loss <= plain * (1 - least_gain) else unscaled


def _candidates(
    group: FoldingGroup,
    config: ModelConfig,
    inputs: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> Iterator[tuple[float, NDArray[np.float32]]]:
    for step in range(RATIOS):
        ratio = step / RATIOS
        scales = inputs**ratio / (weights ** (1 - ratio) + _SMALLEST)
        scales = np.maximum(group.tie(scales, config), _SMALLEST)
        scales /= np.sqrt(scales.max() * scales.min())
        yield ratio, scales.astype(np.float32)


def relative_magnitudes(weight: NDArray[np.float32], group_size: int) -> NDArray[np.float64]:
    """Mean over the rows of each weight's magnitude relative to its group's largest, [K]."""
    n, size = weight.shape
    total = np.zeros(size)
    for start in range(0, size, group_size):
        part = np.abs(weight[:, start : start + group_size])
        largest = part.max(axis=1, keepdims=True)
        part /= np.maximum(largest, np.finfo(np.float32).tiny)
        total[start : start + group_size] = part.sum(axis=0, dtype=np.float64)
    mean: NDArray[np.float64] = total / n
    return mean


def sampled_rows(rows: int, limit: int) -> NDArray[np.int64]:
    """Indices of at most `limit` rows, spread evenly."""
    count = min(rows, limit)
    return np.arange(count, dtype=np.int64) * rows // count
