"""GPTQ: rounds a weight column by column, each column making up for the errors before it.

For inputs with the Gram matrix `H = U U^T` (U upper triangular, the Cholesky factor taken from the
last column to the first), the output error of codes q for a row w is

    (w - q) H (w - q)^T = sum_k (U[k, k] * (w[k] + sum_(j<k) (w[j] - q[j]) * A[j, k] - q[k]))^2

with `A[j, k] = U[j, k] / U[k, k]`. So column k is rounded at `w[k]` plus the feedback of the errors
before it, which is what GPTQ does (Frantar et al., arXiv:2210.17323, there by way of the inverse of
H; this form needs no inverse).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.jit import kernel, routine
from phiconv.kernels.plain_rule import (
    asymmetric_rule,
    code,
    reciprocal_of,
    round_scale,
    symmetric_rule,
)

Array = npt.NDArray[Any]


@kernel
def _factor_block(block: Array, upper: Array) -> Any:
    """Fills float64 `upper` with U of `block = U U^T`, and tells whether it is positive."""
    n = block.shape[0]
    for k in range(n - 1, -1, -1):
        square = block[k, k]
        for i in range(k + 1, n):
            square -= upper[k, i] * upper[k, i]
        if not square > 0:
            return False
        pivot = np.sqrt(square)
        upper[k, k] = pivot
        for j in range(k):
            product = block[j, k]
            for i in range(k + 1, n):
                product -= upper[j, i] * upper[k, i]
            upper[j, k] = product / pivot
    return True


@kernel
def _invert_upper(upper: Array, inverse: Array) -> None:
    """Fills float64 `inverse` with the inverse of an upper triangular matrix."""
    n = upper.shape[0]
    for k in range(n):
        inverse[k, k] = 1.0 / upper[k, k]
        for j in range(k - 1, -1, -1):
            total = 0.0
            for i in range(j + 1, k + 1):
                total += upper[j, i] * inverse[i, k]
            inverse[j, k] = -total / upper[j, j]


def factor_block(
    block: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """The upper triangular U of `block = U U^T` and its inverse, float64 [n, n].

    Args:
        block: Symmetric, float32 [n, n].

    Returns:
        Both, or None where the block is not positive definite.
    """
    upper = np.zeros(block.shape, np.float64)
    inverse = np.zeros(block.shape, np.float64)
    if not _factor_block(block.astype(np.float64), upper):
        return None
    _invert_upper(upper, inverse)
    return upper, inverse


@routine
def _fit(
    scaled: Array,
    importance: Array,
    reciprocal: Array,
    zero: Array,
    top: Any,
    dot: Array,
    norm: Array,
) -> None:
    """Rounds a group of every row and sums `h * x * c` and `h * c * c` over its codes `c`."""
    for r in range(dot.shape[0]):
        dot[r] = np.float32(0)
        norm[r] = np.float32(0)
    for i in range(scaled.shape[0]):
        weight = importance[i]
        for r in range(dot.shape[0]):
            value = scaled[i, r]
            c = np.floor(code(value, reciprocal[r], zero[r], top)) - zero[r]
            dot[r] += weight * value * c
            norm[r] += weight * c * c


@routine
def _error(
    scaled: Array, importance: Array, scale: Array, reciprocal: Array, zero: Array, top: Any
) -> Any:
    """What rounding a group of every row loses, each column as it counts; float64 [n]."""
    error = np.zeros(scale.shape[0])
    for i in range(scaled.shape[0]):
        for r in range(scale.shape[0]):
            value = scaled[i, r]
            c = np.floor(code(value, reciprocal[r], zero[r], top)) - zero[r]
            difference = np.float64(value) - np.float64(c * scale[r])
            error[r] += importance[i] * difference * difference
    return error


@routine
def _search_scales(
    scaled: Array, importance: Array, scale: Array, reciprocal: Array, zero: Array, top: Any
) -> None:
    """Replaces scales where that loses less: `phiconv.kernels.scale_search`, but weighted.

    A column counts by the square of its pivot: that is how its error enters the loss.
    """
    lanes = scale.shape[0]
    trial = np.empty(lanes, np.float32)
    dot, norm = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    best, better = np.full(lanes, np.float32(-1)), scale.copy()
    for step in range(14):
        stretch = 0.85 + 0.025 * step if top < 16 else 1 - 0.0125 * step
        for r in range(lanes):
            trial[r] = reciprocal[r] * np.float32(stretch)
        _fit(scaled, importance, trial, zero, top, dot, norm)
        for r in range(lanes):
            fitted = dot[r] / norm[r]
            gain = (fitted * reciprocal[r]) * (dot[r] * reciprocal[r])
            better[r] = fitted if gain > best[r] else better[r]
            best[r] = gain if gain > best[r] else best[r]
    for r in range(lanes):
        trial[r] = reciprocal_of(better[r])
    _fit(scaled, importance, trial, zero, top, dot, norm)
    for r in range(lanes):
        better[r] = round_scale(dot[r] / norm[r], True)
        trial[r] = reciprocal_of(better[r])
    plain = _error(scaled, importance, scale, reciprocal, zero, top)
    error = _error(scaled, importance, better, trial, zero, top)
    for r in range(lanes):
        if error[r] < plain[r] * (1 - 1e-9) and np.isfinite(reciprocal[r]):
            scale[r] = better[r]
            reciprocal[r] = trial[r]


@routine
def _choose_scales(
    scaled: Array,
    importance: Array,
    top: Any,
    symmetric: bool,
    search: bool,
    scale: Array,
    zero: Array,
    inverse: Array,
) -> None:
    """Scales (rounded to float16) and zero points of one group of every row.

    Args:
        scaled: float32 `[group_size, n]`, a group of `n` rows; zeros beyond the last column.
        importance: How much each column's squared error counts, float32 `[group_size]`.
        top: The largest code.
        symmetric: Zero points are the middle code.
        search: Whether scales are searched for the least squared error.
        scale: Receives float32 `[n]`.
        zero: Receives float32 `[n]`.
        inverse: Receives their reciprocals.
    """
    lanes = scaled.shape[1]
    high, low = np.zeros(lanes, np.float32), np.zeros(lanes, np.float32)
    for i in range(scaled.shape[0]):
        for r in range(lanes):
            value = scaled[i, r]
            high[r] = value if value > high[r] else high[r]
            low[r] = -value if -value > low[r] else low[r]
    if symmetric:
        symmetric_rule(high, low, scaled[0], top, True, scale, zero)
    else:
        asymmetric_rule(high, low, top, True, scale, zero)
    for r in range(lanes):
        inverse[r] = reciprocal_of(scale[r])
    if search:
        _search_scales(scaled, importance, scale, inverse, zero, top)


@kernel
def _round_columns(
    weight: Array,
    feedback: Array,
    start: int,
    upper: Array,
    columns: Array,
    rows: Array,
    bits: int,
    group_size: int,
    symmetric: bool,
    search: bool,
    codes: Array,
    scales: Array,
    zeros: Array,
    errors: Array,
    losses: Array,
) -> None:
    """Rounds the columns from `start` on, as many as `errors` has, of a few rows side by side."""
    lanes, size = weight.shape
    width = errors.shape[1]
    top = np.float32((1 << bits) - 1)
    target = np.empty((width, lanes), np.float32)
    for r in range(lanes):
        for j in range(width):
            target[j, r] = weight[r, start + j] + feedback[r, start + j]
    scaled = np.empty((group_size, lanes), np.float32)
    importance = np.zeros(group_size, np.float32)
    scale, zero = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    inverse, error = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    for j in range(width):
        at = start + j
        factor = columns[at]
        if at % group_size == 0:
            for i in range(group_size):
                inside = at + i < size
                pivot = upper[j + i, j + i] / columns[at + i] if inside else np.float32(0)
                importance[i] = pivot * pivot
                for r in range(lanes):
                    value = target[j + i, r] * columns[at + i] * rows[r] if inside else 0.0
                    scaled[i, r] = np.float32(value)
            _choose_scales(scaled, importance, top, symmetric, search, scale, zero, inverse)
            for r in range(lanes):
                scales[r, at // group_size] = scale[r]
                zeros[r, at // group_size] = zero[r]
        share = np.float64(upper[j, j])
        for r in range(lanes):
            value = target[j, r] * factor * rows[r]
            chosen = np.floor(code(value, inverse[r], zero[r], top))
            codes[r, at] = np.int32(chosen)
            rounded = (chosen - zero[r]) * scale[r] / factor / rows[r]
            error[r] = weight[r, at] - rounded
            errors[r, j] = error[r]
            missed = np.float64(target[j, r] - rounded) * share
            losses[r] += missed * missed
        for k in range(j + 1, width):
            feed = upper[j, k]
            for r in range(lanes):
                target[k, r] += error[r] * feed


def round_columns(
    weight: npt.NDArray[np.float32],
    feedback: npt.NDArray[np.float32],
    start: int,
    upper: npt.NDArray[np.float32],
    *,
    columns: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
    bits: int,
    group_size: int,
    symmetric: bool,
    search: bool,
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.float32],
    errors: npt.NDArray[np.float32],
    losses: npt.NDArray[np.float64],
) -> None:
    """Rounds a run of columns of a few rows; a group's scale follows from what is to be rounded.

    Rows are independent of each other, so their number changes nothing but the speed.

    Args:
        weight: float32 [n, K].
        feedback: float32 [n, K], what the errors of the columns before `start` add to each.
        start: First column, a multiple of `group_size`.
        upper: float32 [width, width]: U's diagonal, and above it A, for these columns.
        columns: Factor of each column on the grid, float32 [K].
        rows: Factor of each row on the grid, float32 [n].
        bits: 4 or 8.
        group_size: Columns that share a scale; divides `width` unless the row ends.
        symmetric: Zero points are the middle code.
        search: Whether scales are searched for the least squared error.
        codes: Receives codes, one a byte, [n, K].
        scales: Receives scales that float16 holds, float32 [n, groups].
        zeros: Receives zero points, float32 [n, groups].
        errors: Receives what the weight has more than its rounding, float32 [n, width].
        losses: What the rows lose is added, float64 [n].
    """
    _round_columns(
        weight,
        feedback,
        start,
        upper,
        columns,
        rows,
        bits,
        group_size,
        symmetric,
        search,
        codes,
        scales,
        zeros,
        errors,
        losses,
    )
