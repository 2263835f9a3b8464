"""The scale and minimum searches of ggml's asymmetric quantizers, `make_qkx2_quants` and `_qkx3_`.

Panels and state are those of ggml_search.py, which says how they make the search fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.ggml_search import (
    ERROR,
    HIGH,
    KEPT_INVERSE,
    KEPT_LOW,
    LANES,
    LOW,
    PART,
    SCALE,
    SCRATCH,
    SUM_W,
    SUM_X,
    UNROLL,
    bounded_code,
    inlined,
    wrapping_code,
)
from phiconv.kernels.jit import routine

Array = npt.NDArray[Any]
Routine = Callable[..., Any]

# Of the candidate at hand: reciprocal scale, sums over its codes, the fit to them, its error.
_INVERSE, _SUM_L, _SUM_L2, _SUM_XL, _FIT_SCALE, _FIT_LOW, _FIT_ERROR, _DETERMINANT = range(
    SCRATCH, SCRATCH + 8 * LANES, LANES
)
_ZERO, _ONE, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)


@routine
def _weighted_range(x: Array, w: Array, state: Array) -> None:
    """Minimum, maximum and weighted sums of each block."""
    for k in range(LANES):
        state[LOW + k] = x[k]
        state[HIGH + k] = x[k]
        state[SUM_W + k] = w[k]
        state[SUM_X + k] = w[k] * x[k]
    for i in range(LANES, x.shape[0], LANES):
        row, weights = x[i : i + LANES], w[i : i + LANES]
        for k in range(LANES):
            value, weight = row[k], weights[k]
            low, high = state[LOW + k], state[HIGH + k]
            state[LOW + k] = value if value < low else low
            state[HIGH + k] = value if value > high else high
            state[SUM_W + k] += weight
            state[SUM_X + k] += weight * value


@routine
def _start(x: Array, w: Array, state: Array, top: Any) -> None:
    """Makes the range of the block and 0, in `top` steps, the first candidate."""
    _weighted_range(x, w, state)
    for k in range(LANES):
        low, high = state[LOW + k], state[HIGH + k]
        low = _ZERO if low > _ZERO else low
        inverse = top / (high - low)
        state[LOW + k] = low
        # A range so small that this overflows leaves all codes 0 in ggml, as a flat block does.
        state[_INVERSE + k] = inverse if inverse < _INFINITY else _ZERO
        state[_FIT_SCALE + k] = _ONE / inverse
        state[_FIT_LOW + k] = low


@routine
def _next_candidate(state: Array, width: Any) -> None:
    """Makes `width` steps over the range, from the best minimum so far, the candidate."""
    for k in range(LANES):
        state[_INVERSE + k] = width / (state[HIGH + k] - state[LOW + k])


@routine
def _keep_first(state: Array) -> None:
    """Takes the first candidate over; in a flat block nothing shall be better."""
    for k in range(LANES):
        low, flat = state[LOW + k], state[HIGH + k] == state[LOW + k]
        scale, error = state[_FIT_SCALE + k], state[_FIT_ERROR + k]
        state[KEPT_INVERSE + k] = state[_INVERSE + k]
        state[KEPT_LOW + k] = low
        state[SCALE + k] = _ZERO if flat else scale
        state[ERROR + k] = -_INFINITY if flat else error


@inlined
def _add_errors(x: Array, w: Array, codes: Array, k: int, scale: Any, low: Any, error: Any) -> Any:
    """Adds the weighted squared errors of `UNROLL` values, from index k on, to `error`."""
    for u in range(UNROLL):
        i = k + u * LANES
        difference = scale * codes[i] + low - x[i]
        error += w[i] * (difference * difference)
    return error


@routine
def _sum_errors(x: Array, w: Array, codes: Array, state: Array) -> None:
    """Weighted squared error of each block under the candidate's scale and minimum."""
    for k in range(LANES):
        scale, low = state[_FIT_SCALE + k], state[_FIT_LOW + k]
        error = _add_errors(x, w, codes, k, scale, low, _ZERO)
        error = _add_errors(x, w, codes, k + PART, scale, low, error)
        error = _add_errors(x, w, codes, k + 2 * PART, scale, low, error)
        state[_FIT_ERROR + k] = _add_errors(x, w, codes, k + 3 * PART, scale, low, error)


@routine
def _fit_codes(state: Array) -> None:
    """Least-squares scale and minimum for the candidate's codes; a minimum above 0 becomes 0."""
    for k in range(LANES):
        sum_w, sum_x = state[SUM_W + k], state[SUM_X + k]
        sum_l, sum_l2, sum_xl = state[_SUM_L + k], state[_SUM_L2 + k], state[_SUM_XL + k]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        through_zero = sum_xl / sum_l2
        state[_FIT_SCALE + k] = through_zero if low > _ZERO else scale
        state[_FIT_LOW + k] = _ZERO if low > _ZERO else low
        state[_DETERMINANT + k] = determinant


@routine
def _keep_better(state: Array) -> None:
    """Takes the candidate over where it has an error and it is smaller than the best so far.

    Stores under a condition: of a choice between two rows of the state LLVM makes a gather.
    """
    for k in range(LANES):
        low, error, inverse = state[LOW + k], state[ERROR + k], state[_INVERSE + k]
        fit_scale, fit_low = state[_FIT_SCALE + k], state[_FIT_LOW + k]
        fit_error = state[_FIT_ERROR + k]
        if (state[_DETERMINANT + k] > _ZERO) & (fit_error < error):
            state[KEPT_INVERSE + k] = inverse
            state[KEPT_LOW + k] = low
            state[ERROR + k] = fit_error
            state[SCALE + k] = fit_scale
            state[LOW + k] = fit_low


def _sum_with(round_code: Routine) -> Routine:
    """The routine that rounds a candidate's codes with `round_code`, a constant in it."""

    @inlined
    def add_codes(
        x: Array, w: Array, codes: Array, k: int, inverse: Any, low: Any, top: Any, sums: Any
    ) -> Any:
        """Rounds `UNROLL` values, from index k on, and adds their codes to the three sums."""
        sum_l, sum_l2, sum_xl = sums
        for u in range(UNROLL):
            i = k + u * LANES
            code = round_code(inverse * (x[i] - low), top)
            weighted = w[i] * code
            sum_l += weighted
            sum_l2 += weighted * code
            sum_xl += weighted * x[i]
            codes[i] = code
        return sum_l, sum_l2, sum_xl

    @routine
    def sum_codes(x: Array, w: Array, codes: Array, state: Array, top: Any) -> None:
        """Rounds each block with the candidate's reciprocal scale and sums up the codes."""
        for k in range(LANES):
            inverse, low = state[_INVERSE + k], state[LOW + k]
            sums = add_codes(x, w, codes, k, inverse, low, top, (_ZERO, _ZERO, _ZERO))
            sums = add_codes(x, w, codes, k + PART, inverse, low, top, sums)
            sums = add_codes(x, w, codes, k + 2 * PART, inverse, low, top, sums)
            sums = add_codes(x, w, codes, k + 3 * PART, inverse, low, top, sums)
            state[_SUM_L + k], state[_SUM_L2 + k], state[_SUM_XL + k] = sums

    return sum_codes


def _search_with(round_code: Routine) -> Routine:
    """The whole search, with `round_code` to make codes 0..top of values."""
    sum_codes = _sum_with(round_code)

    @routine
    def search(
        x: Array, w: Array, codes: Array, state: Array, top: Any, first: Any, step: Any, steps: int
    ) -> None:
        _start(x, w, state, top)
        sum_codes(x, w, codes, state, top)
        _sum_errors(x, w, codes, state)
        _keep_first(state)
        for s in range(steps + 1):
            width = np.float32(np.float32(first + np.float32(step * np.float32(s))) + top)
            _next_candidate(state, width)
            sum_codes(x, w, codes, state, top)
            _fit_codes(state)
            _sum_errors(x, w, codes, state)
            _keep_better(state)

    return search


search_qkx2 = _search_with(wrapping_code)
"""`make_qkx2_quants` with squared errors: `SCALE` and `LOW <= 0` with `x ≈ SCALE * code + LOW`.

The codes of the best candidate are `wrapping_code(KEPT_INVERSE * (x - KEPT_LOW), top)`; ggml's
`the_min` is `-LOW`.

Args:
    x: Panel of 32 values a block.
    w: Panel of their weights.
    codes: Panel, overwritten.
    state: Receives the result; nothing is expected in it.
    top: The largest code, float32.
    first: The candidates have `top + first + step * s` steps over the range, after one with `top`.
    step: See there.
    steps: The largest s; 0 is the smallest.
"""

search_qkx3 = _search_with(bounded_code)
"""`make_qkx3_quants` with squared errors, as `search_qkx2` but for `bounded_code`."""
