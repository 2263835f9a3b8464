"""ggml's Q6_K: super-blocks of 256 weights, 16 blocks of `weight = scale * (code - 32)`.

A super-block, as ggml-common.h's `block_q6_K` (210 bytes) has it. Codes are numbered 0..255; half
h of the super-block has codes 128h to 128h + 127, in four quarters of 32:

- 128 bytes of low 4 bits: of half h, byte 64h + i has code i of quarter 0 and, above it, of
  quarter 2; byte 64h + 32 + i those of quarters 1 and 3;
- 64 bytes of high 2 bits: byte 32h + i has those of code i of quarters 0, 1, 2, 3, from the lowest;
- 16 signed bytes: the blocks' scales, in steps of
- float16 `d`, low byte first.

The bytes are those of `quantize_q6_K` of ggml-quants.c, the values those of `dequantize_row_q6_K`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.ggml_search import (
    GROUP_MAX_EPS,
    KEPT_INVERSE,
    LANES,
    SCALE,
    STATE_ROWS,
    nearest_int,
    search_symmetric,
    symmetric_code,
)
from phiconv.kernels.ggml_values import (
    INFINITY_BITS,
    fill_panel,
    get_half,
    half_bits,
    load_values,
    put_half,
    repeat_importance,
)
from phiconv.kernels.jit import kernel, routine

Array = npt.NDArray[Any]

_SUPER = 256  # weights of a super-block
_SIZE = 16  # weights of a block
_BLOCKS = _SUPER // _SIZE
_SUPERS = LANES // _BLOCKS  # super-blocks searched together
_HIGH, _SCALES, _D = 128, 192, 208  # offsets of the parts of a super-block
_ZERO, _HALF = np.float32(0), np.float32(32)


@routine
def _largest_scale(scales: Array) -> Any:
    """The first of the super-block's 16 scales of largest magnitude."""
    largest, magnitude = _ZERO, _ZERO
    for j in range(_BLOCKS):
        if abs(scales[j]) > magnitude:
            magnitude = abs(scales[j])
            largest = scales[j]
    return largest


@routine
def _make_codes(values: Array, kept: Array, target: Array, wide: Array, codes: Array) -> None:
    """Rounds a super-block with its scales as packed; where such a scale is 0, as searched.

    Args:
        values: float32 `[256]`.
        kept: The state of the search from the super-block's first lane on.
        target: The super-block, its scales written.
        wide: float32 `[256]`, overwritten: the scale of each value, so that one long loop divides
            by them.
        codes: Receives uint8 `[256]`.
    """
    d = get_half(target[_D:])
    for j in range(_BLOCKS):
        scale, scales = np.float32(d * np.float32(np.int8(target[_SCALES + j]))), wide[j * _SIZE :]
        for i in range(_SIZE):
            scales[i] = scale
    for i in range(_SUPER):
        level = np.int32(nearest_int(values[i] / wide[i]) + np.int32(32))
        level = level if level < np.int32(63) else np.int32(63)
        codes[i] = level if level > np.int32(0) else np.int32(0)
    for j in range(_BLOCKS):
        if wide[j * _SIZE] == _ZERO:
            inverse = kept[KEPT_INVERSE + j]
            for i in range(j * _SIZE, (j + 1) * _SIZE):
                codes[i] = symmetric_code(inverse, values[i], _HALF)


@routine
def _pack_codes(codes: Array, target: Array) -> None:
    """Packs 256 codes of 6 bits into the low and high parts of a super-block."""
    for h in range(2):
        first, second = codes[128 * h :], codes[128 * h + 32 :]
        third, fourth = codes[128 * h + 64 :], codes[128 * h + 96 :]
        low, high = target[64 * h : 64 * h + 64], target[_HIGH + 32 * h : _HIGH + 32 * h + 32]
        for i in range(32):
            low[i] = (first[i] & 0xF) | (third[i] & 0xF) << 4
            low[i + 32] = (second[i] & 0xF) | (fourth[i] & 0xF) << 4
            pair = first[i] >> 4 | (second[i] >> 4) << 2
            high[i] = pair | (third[i] >> 4) << 4 | (fourth[i] >> 4) << 6


@routine
def _finish(values: Array, state: Array, out: Array) -> None:
    """Writes the super-blocks of a panel, as many as `out` has rows for."""
    codes, wide = np.empty(_SUPER, np.uint8), np.empty(_SUPER, np.float32)
    for s in range(out.shape[0]):
        target, kept = out[s], state[s * _BLOCKS :]
        largest = _largest_scale(kept[SCALE:])
        if abs(largest) < GROUP_MAX_EPS:
            for i in range(target.shape[0]):
                target[i] = 0
            continue
        inverse = np.float32(-128) / largest
        put_half(target[_D:], half_bits(np.float32(1) / inverse))
        for j in range(_BLOCKS):
            target[_SCALES + j] = min(nearest_int(inverse * kept[SCALE + j]), 127) & 0xFF
        _make_codes(values[s * _SUPER : (s + 1) * _SUPER], kept, target, wide, codes)
        _pack_codes(codes, target)


@kernel
def quantize(source: Array, source_format: int, importance: Array, out: Array) -> Any:
    """`quantize_row_q6_K_ref`, or `quantize_row_q6_K_impl` with an importance matrix.

    Args:
        source: The weight's bytes as uint16.
        source_format: `BF16`, `F16` or `F32` of floats.py.
        importance: float32 `[K]`, a weight for each column; without values if there is none, and
            a value's weight is its square.
        out: Receives uint8 `[super-blocks, 210]`.

    Returns:
        Whether every value is finite.
    """
    bits = np.empty(_SUPERS * _SUPER, np.int32)
    values = bits.view(np.float32)
    x, w, scratch = np.empty_like(values), np.empty_like(values), np.empty_like(values)
    weights = np.empty_like(values)
    state = np.zeros(STATE_ROWS * LANES, np.float32)
    worst = np.int32(0)
    for start in range(0, out.shape[0], _SUPERS):
        worst = max(worst, load_values(source, source_format, start * _SUPER, bits))
        fill_panel(values, x, scratch)
        if importance.shape[0] > 0:
            repeat_importance(importance, start, _SUPER, weights)
            fill_panel(weights, w, scratch)
        else:
            for i in range(x.shape[0]):
                w[i] = x[i] * x[i]
        search_symmetric(x, w, scratch, state, _HALF)
        _finish(values, state, out[start : start + _SUPERS])
    return worst < INFINITY_BITS


@kernel
def dequantize(blocks: Array, out: Array) -> None:
    """`dequantize_row_q6_K`.

    Args:
        blocks: uint8 `[super-blocks, 210]`.
        out: Receives float32 `[super-blocks, 256]`.
    """
    for b in range(blocks.shape[0]):
        packed, target = blocks[b], out[b]
        d = get_half(packed[_D:])
        for j in range(_BLOCKS):
            scale = np.float32(d * np.float32(np.int8(packed[_SCALES + j])))
            quarter, side = j // 2 % 4, j % 2 * _SIZE
            low = packed[j // 8 * 64 + quarter % 2 * 32 + side :]
            high = packed[_HIGH + j // 8 * 32 + side :]
            row = target[j * _SIZE : (j + 1) * _SIZE]
            for i in range(_SIZE):
                code = low[i] >> (quarter // 2 * 4) & 0xF | (high[i] >> (quarter * 2) & 3) << 4
                row[i] = scale * np.float32(np.int32(code) - 32)
