"""Integer codes packed eight (or four) to an int32, as AutoAWQ and GPTQ checkpoints store them.

Both store a weight transposed, [K, N]. GPTQ packs along K: the item at [r, n] holds the codes of
input features r*p to r*p + p-1 of output n, the first in the lowest bits (p = 32 / bits); AutoAWQ's
layout gemm packs 4-bit codes along N: the item at [k, c] holds those of outputs 8c + 0, 2, 4, 6, 1,
3, 5, 7, in this order from the lowest bits (`WQLinear_GEMM.from_linear`). MatMulNBits wants [N, K]
with consecutive codes of a row in consecutive bits, so GPTQ's items only change places.

Zero points are packed along N in both, in AWQ's order and in the plain one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.jit import kernel

Array = npt.NDArray[Any]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight consecutive outputs the i-th nibble of an item belongs to."""

_TILE = 64  # rows of two codes: the items read together stay in the first-level cache


def unpack_gptq(qweight: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Codes of a GPTQ weight in rows of outputs.

    Args:
        qweight: `[K * bits / 32, N]`.

    Returns:
        `[N, K * bits / 8]` bytes, MatMulNBits' order.
    """
    items = np.ascontiguousarray(qweight.T).astype("<i4", copy=False)
    return items.view(np.uint8)


@kernel
def _unpack_awq(items: Array, out: Array, order: Array) -> None:
    pairs, columns = out.shape[1], items.shape[1]
    for start in range(0, pairs, _TILE):
        stop = min(start + _TILE, pairs)
        for c in range(columns):
            for i in range(8):
                row = out[8 * c + order[i]]
                shift = np.uint32(4 * i)
                for k in range(start, stop):
                    low = (items[2 * k, c] >> shift) & np.uint32(15)
                    high = (items[2 * k + 1, c] >> shift) & np.uint32(15)
                    row[k] = low | (high << np.uint32(4))


@kernel
def _pack_awq(codes: Array, out: Array, order: Array) -> None:
    pairs, columns = codes.shape[1], out.shape[1]
    for start in range(0, pairs, _TILE):
        stop = min(start + _TILE, pairs)
        for c in range(columns):
            for k in range(start, stop):
                low, high = np.uint32(0), np.uint32(0)
                for i in range(8):
                    byte = np.uint32(codes[8 * c + order[i], k])
                    shift = np.uint32(4 * i)
                    low |= (byte & np.uint32(15)) << shift
                    high |= (byte >> np.uint32(4)) << shift
                out[2 * k, c], out[2 * k + 1, c] = low, high


def unpack_awq(qweight: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
    """Codes of an AWQ weight in rows of outputs; inverse of `pack_awq`.

    Args:
        qweight: `[K, N / 8]`, K even.

    Returns:
        `[N, K / 2]` bytes, MatMulNBits' order: the lower nibble first.
    """
    k, columns = qweight.shape
    out = np.empty((8 * columns, k // 2), np.uint8)
    items = np.ascontiguousarray(qweight).view(np.uint32)
    _unpack_awq(items, out, np.array(AWQ_ORDER, np.int64))
    return out


def pack_awq(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Packs codes of 4 bits as AutoAWQ's layout gemm has them.

    Args:
        codes: `[N, K / 2]` bytes, the lower nibble first; N a multiple of 8.

    Returns:
        int32 `[K, N / 8]`.
    """
    n, pairs = codes.shape
    out = np.empty((2 * pairs, n // 8), np.uint32)
    _pack_awq(np.ascontiguousarray(codes), out, np.array(AWQ_ORDER, np.int64))
    return out.view(np.int32)


def unpack_zero_points(
    qzeros: npt.NDArray[np.int32], *, bits: int, awq_order: bool
) -> npt.NDArray[np.uint8]:
    """Zero points of each group, one a byte, as stored.

    Args:
        qzeros: `[groups, N * bits / 32]`.
        bits: 4 or 8.
        awq_order: Whether nibbles lie in AWQ's order; 4 bits only.

    Returns:
        `[N, groups]`.
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    items = np.ascontiguousarray(qzeros).view(np.uint32)
    values = (items[:, :, None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.uint8)
    if awq_order:
        values = values[:, :, np.argsort(AWQ_ORDER)]
    return np.ascontiguousarray(values.reshape(len(qzeros), -1).T)


def pack_zero_points_awq(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Packs zero points of 4 bits in AWQ's order.

    Args:
        values: `[N, groups]`, one a byte; N a multiple of 8.

    Returns:
        int32 `[groups, N / 8]`.
    """
    ordered = values.T.reshape(values.shape[1], -1, 8)[:, :, AWQ_ORDER].astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    packed: npt.NDArray[np.uint32] = np.bitwise_or.reduce(ordered << shifts, axis=-1)
    return packed.view(np.int32)


def block_zero_points(values: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs zero points as MatMulNBits has them.

    Args:
        values: `[N, blocks]`, one a byte.
        bits: 4 (two a byte, the one left over beside an 8) or 8.

    Returns:
        `[N, ceil(blocks * bits / 8)]`.
    """
    if bits == 8:
        return np.ascontiguousarray(values)
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)), constant_values=8)
    return np.ascontiguousarray(values[:, ::2] | values[:, 1::2] << 4)


def unpack_block_zero_points(
    packed: npt.NDArray[np.uint8], *, bits: int, blocks: int
) -> npt.NDArray[np.uint8]:
    """Inverse of `block_zero_points`: `[N, blocks]`, one a byte."""
    if bits == 8:
        return packed
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    return np.ascontiguousarray(pairs.reshape(len(packed), -1)[:, :blocks])
