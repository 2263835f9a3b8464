"""`make_qp_quants` of ggml-quants.c, bit for bit: the step of a super-block's scales or minima.

Vectors of 8 values `x ≈ step * level`, 16 of them side by side, one a vector lane, as in
ggml_search.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.ggml_search import GROUP_MAX_EPS, nearest_int
from phiconv.kernels.jit import routine

Array = npt.NDArray[Any]

SIZE = 8
"""Values of a vector."""

VECTORS = 16
"""Vectors searched side by side."""

# Rows of the state, by their offsets.
_LARGEST, _INVERSE, _TRIAL, _BEST, _ERROR, _SUM_XL, _SUM_L2 = range(0, 7 * VECTORS, VECTORS)
_COUNT = SIZE * VECTORS
_BYTE = np.int32(0xFF)
_ZERO, _ONE = np.float32(0), np.float32(1)


@routine
def _start(x: Array, state: Array, top: Any) -> None:
    """Largest values, and the candidate that maps them to `top`."""
    for v in range(VECTORS):
        state[_LARGEST + v] = _ZERO
        state[_SUM_XL + v] = _ZERO
        state[_SUM_L2 + v] = _ZERO
    for j in range(0, _COUNT, VECTORS):
        row = x[j : j + VECTORS]
        for v in range(VECTORS):
            value, largest = row[v], state[_LARGEST + v]
            state[_LARGEST + v] = largest if largest > value else value
    for v in range(VECTORS):
        state[_TRIAL + v] = top / state[_LARGEST + v]


@routine
def _sum_errors(x: Array, w: Array, state: Array, top: Any, wrap: bool) -> None:
    """Weighted squared error of the candidate.

    With `wrap` the levels pass through a byte unclamped, as the first candidate's do in ggml.
    """
    limit = np.int32(top)
    for v in range(VECTORS):
        state[_ERROR + v] = _ZERO
    for j in range(0, _COUNT, VECTORS):
        row, weights = x[j : j + VECTORS], w[j : j + VECTORS]
        for v in range(VECTORS):
            inverse = state[_TRIAL + v]
            level = nearest_int(inverse * row[v])
            byte, clamped = np.int32(level & _BYTE), level if level < limit else limit
            difference = row[v] - _ONE / inverse * np.float32(byte if wrap else clamped)
            state[_ERROR + v] += weights[v] * difference * difference


@routine
def _keep_better(state: Array, always: bool) -> None:
    """Takes the candidate over where its error is smaller than the best so far."""
    for v in range(VECTORS):
        best, inverse = state[_BEST + v], state[_INVERSE + v]
        error, trial = state[_ERROR + v], state[_TRIAL + v]
        better = (error < best) | always
        state[_BEST + v] = error if better else best
        state[_INVERSE + v] = trial if better else inverse


@routine
def _set_levels(x: Array, w: Array, levels: Array, state: Array, top: Any) -> None:
    """Levels of one value of each vector under the best candidate, and their sums."""
    limit = np.int32(top)
    for v in range(VECTORS):
        level = nearest_int(state[_INVERSE + v] * x[v])
        level = level if level < limit else limit
        levels[v] = np.int32(level & _BYTE)
        state[_SUM_XL + v] += w[v] * x[v] * np.float32(level)
        state[_SUM_L2 + v] += w[v] * np.float32(level) * np.float32(level)


@routine
def _refine_levels(x: Array, w: Array, levels: Array, state: Array, top: Any) -> None:
    """Moves the level of one value of each vector to its best place, where that helps the fit."""
    limit = np.int32(top)
    for v in range(VECTORS):
        weight, value, old = w[v], x[v], levels[v]
        sum_xl, sum_l2 = state[_SUM_XL + v], state[_SUM_L2 + v]
        level = np.float32(old)
        rest_xl = sum_xl - weight * value * level
        rest_l2 = sum_l2 - weight * level * level
        new = nearest_int(value * rest_l2 / rest_xl)
        new = new if new < limit else limit
        level = np.float32(new)
        new_xl = rest_xl + weight * value * level
        new_l2 = rest_l2 + weight * level * level
        better = (rest_xl > _ZERO) & (rest_l2 > _ZERO) & (new != old)
        better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
        levels[v] = np.int32(new & _BYTE) if better else old
        state[_SUM_XL + v] = new_xl if better else sum_xl
        state[_SUM_L2 + v] = new_l2 if better else sum_l2


@routine
def search_positive(x: Array, w: Array, top: Any, levels: Array, steps: Array) -> None:
    """`make_qp_quants`: finds `step` and levels with `x ≈ step * level`.

    ggml stops refining when a round changes nothing; the rounds left would change nothing either.

    Args:
        x: float32 `[SIZE * VECTORS]`, value j of all vectors in row j.
        w: Their weights.
        top: The largest level, float32.
        levels: Receives int32, 0..top (any byte if a value is negative); laid out as `x`.
        steps: Receives float32 `[VECTORS]`.
    """
    state = np.empty(7 * VECTORS, np.float32)
    _start(x, state, top)
    _sum_errors(x, w, state, top, True)
    _keep_better(state, True)
    for s in range(-4, 5):
        if s != 0:
            width = np.float32(np.float32(0.1) * np.float32(s)) + top
            for v in range(VECTORS):
                state[_TRIAL + v] = width / state[_LARGEST + v]
            _sum_errors(x, w, state, top, False)
            _keep_better(state, False)
    for j in range(0, _COUNT, VECTORS):
        i = j + VECTORS
        _set_levels(x[j:i], w[j:i], levels[j:i], state, top)
    for _ in range(5):
        for j in range(0, _COUNT, VECTORS):
            i = j + VECTORS
            _refine_levels(x[j:i], w[j:i], levels[j:i], state, top)
    for v in range(VECTORS):
        sum_l2, empty = state[_SUM_L2 + v], state[_LARGEST + v] < GROUP_MAX_EPS
        step = state[_SUM_XL + v] / sum_l2
        steps[v] = step if (sum_l2 > _ZERO) & (not empty) else _ZERO
        for j in range(v, _COUNT, VECTORS):
            levels[j] = np.int32(0) if empty else levels[j]
