"""ONNX Runtime's plain rule: from the range of a block to its scale, zero point and codes.

Matches `MlasQuantizeBlockwise` of ONNX Runtime 1.31 (onnxruntime/core/mlas/lib/q4_dq.cpp) bit for
bit, as x86-64 builds compute it, without fused multiply-adds. docs/kernels.md states the rule.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.floats import f16_to_f32, f32_to_f16
from phiconv.kernels.jit import routine

Array = npt.NDArray[Any]

_BELOW_HALF = np.float32(0.49999997)  # the float32 below 0.5
_SIGN = np.int32(-(2**31))


@routine
def _halve(values: Array, count: int, result: Array) -> None:
    """The larger of each pair of integers."""
    for i in range(count):
        a, b = values[2 * i], values[2 * i + 1]
        result[i] = a if a > b else b


@routine
def _block_maxima(values: Array, count: int, spare: Array, result: Array) -> None:
    """Maxima of the `len(result)` equal blocks that `count` values form; `values` is used up.

    Halving the whole row by pairs keeps every loop long, so that it vectorises for any block size.
    """
    blocks = result.shape[0]
    while count > 4 * blocks:
        _halve(values, count // 2, spare)
        _halve(spare, count // 4, values)
        count //= 4
    if count > 2 * blocks:
        _halve(values, count // 2, spare)
        _halve(spare, count // 4, result)
    else:
        _halve(values, count // 2, result)


@routine
def _magnitudes(bits: Array, flip: Any, count: int, result: Array) -> None:
    """The larger of each pair of float32 patterns as integers, after `bits ^ flip`, at least 0.

    The patterns of positive numbers are ordered as integers are and those of negative numbers lie
    below 0; flipping the sign bit makes it the other way round.
    """
    for i in range(count):
        a, b = np.int32(bits[2 * i] ^ flip), np.int32(bits[2 * i + 1] ^ flip)
        larger = a if a > b else b
        result[i] = larger if larger > 0 else np.int32(0)


@routine
def block_ranges(
    pattern: Array, folded: Array, spare: Array, positive: Array, negative: Array
) -> None:
    """Largest positive value and largest magnitude of a negative one of each block, or 0.

    Args:
        pattern: int32 `[blocks * block_size]` float32 patterns.
        folded: int32 scratch of half that length.
        spare: The same.
        positive: Receives int32 patterns `[blocks]`.
        negative: Receives int32 patterns `[blocks]`.
    """
    pairs = folded.shape[0]
    _magnitudes(pattern, np.int32(0), pairs, folded)
    _block_maxima(folded, pairs, spare, positive)
    _magnitudes(pattern, _SIGN, pairs, folded)
    _block_maxima(folded, pairs, spare, negative)


@routine
def column_ranges(columns: Array, positive: Array, negative: Array) -> None:
    """What `block_ranges` finds, where blocks are columns already.

    Args:
        columns: int32 `[block_size, >= blocks]` float32 patterns.
        positive: Receives int32 patterns `[blocks]`.
        negative: Receives int32 patterns `[blocks]`.
    """
    for b in range(positive.shape[0]):
        positive[b] = np.int32(0)
        negative[b] = np.int32(0)
    for j in range(columns.shape[0]):
        column = columns[j]
        for b in range(positive.shape[0]):
            value = column[b]
            flipped = np.int32(value ^ _SIGN)
            positive[b] = value if value > positive[b] else positive[b]
            negative[b] = flipped if flipped > negative[b] else negative[b]


@routine
def round_scale(scale: Any, half: bool) -> Any:
    """A float32 scale as it is stored: itself, or rounded to float16."""
    if half:
        return np.int32(f16_to_f32(f32_to_f16(np.float32(scale).view(np.int32)))).view(np.float32)
    return np.float32(scale)


@routine
def reciprocal_of(scale: Any) -> Any:
    """`1 / scale`, or 0 for a scale of zero."""
    return np.float32(1) / scale if scale != np.float32(0) else np.float32(0)


@routine
def symmetric_rule(
    positive: Array, negative: Array, first: Array, top: Any, half: bool, scale: Array, zero: Array
) -> None:
    """Maps the value of largest magnitude, of two the negative one, to the lowest code.

    Args:
        positive: float32 `[blocks]`, the largest positive value of each block, or 0.
        negative: float32 `[blocks]`, the largest magnitude of its negative values, or 0.
        first: float32 `[blocks]`, its first value, which signs the scale of an all-zero block.
        top: The largest code, 15 or 255.
        half: Scales are rounded to float16.
        scale: Receives float32 `[blocks]`.
        zero: Receives float32 `[blocks]`.
    """
    middle = (top + np.float32(1)) * np.float32(0.5)
    for b in range(positive.shape[0]):
        largest = positive[b] if positive[b] > negative[b] else -negative[b]
        if largest == np.float32(0):
            largest = first[b]
        scale[b] = round_scale(-largest / middle, half)
        zero[b] = middle


@routine
def asymmetric_rule(
    positive: Array, negative: Array, top: Any, half: bool, scale: Array, zero: Array
) -> None:
    """Spreads the codes over the range of the block and 0; arguments as in `symmetric_rule`.

    The zero point follows from the scale before that is rounded to float16.
    """
    for b in range(positive.shape[0]):
        exact = (positive[b] + negative[b]) / top
        point = negative[b] / exact if exact != np.float32(0) else np.float32(0)
        zero[b] = np.floor(code(point, np.float32(1), np.float32(0), top))
        scale[b] = round_scale(exact, half)


@routine
def code(value: Any, reciprocal: Any, zero: Any, top: Any) -> Any:
    """`clamp(roundf(value * reciprocal + zero), 0, top)` before its fraction is cut off.

    `roundf` rounds halves away from zero; adding the float below one half and truncating does the
    same, where adding one half would lift 0.49999997 to 1. NaN (zero times an overflowed
    reciprocal) becomes 0, as it does in ONNX Runtime.
    """
    shifted = value * reciprocal + zero
    shifted = (shifted if shifted > np.float32(0) else np.float32(0)) + _BELOW_HALF
    return shifted if shifted < top else top
