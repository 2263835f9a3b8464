"""Group-wise weight quantization for ONNX Runtime's MatMulNBits, and its inverse.

Format, as the operator `com.microsoft.MatMulNBits` defines it: a row of K weights is cut into
`blocks = ceil(K / block_size)` blocks; a block has one scale, optionally one zero point, and
`block_size` codes of `bits` bits, packed low nibble first. `weight = (code - zero_point) * scale`;
without zero points they are 8 (4 bits) or 128 (8 bits).

The plain rule (`search="none"`) gives the bytes of ONNX Runtime 1.31's own quantizer
(`MlasQuantizeBlockwise`, reached through `quantize_matmul_4bits` and `quantize_matmul_8bits`) on
x86-64, for every finite input; docs/kernels.md states it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from phiconv.kernels.floats import F16, bit_view, f16_to_f32, f32_to_f16, load
from phiconv.kernels.jit import kernel, routine
from phiconv.kernels.plain_rule import (
    asymmetric_rule,
    block_ranges,
    code,
    column_ranges,
    reciprocal_of,
    symmetric_rule,
)
from phiconv.kernels.scale_search import search_scales

Array = npt.NDArray[Any]

BLOCK_SIZES = (16, 32, 64, 128, 256)
_CHUNK = 32  # codes a loop of fixed length makes: two of the smallest blocks


class Layout(NamedTuple):
    """Shapes of a quantized matrix.

    Attributes:
        packed: `(n, blocks, block_size * bits // 8)` bytes.
        scales: `(n, blocks)`.
        zero_points: `(n, ceil(blocks * bits / 8))` bytes.
    """

    packed: tuple[int, int, int]
    scales: tuple[int, int]
    zero_points: tuple[int, int]


def layout(n: int, k: int, *, bits: int, block_size: int) -> Layout:
    """Shapes of the quantized form of an `[n, k]` matrix.

    Raises:
        ValueError: `bits` is not 4 or 8, or `block_size` not one of `BLOCK_SIZES`.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, not {block_size}")
    blocks = -(-k // block_size)
    return Layout((n, blocks, block_size * bits // 8), (n, blocks), (n, -(-blocks * bits // 8)))


@routine
def _load_row(source: Array, source_format: int, half: bool, pattern: Array) -> None:
    """Loads a row as float32 patterns, by way of float16 if `half`."""
    load(source, source_format, pattern)
    if half and source_format != F16:
        for i in range(source.shape[0]):
            pattern[i] = f16_to_f32(f32_to_f16(pattern[i]))


@routine
def _pack_nibbles(
    values: Array, reciprocal: Array, zero: Array, block_shift: int, row: Array
) -> None:
    """Codes of 4 bits for a row whose length is a multiple of `_CHUNK`, two a byte."""
    for i in range(0, values.shape[0], _CHUNK):
        chunk, target = values[i : i + _CHUNK], row[i // 2 : (i + _CHUNK) // 2]
        b0, b1 = i >> block_shift, (i + _CHUNK // 2) >> block_shift
        r0, r1, z0, z1 = reciprocal[b0], reciprocal[b1], zero[b0], zero[b1]
        for j in range(_CHUNK // 2):
            r, z = (r0, z0) if j < _CHUNK // 4 else (r1, z1)
            low = np.int32(code(chunk[2 * j], r, z, np.float32(15)))
            high = np.int32(code(chunk[2 * j + 1], r, z, np.float32(15)))
            target[j] = low | (high << 4)


@routine
def _pack_bytes(
    values: Array, reciprocal: Array, zero: Array, block_shift: int, row: Array
) -> None:
    """Codes of 8 bits for a row whose length is a multiple of `_CHUNK`."""
    for i in range(0, values.shape[0], _CHUNK):
        chunk, target = values[i : i + _CHUNK], row[i : i + _CHUNK]
        b0, b1 = i >> block_shift, (i + _CHUNK // 2) >> block_shift
        r0, r1, z0, z1 = reciprocal[b0], reciprocal[b1], zero[b0], zero[b1]
        for j in range(_CHUNK):
            r, z = (r0, z0) if j < _CHUNK // 2 else (r1, z1)
            target[j] = np.int32(code(chunk[j], r, z, np.float32(255)))


@routine
def _finish_row(row: Array, k: int, bits: int, block_size: int, packed: Array) -> None:
    """Copies packed codes out, the padding zeroed as ONNX Runtime leaves it.

    For odd K it leaves in the last high nibble the one before it, unless a pair of blocks starts
    there; no operator reads that nibble.
    """
    used = k * bits // 8
    if k * bits % 8:
        padding = row[used - 1] & 0xF0 if used % block_size else 0
        row[used] = (row[used] & 0x0F) | padding
        used += 1
    for i in range(packed.shape[0]):
        packed[i] = row[i] if i < used else 0


@routine
def _store_scales(scale: Array, half: bool, scales: Array) -> None:
    """Writes float32 scales as float32 or float16 bits."""
    bits = scale.view(np.int32)
    for b in range(scales.shape[0]):
        scales[b] = f32_to_f16(bits[b]) if half else bits[b]


@routine
def _store_zero_points(zero: Array, blocks: int, bits: int, zero_points: Array) -> None:
    """Writes zero points, for 4 bits two a byte and the one left over beside an 8."""
    for i in range(zero_points.shape[0]):
        if bits == 8:
            zero_points[i] = np.int32(zero[i])
        else:
            low = np.int32(zero[2 * i])
            high = np.int32(zero[2 * i + 1]) if 2 * i + 1 < blocks else np.int32(8)
            zero_points[i] = low | (high << 4)


@kernel
def _quantize(
    source: Array,
    source_format: int,
    packed: Array,
    scales: Array,
    zero_points: Array | None,
    bits: int,
    block_size: int,
    half: bool,
    columns: Array | None,
) -> Any:
    """Quantizes a matrix row by row; a row and its scratch stay in the first-level cache.

    What is None decides at compile time: without `zero_points` the rule is the symmetric one,
    without `columns`, float32 `[block_size, >= blocks]` scratch, no scales are searched.
    """
    blocks = scales.shape[1]
    block_shift = 4
    while 1 << block_shift < block_size:
        block_shift += 1
    padded = blocks * block_size
    length = (padded + _CHUNK - 1) // _CHUNK * _CHUNK
    pattern = np.zeros(length, np.int32)
    values = pattern.view(np.float32)
    folded, spare = np.empty(padded // 2, np.int32), np.empty(padded // 2, np.int32)
    positive, negative = np.empty(blocks, np.int32), np.empty(blocks, np.int32)
    high, low = positive.view(np.float32), negative.view(np.float32)
    lanes = 0
    if columns is not None:
        lanes = columns.shape[1]
    ahead = max(lanes, blocks + 1)  # the fixed-length loops look one block of 16 ahead
    scale, zero = np.zeros(ahead, np.float32), np.zeros(ahead, np.float32)
    reciprocal = np.zeros(ahead, np.float32)
    row = np.empty(length * bits // 8, np.uint8)
    top = np.float32((1 << bits) - 1)
    worst = np.int32(0)
    for r in range(source.shape[0]):
        _load_row(source[r], source_format, half, pattern)
        if columns is not None:
            for j in range(block_size):  # reading with strides is faster than writing with them
                column = columns[j]
                for b in range(blocks):
                    column[b] = values[b * block_size + j]
            column_ranges(columns.view(np.int32), positive, negative)
        else:
            block_ranges(pattern, folded, spare, positive, negative)
        for b in range(blocks):
            worst = max(worst, positive[b], negative[b])
        if zero_points is None:
            symmetric_rule(high, low, values[:padded:block_size], top, half, scale, zero)
        else:
            asymmetric_rule(high, low, top, half, scale, zero)
            _store_zero_points(zero, blocks, bits, zero_points[r])
        for b in range(blocks):
            reciprocal[b] = reciprocal_of(scale[b])
        if columns is not None:
            search_scales(columns, scale[:lanes], reciprocal[:lanes], zero[:lanes], top, half)
        _store_scales(scale, half, scales[r])
        if bits == 4:
            _pack_nibbles(values, reciprocal, zero, block_shift, row)
        else:
            _pack_bytes(values, reciprocal, zero, block_shift, row)
        _finish_row(row, source.shape[1], bits, block_size, packed[r])
    return worst < 0x7F800000


@kernel
def _dequantize(
    packed: Array, scales: Array, zero_points: Array | None, bits: int, block_size: int, out: Array
) -> None:
    """Fills float32 `out` `[n, k]`; arguments as in `_quantize`."""
    n, k = out.shape
    blocks = scales.shape[1]
    half = scales.itemsize == 2
    middle = np.int32(1 << (bits - 1))
    mask = np.int32((1 << bits) - 1)
    for r in range(n):
        row, target = packed[r], out[r]
        for b in range(blocks):
            zero = middle
            if zero_points is not None:
                at = b * bits
                zero = np.int32((zero_points[r, at // 8] >> (at % 8)) & mask)
            scale = np.int32(f16_to_f32(np.int32(scales[r, b])) if half else scales[r, b])
            step = scale.view(np.float32)
            for i in range(b * block_size, min((b + 1) * block_size, k)):
                at = i * bits
                value = np.int32((row[at // 8] >> (at % 8)) & mask)
                target[i] = np.float32(value - zero) * step


def _bit_scales(scales: Array, shape: tuple[int, ...]) -> Array:
    if scales.dtype not in (np.float16, np.float32):
        raise ValueError(f"scales must be float16 or float32, not {scales.dtype}")
    if scales.shape != shape or not scales.flags.c_contiguous:
        raise ValueError(f"scales must be C-contiguous of shape {shape}, not {scales.shape}")
    return scales.view(np.uint16 if scales.dtype == np.float16 else np.uint32)


def _check_bytes(array: Array, shape: tuple[int, ...], name: str) -> None:
    if array.dtype != np.uint8 or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name} must be C-contiguous uint8 of shape {shape},"
            f" not {array.dtype} of shape {array.shape}"
        )


def quantize_rows(
    weight: Array,
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    search: Literal["none", "mse"],
    packed: npt.NDArray[np.uint8],
    scales: Array,
    zero_points: npt.NDArray[np.uint8] | None,
) -> bool:
    """Quantizes rows of a weight as a checkpoint stores it, in one pass over it.

    The dtype of `scales` is the one that the operator computes in: for float16 scales the weight
    is first rounded to float16, as ONNX Runtime's quantizer gets it, and the codes follow from
    the scale as rounded.

    Args:
        weight: `[n, K]`, C-contiguous; bfloat16 (or its bits as uint16), float16 or float32.
        bits: 4 or 8.
        block_size: 16, 32, 64, 128 or 256; the last block of a row is padded with zeros.
        symmetric: The zero point is the middle code, and a scale can be negative; else each block
            has a zero point of its own.
        search: "none": ONNX Runtime's plain rule, to the byte. "mse": where another scale gives a
            block a smaller squared error, that one. Zero points are those of the plain rule.
        packed: Receives the codes; shape as `layout` says.
        scales: Receives the scales, float16 or float32.
        zero_points: Receives the zero points; None if symmetric.

    Returns:
        False if a weight is NaN or infinite, or becomes so in the dtype of the scales; what was
        written is then of no use.

    Raises:
        ValueError: Shapes, dtypes, layouts or parameters do not fit.
    """
    source, source_format = bit_view(weight, "weight")
    if weight.ndim != 2:
        raise ValueError(f"weight must be a matrix, not of shape {weight.shape}")
    if search not in ("none", "mse"):
        raise ValueError(f"search must be 'none' or 'mse', not {search!r}")
    if symmetric != (zero_points is None):
        raise ValueError("zero_points belong to asymmetric quantization, and only to it")
    shapes = layout(*weight.shape, bits=bits, block_size=block_size)
    _check_bytes(packed, shapes.packed, "packed")
    if zero_points is not None:
        _check_bytes(zero_points, shapes.zero_points, "zero_points")
    bit_scales = _bit_scales(scales, shapes.scales)
    columns = None
    if search == "mse":
        lanes = -(-shapes.scales[1] // 16) * 16  # whole vectors
        columns = np.zeros((block_size, lanes), np.float32)
    return bool(
        _quantize(
            source,
            source_format,
            packed.reshape(len(weight), -1),
            bit_scales,
            zero_points,
            bits,
            block_size,
            scales.dtype == np.float16,
            columns,
        )
    )


def dequantize_rows(
    packed: npt.NDArray[np.uint8],
    scales: Array,
    zero_points: npt.NDArray[np.uint8] | None,
    *,
    bits: int,
    block_size: int,
    K: int,  # noqa: N803  # the operator's own name for it
    symmetric: bool,
) -> npt.NDArray[np.float32]:
    """The weights that `quantize_rows` output stands for: `(code - zero_point) * scale`.

    Args:
        packed: Codes; shapes as `layout` says.
        scales: float16 or float32.
        zero_points: None if symmetric.
        bits: 4 or 8.
        block_size: 16, 32, 64, 128 or 256.
        K: Weights a row.
        symmetric: Zero points are the middle code.

    Returns:
        float32 `[n, K]`; the product is rounded to float32 once.

    Raises:
        ValueError: Shapes, dtypes, layouts or parameters do not fit.
    """
    if symmetric != (zero_points is None):
        raise ValueError("zero_points belong to asymmetric quantization, and only to it")
    n = len(packed)
    shapes = layout(n, K, bits=bits, block_size=block_size)
    _check_bytes(packed, shapes.packed, "packed")
    if zero_points is not None:
        _check_bytes(zero_points, shapes.zero_points, "zero_points")
    out = np.empty((n, K), np.float32)
    bit_scales = _bit_scales(scales, shapes.scales)
    _dequantize(packed.reshape(n, -1), bit_scales, zero_points, bits, block_size, out)
    return out
