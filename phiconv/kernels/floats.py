"""Casts between bfloat16, float16 and float32, straight or transposed, with the range scan.

All conversions go through float32 bit patterns by integer arithmetic (numba has neither bfloat16
nor, on CPUs, float16), which every vector unit does well and which needs no F16C. Rounding is to
nearest, ties to even, with subnormals and infinities as IEEE 754 has them: bit-exact against
numpy and ml_dtypes for everything but NaN payloads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from phiconv.kernels.jit import kernel, routine

Array = npt.NDArray[Any]

F16_OVERFLOW = 65520.0
"""Finite values of this magnitude and above round to infinity in float16 (its maximum is 65504)."""

BF16, F16, F32 = 0, 1, 2  # formats, as the kernels are told
_CHUNK = 4096  # float32 values a cast holds at a time: 16 KiB, half of the smallest L1 cache
_HEIGHT, _WIDTH = 64, 128  # rows and columns of a transposed tile; 64 = 4**3 for the riffles


class Scan(NamedTuple):
    """What a cast met in its input.

    Attributes:
        finite: Whether no value was NaN or infinite.
        max_abs: Largest magnitude; infinity where `finite` is False. A float16 result overflowed
            if `finite and max_abs >= F16_OVERFLOW`.
    """

    finite: bool
    max_abs: float


@routine
def f16_to_f32(half: Any) -> Any:
    """float32 bits (int32) of float16 bits; NaN becomes some NaN."""
    magnitude = np.int32((half & 0x7FFF) << 13)
    bits = np.int32(magnitude + (112 << 23))
    if magnitude < 0x00800000:  # subnormal: let the FPU normalise it, 2**-14 too high
        raised = np.int32(magnitude + (113 << 23)).view(np.float32)
        bits = np.float32(raised - np.float32(2.0**-14)).view(np.int32)
    if magnitude >= 0x0F800000:  # infinity, NaN
        bits = np.int32(magnitude + (224 << 23))
    return np.int32(bits | ((half & 0x8000) << 16))


@routine
def f32_to_f16(bits: Any) -> Any:
    """float16 bits (int32, 0..65535) nearest to float32 bits, ties to even; NaN stays a NaN."""
    magnitude = np.int32(bits & 0x7FFFFFFF)
    half = np.int32((magnitude + 0xFFF + ((magnitude >> 13) & 1) - (112 << 23)) >> 13)
    if magnitude < 0x38800000:  # below 2**-14: let the FPU round at 2**-24
        shifted = np.float32(magnitude.view(np.float32) + np.float32(0.5))
        half = np.int32(shifted.view(np.int32) - 0x3F000000)
    if magnitude >= 0x477FF000:  # F16_OVERFLOW
        half = np.int32(0x7C00)
    if magnitude > 0x7F800000:
        half = np.int32(0x7E00)
    return np.int32(half | ((bits >> 16) & 0x8000))


@routine
def f32_to_bf16(bits: Any) -> Any:
    """bfloat16 bits (int32, low 16 valid) nearest to float32 bits, ties to even; NaN stays one."""
    rounded = np.int32((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    if (bits & 0x7FFFFFFF) > 0x7F800000:
        rounded = np.int32((bits >> 16) | 0x40)
    return rounded


@routine
def load(source: Array, source_format: int, bits: Array) -> None:
    """Widens `source` (uint16 or uint32 [n]) to float32 bit patterns, int32 [>= n]."""
    if source_format == BF16:
        for i in range(source.shape[0]):
            bits[i] = np.int32(np.int32(source[i]) << 16)
    elif source_format == F16:
        for i in range(source.shape[0]):
            bits[i] = f16_to_f32(np.int32(source[i]))
    else:
        for i in range(source.shape[0]):
            bits[i] = np.int32(source[i])


@routine
def store(bits: Array, target_format: int, target: Array) -> None:
    """Narrows float32 bit patterns, int32 [>= n], to `target` (uint16 or uint32 [n])."""
    if target_format == BF16:
        for i in range(target.shape[0]):
            target[i] = f32_to_bf16(bits[i])
    elif target_format == F16:
        for i in range(target.shape[0]):
            target[i] = f32_to_f16(bits[i])
    else:
        for i in range(target.shape[0]):
            target[i] = bits[i]


@routine
def largest(bits: Array, count: int) -> Any:
    """Largest magnitude among float32 bit patterns, as a pattern (NaN above infinity)."""
    result = np.int32(0)
    for i in range(count):
        magnitude = np.int32(bits[i] & 0x7FFFFFFF)
        result = magnitude if magnitude > result else result
    return result


@kernel
def _cast(source: Array, source_format: int, target: Array, target_format: int) -> Any:
    """Casts a vector; returns the largest magnitude met, as a float32 pattern."""
    bits = np.empty(_CHUNK, np.int32)
    worst = np.int32(0)
    for start in range(0, source.shape[0], _CHUNK):
        chunk = source[start : start + _CHUNK]
        load(chunk, source_format, bits)
        worst = max(worst, largest(bits, chunk.shape[0]))
        store(bits, target_format, target[start : start + _CHUNK])
    return worst


@routine
def copy(source: Array, target: Array) -> None:
    """Copies a vector (slice assignment would check the lengths and not be inlined)."""
    for i in range(target.shape[0]):
        target[i] = source[i]


@routine
def _riffle(source: Array, target: Array, quarter: int) -> None:
    """Interleaves the four quarters of `source`: one of three steps that transpose 64 rows.

    After k steps element (row, column) of `[64, width]` lies where the top 2k bits of its row
    number have moved behind the column. The loop is one long vector shuffle, many times faster
    than strided reads.
    """
    for i in range(quarter):
        target[4 * i] = source[i]
        target[4 * i + 1] = source[quarter + i]
        target[4 * i + 2] = source[2 * quarter + i]
        target[4 * i + 3] = source[3 * quarter + i]


@kernel
def _cast_transposed(
    source: Array,
    source_format: int,
    k0: int,
    columns: int,
    target: Array,
    stride: int,
    target_format: int,
) -> Any:
    """Casts columns `[k0, k0 + columns)` into rows that begin `stride` values apart.

    Returns what `_cast` does.
    """
    rows = source.shape[0]
    raw = np.empty(_HEIGHT * _WIDTH, source.dtype)
    bits = np.empty(_HEIGHT * _WIDTH, np.int32)
    front = np.zeros(_HEIGHT * _WIDTH, target.dtype)
    back = np.empty(_HEIGHT * _WIDTH, target.dtype)
    worst = np.int32(0)
    for n in range(0, rows, _HEIGHT):
        height = min(_HEIGHT, rows - n)
        for k in range(0, columns, _WIDTH):
            width = min(_WIDTH, columns - k)
            for i in range(height):
                copy(source[n + i, k0 + k : k0 + k + width], raw[i * width : (i + 1) * width])
            load(raw[: height * width], source_format, bits)
            worst = max(worst, largest(bits, height * width))
            store(bits, target_format, front[: height * width])
            quarter = _HEIGHT // 4 * width
            _riffle(front, back, quarter)
            _riffle(back, front, quarter)
            _riffle(front, back, quarter)
            for j in range(width):
                start = (k + j) * stride + n
                copy(back[j * _HEIGHT : j * _HEIGHT + height], target[start : start + height])
    return worst


def bit_view(array: Array, name: str) -> tuple[Array, int]:
    """The unsigned integer view of a float array that the kernels take, and its format.

    Args:
        array: C-contiguous; bfloat16 (ml_dtypes, or its bits as uint16), float16 or float32.
        name: What to call the array in an error.

    Raises:
        ValueError: Another dtype, byte order or layout.
    """
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")
    if array.dtype == np.uint16 or array.dtype.name == "bfloat16":
        return array.view(np.uint16), BF16
    if array.dtype == np.float16:
        return array.view(np.uint16), F16
    if array.dtype == np.float32:
        return array.view(np.uint32), F32
    raise ValueError(f"{name} must be bfloat16, float16 or float32, not {array.dtype}")


def _scan(worst: int) -> Scan:
    if worst >= 0x7F800000:
        return Scan(finite=False, max_abs=float("inf"))
    return Scan(finite=True, max_abs=float(np.int32(worst).view(np.float32)))


def cast_rows(weight: Array, out: Array) -> Scan:
    """Casts between bfloat16, float16 and float32 and scans the input's range in the same pass.

    Args:
        weight: Any shape, C-contiguous; bfloat16 (or its bits as uint16), float16 or float32.
        out: Receives the result; same shape, C-contiguous, same choice of dtypes.

    Returns:
        Whether the input is finite, and its largest magnitude.

    Raises:
        ValueError: Shapes, dtypes or layouts do not fit.
    """
    source, source_format = bit_view(weight, "weight")
    target, target_format = bit_view(out, "out")
    if weight.shape != out.shape:
        raise ValueError(f"out has shape {out.shape}, weight has {weight.shape}")
    return _scan(_cast(source.reshape(-1), source_format, target.reshape(-1), target_format))


def load_cast() -> None:
    """Loads the machine code of a cast to float32 ahead of its first call, or compiles it.

    With the first kernel of a process come the parts of numba that run any of them.
    """
    cast_rows(np.zeros(1, np.uint16), np.empty(1, np.float32))


def cast_transposed(weight: Array, k0: int, k1: int, out: Array) -> Scan:
    """Casts columns `[k0, k1)` of a matrix into the rows of `out`, as `cast_rows` casts.

    Args:
        weight: `[N, K]`, C-contiguous; bfloat16 (or its bits as uint16), float16 or float32.
        k0: First column.
        k1: End of the columns.
        out: Receives the result; `[k1 - k0, N]`, same choice of dtypes. Each row is contiguous;
            the rows may lie apart, as those of columns of a larger C-contiguous matrix do.

    Returns:
        Whether those columns are finite, and their largest magnitude.

    Raises:
        ValueError: Shapes, dtypes or layouts do not fit.
    """
    source, source_format = bit_view(weight, "weight")
    if weight.ndim != 2 or not 0 <= k0 <= k1 <= weight.shape[1]:
        raise ValueError(f"columns {k0}..{k1} do not lie in a matrix of shape {weight.shape}")
    columns, rows = k1 - k0, weight.shape[0]
    if out.shape != (columns, rows):
        raise ValueError(f"out has shape {out.shape}, not {(columns, rows)}")
    if not out.size:
        return Scan(finite=True, max_abs=0.0)
    stride, odd = divmod(out.strides[0], out.itemsize) if columns > 1 else (rows, 0)
    if (rows > 1 and out.strides[1] != out.itemsize) or odd or stride < rows:
        raise ValueError("each row of out must be C-contiguous, and the rows in order")
    flat = as_strided(out, ((columns - 1) * stride + rows,), (out.itemsize,))
    target, target_format = bit_view(flat, "out")
    return _scan(
        _cast_transposed(source, source_format, k0, columns, target, stride, target_format)
    )
