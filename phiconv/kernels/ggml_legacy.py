"""ggml's formats with blocks of 32 weights and one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

A block, as ggml-common.h has it:

- float16 `d`, low byte first; Q4_1 and Q5_1 then float16 `m`;
- Q5_0, Q5_1: 4 bytes, bit i (low byte first) being the high bit of code i;
- 16 bytes, byte i having the low 4 bits of code i and, above, of code i + 16.
  Q8_0 instead has its 32 codes as signed bytes.

A weight is `d * (code - 8)` in Q4_0, `d * (code - 16)` in Q5_0, `d * code + m` in Q4_1 and Q5_1,
`d * code` in Q8_0. The bytes are those of `quantize_q4_0` and its siblings in ggml-quants.c, the
values those of `dequantize_row_q4_0` and its siblings. The quantizers with an importance matrix
are in ggml_legacy_weighted.py.

Where a block's numbers are so small that the reciprocal of its step overflows, C leaves it to the
processor what an infinity is as an integer; the codes are then 0 here as on x86-64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.ggml_values import (
    INFINITY_BITS,
    get_half,
    half_bits,
    load_values,
    put_half,
)
from phiconv.kernels.jit import kernel, routine

Array = npt.NDArray[Any]

_SIZE = 32  # weights of a block
_CHUNK = 128  # blocks treated at a time, 16 KiB of float32
_SIGN, _MAGNITUDE = np.int32(-(2**31)), np.int32(2**31 - 1)
_ZERO, _ONE, _INFINITY = np.float32(0), np.float32(1), np.float32(np.inf)
_BELOW_HALF = np.float32(0.49999997)  # the float32 below 0.5
_BIT, _FOURTH = np.uint32(1), np.uint32(4)
_FOUR, _LOW, _ONES = np.uint64(4), np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)
_GATHER = np.uint64(0x0102040810204080)  # times 8 bytes of 0 or 1: their bits, in the top byte


@routine
def _pair_maxima(values: Array, maxima: Array) -> None:
    """The larger of each two neighbours."""
    for i in range(maxima.shape[0]):
        first, second = values[2 * i], values[2 * i + 1]
        maxima[i] = first if first > second else second


@routine
def _block_maxima(values: Array, work: Array, maxima: Array) -> None:
    """Maxima of the blocks of an integer array; `work` is as long and overwritten.

    Halving the whole chunk by pairs keeps every loop long, so that it vectorises; each half has a
    place of its own, as LLVM gives up on loops over two arrays that change places.
    """
    start, count = 0, values.shape[0] // 2
    while count > maxima.shape[0]:
        half = work[start : start + count]
        _pair_maxima(values, half)
        values = half
        start += count
        count //= 2
    _pair_maxima(values, maxima)


@routine
def _first_of_magnitude(block: Array, magnitude: Any) -> Any:
    """The first of a block's float32 patterns that has this magnitude; there is one."""
    i = 0
    while (block[i] & _MAGNITUDE) != magnitude:
        i += 1
    return block[i]


@routine
def _extremes(bits: Array, work: Array, extremes: Array) -> None:
    """The first value of largest magnitude of each block, as a pattern; 0 for -0.

    The patterns of positive numbers are ordered as integers are and those of negative numbers lie
    below 0; as unsigned integers these lie above all others, ordered by magnitude.
    """
    largest = np.empty_like(extremes)
    _block_maxima(bits, work, extremes)
    _block_maxima(bits.view(np.uint32), work.view(np.uint32), largest.view(np.uint32))
    for b in range(extremes.shape[0]):
        positive = max(extremes[b], np.int32(0))
        negative = np.int32(largest[b] & _MAGNITUDE) if largest[b] < 0 else np.int32(0)
        extremes[b] = positive if positive >= negative else np.int32(negative | _SIGN)
        largest[b] = positive if positive == negative else np.int32(0)
    for b in range(extremes.shape[0]):
        if largest[b] > 0:
            extremes[b] = _first_of_magnitude(bits[b * _SIZE :], largest[b])


@routine
def _ordered(bits: Any) -> Any:
    """Maps float32 patterns to integers of the same order and back; -0 lies below 0."""
    return np.int32(bits ^ np.int32((bits >> 31) & _MAGNITUDE))


@routine
def _ranges(bits: Array, order: Array, work: Array, lows: Array, highs: Array) -> None:
    """Minimum and maximum of each block, as patterns; of zeros the first is the minimum."""
    for i in range(bits.shape[0]):
        order[i] = _ordered(bits[i])
    _block_maxima(order, work, highs)
    for i in range(bits.shape[0]):
        order[i] = ~order[i]
    _block_maxima(order, work, lows)
    for b in range(lows.shape[0]):
        highs[b] = _ordered(highs[b])
        zero = lows[b] == 0  # the complement of -0
        lows[b] = _ordered(np.int32(~lows[b]))
        if zero:
            lows[b] = _first_of_magnitude(bits[b * _SIZE :], np.int32(0))


@routine
def _reciprocal(scale: Any) -> Any:
    """1 / scale, but 0 where that is infinite."""
    inverse = _ONE / scale
    return inverse if abs(inverse) < _INFINITY else _ZERO


@routine
def _truncated_code(value: Any, top: Any) -> Any:
    """The integer part, not above `top`; 0 for NaN, which inf - inf gives."""
    code = np.int32(value if value > _ZERO else _ZERO)
    return code if code < top else top


@routine
def write_codes(codes: Array, five_bits: bool, start: int, out: Array) -> None:
    """Packs the codes of consecutive blocks, uint8 `[>= blocks * 32]`, from byte `start` on."""
    words = codes.view(np.uint64)  # 8 codes at once, the first in the lowest byte
    packed = np.empty(2 * out.shape[0], np.uint64)
    for b in range(out.shape[0]):
        packed[2 * b] = (words[4 * b] & _LOW) | (words[4 * b + 2] & _LOW) << _FOUR
        packed[2 * b + 1] = (words[4 * b + 1] & _LOW) | (words[4 * b + 3] & _LOW) << _FOUR
    if five_bits:
        for b in range(out.shape[0]):
            for i in range(4):
                fifth = words[4 * b + i] >> _FOUR & _ONES
                out[b, start + i] = fifth * _GATHER >> np.uint64(56)
        start += 4
    nibbles = packed.view(np.uint8)
    for b in range(out.shape[0]):
        row, block = out[b, start:], nibbles[b * _SIZE // 2 :]
        for i in range(_SIZE // 2):
            row[i] = block[i]


@routine
def _write_nibbles(values: Array, inverses: Array, offsets: Array, out: Array) -> None:
    """Rounds Q4_0's codes and packs them in one loop, so that they stay in registers."""
    top = np.int32(15)
    for b in range(out.shape[0]):
        low, high = values[b * _SIZE :], values[b * _SIZE + _SIZE // 2 :]
        inverse, offset, row = inverses[b], offsets[b], out[b, 2:]
        for i in range(_SIZE // 2):
            lower = _truncated_code(low[i] * inverse + offset, top)
            upper = _truncated_code(high[i] * inverse + offset, top)
            row[i] = lower | upper << 4


@kernel
def quantize_symmetric(source: Array, source_format: int, five_bits: bool, out: Array) -> Any:
    """`quantize_row_q4_0_ref` or `quantize_row_q5_0_ref`.

    Args:
        source: The weight's bytes as uint16.
        source_format: `BF16`, `F16` or `F32` of floats.py.
        five_bits: Q5_0 instead of Q4_0.
        out: Receives uint8 `[blocks, 18 or 22]`.

    Returns:
        Whether every value is finite.
    """
    bits = np.empty(_CHUNK * _SIZE, np.int32)
    values, work = bits.view(np.float32), np.empty_like(bits)
    extremes, inverses = np.empty(_CHUNK, np.int32), np.empty(_CHUNK, np.float32)
    scales, offsets = extremes.view(np.float32), np.empty(_CHUNK, np.float32)
    codes = np.empty(_CHUNK * _SIZE, np.uint8)
    half, top = np.float32(16 if five_bits else 8), np.int32(31 if five_bits else 15)
    worst = np.int32(0)
    for start in range(0, out.shape[0], _CHUNK):
        worst = max(worst, load_values(source, source_format, start * _SIZE, bits))
        _extremes(bits, work, extremes)
        for b in range(_CHUNK):
            scale = scales[b] / -half
            inverse = _reciprocal(scale)
            overflow = (scale != _ZERO) & (inverse == _ZERO)
            scales[b] = scale
            inverses[b] = inverse
            offsets[b] = _ZERO if overflow else half + np.float32(0.5)
        target = out[start : start + _CHUNK]
        for b in range(target.shape[0]):
            put_half(target[b], half_bits(scales[b]))
        if five_bits:
            for b in range(_CHUNK):
                block, row = values[b * _SIZE :], codes[b * _SIZE :]
                inverse, offset = inverses[b], offsets[b]
                for i in range(_SIZE):
                    row[i] = _truncated_code(block[i] * inverse + offset, top)
            write_codes(codes, five_bits, 2, target)
        else:
            _write_nibbles(values, inverses, offsets, target)
    return worst < INFINITY_BITS


@kernel
def quantize_affine(source: Array, source_format: int, five_bits: bool, out: Array) -> Any:
    """`quantize_row_q4_1_ref` or `quantize_row_q5_1_ref`, as `quantize_symmetric`.

    Blocks have 20 or, with `five_bits`, 24 bytes.
    """
    bits = np.empty(_CHUNK * _SIZE, np.int32)
    values, order, work = bits.view(np.float32), np.empty_like(bits), np.empty_like(bits)
    low_bits, high_bits = np.empty(_CHUNK, np.int32), np.empty(_CHUNK, np.int32)
    lows, scales = low_bits.view(np.float32), high_bits.view(np.float32)
    inverses = np.empty(_CHUNK, np.float32)
    codes = np.empty(_CHUNK * _SIZE, np.uint8)
    top = np.int32(31 if five_bits else 15)
    worst = np.int32(0)
    for start in range(0, out.shape[0], _CHUNK):
        worst = max(worst, load_values(source, source_format, start * _SIZE, bits))
        _ranges(bits, order, work, low_bits, high_bits)
        for b in range(_CHUNK):
            scales[b] = (scales[b] - lows[b]) / np.float32(top)
            inverses[b] = _reciprocal(scales[b])
        for b in range(_CHUNK):
            block, target = values[b * _SIZE :], codes[b * _SIZE :]
            inverse, low = inverses[b], lows[b]
            for i in range(_SIZE):
                value = (block[i] - low) * inverse
                target[i] = _truncated_code(value + np.float32(0.5), top)
        target = out[start : start + _CHUNK]
        for b in range(target.shape[0]):
            put_half(target[b], half_bits(scales[b]))
            put_half(target[b, 2:], half_bits(lows[b]))
        write_codes(codes, five_bits, 4, target)
    return worst < INFINITY_BITS


@kernel
def quantize_bytes(source: Array, source_format: int, out: Array) -> Any:
    """`quantize_row_q8_0_ref`, as `quantize_symmetric`; blocks have 34 bytes.

    C rounds halves away from zero; adding the float below one half and truncating does the same,
    where adding one half would lift 0.49999997 to 1.
    """
    bits = np.empty(_CHUNK * _SIZE, np.int32)
    values, magnitudes, work = bits.view(np.float32), np.empty_like(bits), np.empty_like(bits)
    extremes, inverses = np.empty(_CHUNK, np.int32), np.empty(_CHUNK, np.float32)
    scales = extremes.view(np.float32)
    worst = np.int32(0)
    for start in range(0, out.shape[0], _CHUNK):
        worst = max(worst, load_values(source, source_format, start * _SIZE, bits))
        for i in range(bits.shape[0]):
            magnitudes[i] = bits[i] & _MAGNITUDE
        _block_maxima(magnitudes, work, extremes)
        for b in range(_CHUNK):
            scales[b] = scales[b] / np.float32(127)
            inverses[b] = _reciprocal(scales[b])
        for b in range(min(_CHUNK, out.shape[0] - start)):
            block, codes, inverse = values[b * _SIZE :], out[start + b, 2:], inverses[b]
            put_half(out[start + b], half_bits(scales[b]))
            for i in range(_SIZE):
                value = block[i] * inverse
                value += _BELOW_HALF if value > _ZERO else -_BELOW_HALF
                codes[i] = np.int32(value) & 0xFF
    return worst < INFINITY_BITS


@kernel
def dequantize(blocks: Array, five_bits: bool, affine: bool, out: Array) -> None:
    """`dequantize_row_q4_0`, `dequantize_row_q4_1`, `dequantize_row_q5_0`, `dequantize_row_q5_1`.

    Args:
        blocks: uint8 `[blocks, 18, 20, 22 or 24]`.
        five_bits: Q5_0 or Q5_1.
        affine: Q4_1 or Q5_1.
        out: Receives float32 `[blocks, 32]`.
    """
    middle = np.float32(0 if affine else 16 if five_bits else 8)
    for b in range(blocks.shape[0]):
        block = blocks[b]
        scale, low = get_half(block), -_ZERO  # adding -0 changes nothing, not even -0
        codes = block[2:]
        if affine:
            low, codes = get_half(codes), codes[2:]
        high = np.uint32(0)
        if five_bits:
            for i in range(4):
                high |= np.uint32(codes[i]) << np.uint32(8 * i)
            codes = codes[4:]
        for i in range(_SIZE // 2):
            lower = np.uint32(codes[i] & 0xF) | (high >> np.uint32(i) & _BIT) << _FOURTH
            upper = np.uint32(codes[i] >> 4) | (high >> np.uint32(i + 16) & _BIT) << _FOURTH
            out[b, i] = (np.float32(lower) - middle) * scale + low
            out[b, i + 16] = (np.float32(upper) - middle) * scale + low


@kernel
def dequantize_bytes(blocks: Array, out: Array) -> None:
    """`dequantize_row_q8_0`.

    Args:
        blocks: uint8 `[blocks, 34]`.
        out: Receives float32 `[blocks, 32]`.
    """
    for b in range(blocks.shape[0]):
        scale, codes = get_half(blocks[b]), blocks[b, 2:]
        for i in range(_SIZE):
            out[b, i] = np.float32(np.int8(codes[i])) * scale
