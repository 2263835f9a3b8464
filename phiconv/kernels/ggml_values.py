"""What ggml's block formats are read from and written with: float32 values, float16 scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.floats import F32, f16_to_f32, f32_to_f16, largest, load
from phiconv.kernels.jit import routine

Array = npt.NDArray[Any]

INFINITY_BITS = np.int32(0x7F800000)
"""float32 pattern of infinity: magnitudes at or above it are not finite."""


@routine
def load_values(source: Array, source_format: int, start: int, bits: Array) -> Any:
    """Loads the values from `start` on as float32 patterns; zeros follow the last one.

    Args:
        source: The weight's bytes as uint16, two a value if it is float32.
        source_format: `BF16`, `F16` or `F32`.
        start: First value.
        bits: Receives int32 patterns.

    Returns:
        The largest magnitude loaded, as a pattern.
    """
    words = 2 if source_format == F32 else 1
    count = min(bits.shape[0], source.shape[0] // words - start)
    if source_format == F32:
        values = source[2 * start : 2 * (start + count)].view(np.int32)
        for i in range(count):
            bits[i] = values[i]
    else:
        load(source[start : start + count], source_format, bits)
    for i in range(count, bits.shape[0]):
        bits[i] = np.int32(0)
    return largest(bits, bits.shape[0])


@routine
def _riffle(source: Array, target: Array) -> None:
    """Interleaves the four quarters of `source`: one long vector shuffle."""
    quarter = source.shape[0] // 4
    first, second = source[:quarter], source[quarter : 2 * quarter]
    third, fourth = source[2 * quarter : 3 * quarter], source[3 * quarter :]
    for i in range(quarter):
        target[4 * i] = first[i]
        target[4 * i + 1] = second[i]
        target[4 * i + 2] = third[i]
        target[4 * i + 3] = fourth[i]


@routine
def fill_panel(values: Array, panel: Array, spare: Array) -> None:
    """Transposes values, block after block, into a panel of the search, block beside block.

    64 rows are a transposition of three steps of 4, each many times faster than strided reads.

    Args:
        values: float32 `[LANES * size]`.
        panel: float32 `[size * LANES]`, overwritten.
        spare: Likewise.
    """
    _riffle(values, panel)
    _riffle(panel, spare)
    _riffle(spare, panel)


@routine
def sum_squares(values: Array, sums: Array) -> None:
    """Sums of the squares of equal parts of `values`, each in the order of its values.

    The parts are summed side by side, as no sum of one part can begin before the last is known.

    Args:
        values: float32, the parts one after the other.
        sums: Receives float32 `[parts]`.
    """
    size = values.shape[0] // sums.shape[0]
    for p in range(sums.shape[0]):
        sums[p] = np.float32(0)
    for i in range(size):
        column = values[i:]
        for p in range(sums.shape[0]):
            sums[p] += column[p * size] * column[p * size]


@routine
def repeat_importance(importance: Array, start: int, group: int, values: Array) -> None:
    """Lays the importance of each group's columns beside its values.

    Args:
        importance: float32 `[K]`.
        start: First group; K / group groups make a row of the weight.
        group: Values of a group.
        values: float32, a multiple of `group`; overwritten.
    """
    groups_per_row = importance.shape[0] // group
    for s in range(values.shape[0] // group):
        column = (start + s) % groups_per_row * group
        source, target = importance[column : column + group], values[s * group :]
        for i in range(group):
            target[i] = source[i]


@routine
def half_bits(value: Any) -> Any:
    """float16 bits (int32) nearest to a float32 value."""
    return f32_to_f16(np.float32(value).view(np.int32))


@routine
def put_half(target: Array, bits: Any) -> None:
    """Writes float16 bits to the first two bytes, low byte first."""
    target[0] = bits & 0xFF
    target[1] = bits >> 8


@routine
def get_half(source: Array) -> Any:
    """float32 value of the float16 in the first two bytes."""
    bits = f16_to_f32(np.int32(np.int32(source[0]) | np.int32(source[1]) << 8))
    return np.int32(bits).view(np.float32)
