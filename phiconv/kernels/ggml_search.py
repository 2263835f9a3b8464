"""The scale searches of ggml's quantizers, many blocks side by side; here the symmetric one.

ggml searches block after block, and there each float32 sum waits for the sum before it. Here each
vector lane searches a block of its own, so that all sums still run over a block's values in their
order but none waits. The results are those of ggml-quants.c bit for bit, as a build without fused
multiply-adds computes them.

A *panel* is flat float32 `[values of a block * LANES]`: row i holds value i of every block. The
*state* is flat float32 `[STATE_ROWS * LANES]`, one row a variable of the search. Both have rows
of constant length, from which LLVM sees that rows do not overlap and vectorises.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.jit import Function, _compiled, routine

Array = npt.NDArray[Any]

LANES = 64
"""Blocks searched side by side; three panels of 32 values a block fit the first-level cache."""

STATE_ROWS = 16
# Offsets of the rows of the state. Found so far: range, weighted sums, error, scale, and the
# reciprocal scale and minimum that the codes of the best candidate were made with.
LOW, HIGH, SUM_W, SUM_X, ERROR, SCALE, KEPT_INVERSE, KEPT_LOW = range(0, 8 * LANES, LANES)
SCRATCH = 8 * LANES  # the rows from here on belong to the candidate at hand
# The symmetric search has the value of largest magnitude in place of the range.
_EXTREME, _MAGNITUDE = HIGH, LOW
_INVERSE, _SUM_XL, _SUM_L2 = range(SCRATCH, SCRATCH + 3 * LANES, LANES)

# LLVM unrolls loops of 8 but not of 32, and it vectorises only loops without another loop inside.
# So a loop over the lanes calls routines that treat 8 rows each, with the sums in registers.
UNROLL = 8
PART = UNROLL * LANES
_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: a float32 near it has no fraction bits
_MANTISSA, _MIDDLE = np.int32(0x7FFFFF), np.int32(0x400000)
_ZERO, _ONE = np.float32(0), np.float32(1)
GROUP_MAX_EPS = np.float32(1e-15)
"""Magnitudes below it are taken for zero, as in ggml."""


def inlined(function: Function) -> Function:
    """Compiles a routine that becomes part of its caller's loop, however large it is."""
    return _compiled(function, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


@routine
def nearest_int(value: Any) -> Any:
    """Rounds as ggml's `nearest_int`: to nearest, ties to even, where `abs(value) < 2**22`.

    Beyond, and for infinities and NaN, it gives whatever the bit pattern gives; so does this.
    """
    bits = np.float32(value + _MAGIC).view(np.int32)
    return np.int32(np.int32(bits & _MANTISSA) - _MIDDLE)


@routine
def wrapping_code(value: Any, top: Any) -> Any:
    """Code of `make_qkx2_quants` as a float: rounded as the bits fall, then clamped to 0..top."""
    level, limit = nearest_int(value), np.int32(top)
    level = level if level < limit else limit
    level = level if level > np.int32(0) else np.int32(0)
    return np.float32(level)


@routine
def bounded_code(value: Any, top: Any) -> Any:
    """Code of `make_qkx3_quants` as a float: clamped to 0..top, NaN to 0, then rounded."""
    bounded = value if value < top else top
    bounded = bounded if value > _ZERO else _ZERO
    return np.float32(np.float32(bounded + _MAGIC) - _MAGIC)


@routine
def symmetric_level(value: Any, half: Any) -> Any:
    """Signed level of `make_qx_quants` as a float: rounded and clamped to -half..half-1."""
    level = np.float32(np.float32(value + _MAGIC) - _MAGIC)
    top = np.float32(half - _ONE)
    level = level if level < top else top
    return level if level > -half else -half


@routine
def symmetric_code(inverse: Any, value: Any, half: Any) -> Any:
    """Code of a value after `search_symmetric`: 0 in a block that ggml takes for all zero."""
    level = symmetric_level(inverse * value, half)
    return np.int32(level + half) if inverse != _ZERO else np.int32(0)


@inlined
def _add_levels(x: Array, w: Array, wx: Array, k: int, inverse: Any, half: Any, sums: Any) -> Any:
    """Rounds `UNROLL` values, from index k on, and adds their levels to the two sums."""
    sum_xl, sum_l2 = sums
    for u in range(UNROLL):
        i = k + u * LANES
        level = symmetric_level(inverse * x[i], half)
        sum_xl += wx[i] * level
        sum_l2 += w[i] * level * level
    return sum_xl, sum_l2


@routine
def _sum_levels(x: Array, w: Array, wx: Array, state: Array, half: Any) -> None:
    """Rounds 16 rows with the candidate's reciprocal scale and adds up the levels."""
    for k in range(LANES):
        inverse, sums = state[_INVERSE + k], (state[_SUM_XL + k], state[_SUM_L2 + k])
        sums = _add_levels(x, w, wx, k, inverse, half, sums)
        sums = _add_levels(x, w, wx, k + PART, inverse, half, sums)
        state[_SUM_XL + k], state[_SUM_L2 + k] = sums


@inlined
def _try_levels(x: Array, w: Array, wx: Array, state: Array, half: Any, width: Any) -> None:
    """Sums over the levels of the candidate that maps the extreme value to `-width`."""
    for k in range(LANES):
        state[_INVERSE + k] = -width / state[_EXTREME + k]
        state[_SUM_XL + k] = _ZERO
        state[_SUM_L2 + k] = _ZERO
    for i in range(0, x.shape[0], 2 * PART):
        j = i + 2 * PART
        _sum_levels(x[i:j], w[i:j], wx[i:j], state, half)


@routine
def _extremes(x: Array, state: Array) -> None:
    """The first value of largest magnitude of each block."""
    for k in range(LANES):
        state[_EXTREME + k] = _ZERO
        state[_MAGNITUDE + k] = _ZERO
    for i in range(0, x.shape[0], LANES):
        row = x[i : i + LANES]
        for k in range(LANES):
            value, extreme, magnitude = row[k], state[_EXTREME + k], state[_MAGNITUDE + k]
            absolute = np.float32(abs(value))
            state[_EXTREME + k] = value if absolute > magnitude else extreme
            state[_MAGNITUDE + k] = absolute if absolute > magnitude else magnitude


@routine
def _keep_larger(state: Array, always: bool) -> None:
    """Takes the candidate over where it takes more off the error; `ERROR` is what that takes.

    Stores under a condition: of a choice between two rows of the state LLVM makes a gather.
    """
    for k in range(LANES):
        sum_xl, sum_l2, inverse = state[_SUM_XL + k], state[_SUM_L2 + k], state[_INVERSE + k]
        scale = sum_xl / sum_l2 if sum_l2 != _ZERO else _ZERO
        if (sum_l2 > _ZERO) & (sum_xl * sum_xl > state[ERROR + k] * sum_l2) | always:
            state[ERROR + k] = scale * sum_xl
            state[SCALE + k] = scale
            state[KEPT_INVERSE + k] = inverse


@routine
def search_symmetric(x: Array, w: Array, wx: Array, state: Array, half: Any) -> None:
    """`make_qx_quants` with `rmse_type` 1: finds `SCALE` with `x ≈ SCALE * level`.

    The best candidate's codes are `symmetric_code(KEPT_INVERSE, x, half)`; `KEPT_INVERSE` is 0
    where a block has nothing but values that ggml takes for zero.

    Args:
        x: Panel of 16 or 32 values a block.
        w: Panel of their weights.
        wx: Panel, overwritten.
        state: Receives the result; nothing is expected in it.
        half: Levels are -half..half-1, float32.
    """
    _extremes(x, state)
    for i in range(x.shape[0]):
        wx[i] = w[i] * x[i]
    _try_levels(x, w, wx, state, half, half)
    _keep_larger(state, True)
    for s in range(-9, 10):
        if s != 0:
            width = np.float32(half + np.float32(np.float32(0.1) * np.float32(s)))
            _try_levels(x, w, wx, state, half, width)
            _keep_larger(state, False)
    for k in range(LANES):
        empty = state[_MAGNITUDE + k] < GROUP_MAX_EPS
        scale, inverse = state[SCALE + k], state[KEPT_INVERSE + k]
        state[SCALE + k] = _ZERO if empty else scale
        state[KEPT_INVERSE + k] = _ZERO if empty else inverse
