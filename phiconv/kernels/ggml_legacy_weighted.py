"""ggml's Q4_0, Q4_1, Q5_0 and Q5_1 with an importance matrix; ggml_legacy.py states the formats.

The bytes are those of `quantize_q4_0` and its siblings in ggml-quants.c, given `quant_weights`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.ggml_affine_search import search_qkx3
from phiconv.kernels.ggml_legacy import write_codes
from phiconv.kernels.ggml_search import (
    KEPT_INVERSE,
    KEPT_LOW,
    LANES,
    LOW,
    SCALE,
    STATE_ROWS,
    bounded_code,
    search_symmetric,
    symmetric_code,
)
from phiconv.kernels.ggml_values import (
    INFINITY_BITS,
    fill_panel,
    half_bits,
    load_values,
    put_half,
    repeat_importance,
)
from phiconv.kernels.jit import kernel, routine

Array = npt.NDArray[Any]

_SIZE = 32  # weights of a block
_ROWS, _COLUMNS = 8, 512  # rows, and columns of them, whose squares are summed side by side
_ZERO = np.float32(0)


@routine
def _mean_squares(source: Array, source_format: int, columns: int, means: Array) -> Any:
    """Mean square of each row, summed in the columns' order; `_ROWS` sums run at a time.

    Returns:
        The largest magnitude met, as a float32 pattern.
    """
    bits = np.empty(_COLUMNS, np.int32)
    squares = np.zeros((_COLUMNS, _ROWS), np.float32)
    sums = np.empty(_ROWS, np.float32)
    loaded = bits.view(np.float32)
    worst = np.int32(0)
    for first in range(0, means.shape[0], _ROWS):
        rows = min(_ROWS, means.shape[0] - first)
        for r in range(_ROWS):
            sums[r] = _ZERO
        for column in range(0, columns, _COLUMNS):
            width = min(_COLUMNS, columns - column)
            for r in range(rows):
                start = (first + r) * columns + column
                worst = max(worst, load_values(source, source_format, start, bits[:width]))
                for i in range(width):
                    squares[i, r] = loaded[i] * loaded[i]
            for i in range(width):
                for r in range(_ROWS):
                    sums[r] += squares[i, r]
        for r in range(rows):
            means[first + r] = sums[r] / np.float32(columns)
    return worst


@routine
def _weigh(x: Array, w: Array, means: Array, start: int, blocks_per_row: int) -> None:
    """Turns importance `w` into weights: times the root of value² plus the row's mean square."""
    energy = np.empty(LANES, np.float32)
    for k in range(LANES):
        energy[k] = means[min((start + k) // blocks_per_row, means.shape[0] - 1)]
    for i in range(0, _SIZE * LANES, LANES):
        row, weights = x[i : i + LANES], w[i : i + LANES]
        for k in range(LANES):
            weights[k] = weights[k] * np.sqrt(energy[k] + row[k] * row[k])


@kernel
def quantize_symmetric(
    source: Array, source_format: int, importance: Array, five_bits: bool, out: Array
) -> Any:
    """`quantize_row_q4_0_impl` or `quantize_row_q5_0_impl`.

    Args:
        source: The weight's bytes as uint16.
        source_format: `BF16`, `F16` or `F32` of floats.py.
        importance: float32 `[K]`, a weight for each column.
        five_bits: Q5_0 instead of Q4_0.
        out: Receives uint8 `[blocks, 18 or 22]`.

    Returns:
        Whether every value is finite.
    """
    bits = np.empty(LANES * _SIZE, np.int32)
    values = bits.view(np.float32)
    columns, x = np.empty_like(values), np.empty_like(values)
    w, scratch = np.empty_like(x), np.empty_like(x)
    state = np.zeros(STATE_ROWS * LANES, np.float32)
    codes = np.empty(LANES * _SIZE, np.uint8)
    half = np.float32(16 if five_bits else 8)
    blocks_per_row = importance.shape[0] // _SIZE
    means = np.empty(out.shape[0] // blocks_per_row, np.float32)
    worst = _mean_squares(source, source_format, importance.shape[0], means)
    for start in range(0, out.shape[0], LANES):
        load_values(source, source_format, start * _SIZE, bits)
        fill_panel(values, x, scratch)
        repeat_importance(importance, start, _SIZE, columns)
        fill_panel(columns, w, scratch)
        _weigh(x, w, means, start, blocks_per_row)
        search_symmetric(x, w, scratch, state, half)
        for b in range(LANES):
            block, target = values[b * _SIZE :], codes[b * _SIZE :]
            inverse = state[KEPT_INVERSE + b]
            for i in range(_SIZE):
                target[i] = symmetric_code(inverse, block[i], half)
        target = out[start : start + LANES]
        for b in range(target.shape[0]):
            put_half(target[b], half_bits(state[SCALE + b]))
        write_codes(codes, five_bits, 2, target)
    return worst < INFINITY_BITS


@kernel
def quantize_affine(
    source: Array, source_format: int, importance: Array, five_bits: bool, out: Array
) -> Any:
    """`quantize_row_q4_1_impl` or `quantize_row_q5_1_impl`, as `quantize_symmetric`.

    Blocks have 20 or, with `five_bits`, 24 bytes.
    """
    bits = np.empty(LANES * _SIZE, np.int32)
    values = bits.view(np.float32)
    columns, x = np.empty_like(values), np.empty_like(values)
    w, scratch = np.empty_like(x), np.empty_like(x)
    state = np.zeros(STATE_ROWS * LANES, np.float32)
    codes = np.empty(LANES * _SIZE, np.uint8)
    top, first, step = np.float32(31 if five_bits else 15), np.float32(-0.9), np.float32(0.05)
    blocks_per_row = importance.shape[0] // _SIZE
    means = np.empty(out.shape[0] // blocks_per_row, np.float32)
    worst = _mean_squares(source, source_format, importance.shape[0], means)
    for start in range(0, out.shape[0], LANES):
        load_values(source, source_format, start * _SIZE, bits)
        fill_panel(values, x, scratch)
        repeat_importance(importance, start, _SIZE, columns)
        fill_panel(columns, w, scratch)
        _weigh(x, w, means, start, blocks_per_row)
        search_qkx3(x, w, scratch, state, top, first, step, 36)
        for b in range(LANES):
            block, target = values[b * _SIZE :], codes[b * _SIZE :]
            inverse, low = state[KEPT_INVERSE + b], state[KEPT_LOW + b]
            for i in range(_SIZE):
                target[i] = np.int32(bounded_code(inverse * (block[i] - low), top))
        target = out[start : start + LANES]
        for b in range(target.shape[0]):
            put_half(target[b], half_bits(state[SCALE + b]))
            put_half(target[b, 2:], half_bits(state[LOW + b]))
        write_codes(codes, five_bits, 4, target)
    return worst < INFINITY_BITS
