"""ggml's Q4_K and Q5_K: super-blocks of 256 weights, 8 blocks of `weight = scale * code - minimum`.

A super-block, as ggml-common.h's `block_q4_K` (144 bytes) and `block_q5_K` (176 bytes) have it:

- float16 `d` and `dmin`, low byte first: the steps of the blocks' scales and minima;
- 12 bytes: 8 scales and 8 minima of 6 bits, packed as `_pack_levels` says;
- Q5_K: 32 bytes, bit j of byte i being the high bit of code i of block j;
- 128 bytes: byte i of the p-th 32 has the low 4 bits of code i of blocks 2p and, above, 2p + 1.

The bytes are those of `quantize_q4_K` and `quantize_q5_K` of ggml-quants.c, the values those of
`dequantize_row_q4_K` and `dequantize_row_q5_K`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.ggml_affine_search import search_qkx2, search_qkx3
from phiconv.kernels.ggml_positive_search import VECTORS, search_positive
from phiconv.kernels.ggml_search import (
    KEPT_INVERSE,
    KEPT_LOW,
    LANES,
    LOW,
    SCALE,
    STATE_ROWS,
    SUM_W,
    bounded_code,
    nearest_int,
    wrapping_code,
)
from phiconv.kernels.ggml_values import (
    INFINITY_BITS,
    fill_panel,
    get_half,
    half_bits,
    load_values,
    put_half,
    repeat_importance,
    sum_squares,
)
from phiconv.kernels.jit import kernel, routine

Array = npt.NDArray[Any]

_SUPER = 256  # weights of a super-block
_SIZE = 32  # weights of a block
_BLOCKS = _SUPER // _SIZE
_SUPERS = LANES // _BLOCKS  # super-blocks searched together; scales and minima make VECTORS
_LEVELS, _CODES = 4, 16  # offsets of the packed scales and of what follows them
_ZERO = np.float32(0)


@routine
def _plain_weights(x: Array, w: Array, state: Array) -> None:
    """Weights without an importance matrix: root mean square of the block plus magnitude."""
    for k in range(LANES):
        state[SUM_W + k] = _ZERO
    for i in range(0, _SIZE * LANES, LANES):
        row = x[i : i + LANES]
        for k in range(LANES):
            state[SUM_W + k] += row[k] * row[k]
    for k in range(LANES):
        state[SUM_W + k] = np.sqrt(state[SUM_W + k] / np.float32(_SIZE))
    for i in range(0, _SIZE * LANES, LANES):
        row, weights = x[i : i + LANES], w[i : i + LANES]
        for k in range(LANES):
            weights[k] = state[SUM_W + k] + abs(row[k])


@routine
def _importance_weights(values: Array, weights: Array, energy: Array) -> None:
    """Turns importance into weights: times the root of value² plus twice the mean of those.

    Args:
        values: float32 `[_SUPERS * 256]`; the mean is that of a super-block.
        weights: Importance beside the values; overwritten.
        energy: float32 `[_SUPERS]`, overwritten.
    """
    sum_squares(values, energy)
    for s in range(_SUPERS):
        twice_mean = np.float32(2) * energy[s] / np.float32(_SUPER)
        block, target = values[s * _SUPER :], weights[s * _SUPER :]
        for i in range(_SUPER):
            target[i] = target[i] * np.sqrt(twice_mean + block[i] * block[i])


@routine
def _plain_levels(fits: Array, levels: Array, steps: Array) -> None:
    """Rounds scales or minima to 0..63 steps of a 63rd of the largest of their super-block.

    Args:
        fits: float32 `[VECTORS * 8]`.
        levels: Receives int32 `[VECTORS * 8]`.
        steps: Receives the steps, float32 `[VECTORS]`.
    """
    for v in range(VECTORS):
        vector, rounded = fits[v * _BLOCKS :], levels[v * _BLOCKS :]
        largest = _ZERO
        for j in range(_BLOCKS):
            largest = vector[j] if vector[j] > largest else largest
        inverse = np.float32(63) / largest if largest > _ZERO else _ZERO
        for j in range(_BLOCKS):
            rounded[j] = min(nearest_int(inverse * vector[j]) & 0xFF, 63)
        steps[v] = largest / np.float32(63)


@routine
def _weighted_levels(
    fits: Array, weights: Array, five_bits: bool, levels: Array, steps: Array
) -> None:
    """As `_plain_levels`, by search under the summed weights of the blocks, float32 `[LANES]`.

    A scale below 0 becomes a level above 63, which ggml limits in Q5_K only.
    """
    highest = np.int32(63 if five_bits else 255)
    x, w = np.empty(VECTORS * _BLOCKS, np.float32), np.empty(VECTORS * _BLOCKS, np.float32)
    rounded = np.empty(VECTORS * _BLOCKS, np.int32)
    for v in range(VECTORS):
        for j in range(_BLOCKS):
            x[j * VECTORS + v] = fits[v * _BLOCKS + j]
            w[j * VECTORS + v] = weights[v % _SUPERS * _BLOCKS + j]
    search_positive(x, w, np.float32(63), rounded, steps)
    for v in range(VECTORS):
        for j in range(_BLOCKS):
            levels[v * _BLOCKS + j] = min(rounded[j * VECTORS + v], highest)


@routine
def _pack_levels(scales: Array, lows: Array, target: Array) -> None:
    """Packs 8 scales and 8 minima of 6 bits into 12 bytes.

    Bytes 0..3 and 4..7 have scales and minima 0..3 in their low 6 bits, above them the high 2
    bits of scales and minima 4..7, whose low 4 bits are the nibbles of bytes 8..11.
    """
    for j in range(4):
        scale, low = scales[j + 4], lows[j + 4]
        target[j] = scales[j] | (scale >> 4) << 6
        target[j + 4] = lows[j] | (low >> 4) << 6
        target[j + 8] = (scale & 0xF) | (low & 0xF) << 4


@routine
def _packed_scale(packed: Array, j: int) -> Any:
    """Scale j of the 12 bytes that `_pack_levels` makes."""
    if j < 4:
        return np.float32(packed[j] & 63)
    return np.float32((packed[j + 4] & 0xF) | (packed[j - 4] >> 6) << 4)


@routine
def _packed_low(packed: Array, j: int) -> Any:
    """Minimum j of the 12 bytes that `_pack_levels` makes."""
    if j < 4:
        return np.float32(packed[j + 4] & 63)
    return np.float32((packed[j + 4] >> 4) | (packed[j] >> 6) << 4)


@routine
def _make_codes(values: Array, packed: Array, top: Any, wide: Array, codes: Array) -> None:
    """Rounds a super-block with its scales and minima as packed.

    Args:
        values: float32 `[256]`.
        packed: The super-block's first 16 bytes.
        top: The largest code, float32.
        wide: float32 `[512]`, overwritten: scale and minimum of each value, so that one long loop
            divides by them.
        codes: Receives uint8 `[256]`; where a scale is 0 they mean nothing.
    """
    d, dmin = get_half(packed), get_half(packed[2:])
    scales, lows = wide[:_SUPER], wide[_SUPER:]
    for j in range(_BLOCKS):
        scale = np.float32(d * _packed_scale(packed[_LEVELS:], j))
        low = np.float32(dmin * _packed_low(packed[_LEVELS:], j))
        block_scales, block_lows = scales[j * _SIZE :], lows[j * _SIZE :]
        for i in range(_SIZE):
            block_scales[i] = scale
        for i in range(_SIZE):
            block_lows[i] = low
    for i in range(_SUPER):
        codes[i] = np.int32(wrapping_code((values[i] + lows[i]) / scales[i], top))


@routine
def _keep_codes(
    values: Array, wide: Array, kept: Array, bounded: bool, top: Any, codes: Array
) -> None:
    """Gives blocks whose packed scale is 0 the codes that the search found, as ggml does.

    Args:
        values: float32 `[256]`.
        wide: As `_make_codes` left it.
        kept: The state of the search from the super-block's first lane on.
        bounded: The search rounded with `bounded_code`, not `wrapping_code`.
        top: The largest code, float32.
        codes: uint8 `[256]`.
    """
    for j in range(_BLOCKS):
        if wide[j * _SIZE] == _ZERO:
            inverse, low = kept[KEPT_INVERSE + j], kept[KEPT_LOW + j]
            for i in range(j * _SIZE, (j + 1) * _SIZE):
                value = inverse * (values[i] - low)
                wrapped, clamped = wrapping_code(value, top), bounded_code(value, top)
                codes[i] = np.int32(clamped if bounded else wrapped)


@routine
def _pack_codes(codes: Array, five_bits: bool, target: Array) -> None:
    """Packs 256 codes into what follows the first 16 bytes of a super-block."""
    nibbles = target[_SIZE:] if five_bits else target
    if five_bits:
        for i in range(_SIZE):
            target[i] = 0
    for p in range(_BLOCKS // 2):
        even, odd = codes[2 * p * _SIZE :], codes[(2 * p + 1) * _SIZE :]
        row = nibbles[p * _SIZE : (p + 1) * _SIZE]
        for i in range(_SIZE):
            row[i] = (even[i] & 0xF) | (odd[i] & 0xF) << 4
        if five_bits:
            for i in range(_SIZE):
                target[i] |= (even[i] >> 4) << (2 * p) | (odd[i] >> 4) << (2 * p + 1)


@routine
def _finish(
    values: Array,
    state: Array,
    levels: Array,
    steps: Array,
    bounded: bool,
    five_bits: bool,
    out: Array,
) -> None:
    """Writes the super-blocks of a panel, as many as `out` has rows for."""
    codes, wide = np.empty(_SUPER, np.uint8), np.empty(2 * _SUPER, np.float32)
    top = np.float32(31 if five_bits else 15)
    for s in range(out.shape[0]):
        target, block = out[s], values[s * _SUPER : (s + 1) * _SUPER]
        put_half(target, half_bits(steps[s]))
        put_half(target[2:], half_bits(steps[_SUPERS + s]))
        lane = s * _BLOCKS
        _pack_levels(levels[lane:], levels[LANES + lane :], target[_LEVELS:])
        _make_codes(block, target, top, wide, codes)
        _keep_codes(block, wide, state[lane:], bounded, top, codes)
        _pack_codes(codes, five_bits, target[_CODES:])


@routine
def _take_fits(state: Array, fits: Array) -> None:
    """Collects the scales and minima (ggml's, not below 0) that the search found."""
    for k in range(LANES):
        fits[k] = state[SCALE + k]
        fits[LANES + k] = -state[LOW + k]


@kernel
def quantize_plain(source: Array, source_format: int, five_bits: bool, out: Array) -> Any:
    """`quantize_row_q4_K_ref` or `quantize_row_q5_K_ref`.

    Args:
        source: The weight's bytes as uint16.
        source_format: `BF16`, `F16` or `F32` of floats.py.
        five_bits: Q5_K instead of Q4_K.
        out: Receives uint8 `[super-blocks, 144 or 176]`.

    Returns:
        Whether every value is finite.
    """
    bits = np.empty(_SUPERS * _SUPER, np.int32)
    values = bits.view(np.float32)
    x, w, scratch = np.empty_like(values), np.empty_like(values), np.empty_like(values)
    state = np.zeros(STATE_ROWS * LANES, np.float32)
    fits, levels = np.empty(2 * LANES, np.float32), np.empty(2 * LANES, np.int32)
    steps = np.empty(2 * _SUPERS, np.float32)
    top, first = np.float32(31 if five_bits else 15), np.float32(-0.5 if five_bits else -1)
    tries = 15 if five_bits else 20
    worst = np.int32(0)
    for start in range(0, out.shape[0], _SUPERS):
        worst = max(worst, load_values(source, source_format, start * _SUPER, bits))
        fill_panel(values, x, scratch)
        _plain_weights(x, w, state)
        search_qkx2(x, w, scratch, state, top, first, np.float32(0.1), tries)
        _take_fits(state, fits)
        _plain_levels(fits, levels, steps)
        _finish(values, state, levels, steps, False, five_bits, out[start : start + _SUPERS])
    return worst < INFINITY_BITS


@kernel
def quantize_weighted(
    source: Array, source_format: int, importance: Array, five_bits: bool, out: Array
) -> Any:
    """`quantize_row_q4_K_impl` or `quantize_row_q5_K_impl`, as `quantize_plain`.

    `importance` is float32 `[K]`, a weight for each column.
    """
    bits = np.empty(_SUPERS * _SUPER, np.int32)
    values = bits.view(np.float32)
    weights, x, w = np.empty_like(values), np.empty_like(values), np.empty_like(values)
    scratch = np.empty_like(values)
    state = np.zeros(STATE_ROWS * LANES, np.float32)
    fits, levels = np.empty(2 * LANES, np.float32), np.empty(2 * LANES, np.int32)
    steps = np.empty(2 * _SUPERS, np.float32)
    top, first, step = np.float32(31 if five_bits else 15), np.float32(-0.9), np.float32(0.05)
    worst = np.int32(0)
    for start in range(0, out.shape[0], _SUPERS):
        worst = max(worst, load_values(source, source_format, start * _SUPER, bits))
        fill_panel(values, x, scratch)
        repeat_importance(importance, start, _SUPER, weights)
        _importance_weights(values, weights, steps[:_SUPERS])
        fill_panel(weights, w, scratch)
        search_qkx3(x, w, scratch, state, top, first, step, 36)
        _take_fits(state, fits)
        _weighted_levels(fits, state[SUM_W:], five_bits, levels, steps)
        _finish(values, state, levels, steps, True, five_bits, out[start : start + _SUPERS])
    return worst < INFINITY_BITS


@kernel
def dequantize(blocks: Array, five_bits: bool, out: Array) -> None:
    """`dequantize_row_q4_K` or `dequantize_row_q5_K`.

    Args:
        blocks: uint8 `[super-blocks, 144 or 176]`.
        five_bits: Q5_K instead of Q4_K.
        out: Receives float32 `[super-blocks, 256]`.
    """
    for b in range(blocks.shape[0]):
        packed = blocks[b]
        d, dmin = get_half(packed), get_half(packed[2:])
        high = packed[_CODES : _CODES + _SIZE]
        nibbles = packed[_CODES + (_SIZE if five_bits else 0) :]
        for j in range(_BLOCKS):
            scale = np.float32(d * _packed_scale(packed[_LEVELS:], j))
            low = np.float32(dmin * _packed_low(packed[_LEVELS:], j))
            row = nibbles[j // 2 * _SIZE : (j // 2 + 1) * _SIZE]
            target = out[b, j * _SIZE : (j + 1) * _SIZE]
            for i in range(_SIZE):
                code = np.int32(row[i] >> (j % 2 * 4)) & 0xF
                code |= (np.int32(high[i] >> j) & 1) << 4 if five_bits else 0
                target[i] = scale * np.float32(code) - low
