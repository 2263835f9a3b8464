from __future__ import annotations

import numpy as np
import pytest

from phiconv.kernels.int32_packing import (
    block_zero_points,
    pack_awq,
    pack_zero_points_awq,
    unpack_awq,
    unpack_block_zero_points,
    unpack_gptq,
    unpack_zero_points,
)
from tests.quantized_checkpoints import AWQ_ORDER, _along_rows


def codes(shape: tuple[int, int], bits: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1 << bits, shape, dtype=np.uint8)


def in_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """[K, N] codes as MatMulNBits has them: [N, K * bits / 8]."""
    rows = values.T
    return np.ascontiguousarray(rows[:, ::2] | rows[:, 1::2] << 4 if bits == 4 else rows)


@pytest.mark.parametrize("shape", [(32, 8), (258, 24), (512, 136)])
def test_awq_weights(shape: tuple[int, int]) -> None:
    values = codes(shape, 4)
    qweight = _along_rows(values, 4, AWQ_ORDER)
    rows = unpack_awq(qweight)
    assert np.array_equal(rows, in_rows(values, 4))
    assert np.array_equal(pack_awq(rows), qweight)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_weights(bits: int) -> None:
    values = codes((96, 24), bits)
    qweight = np.ascontiguousarray(_along_rows(values.T, bits, list(range(32 // bits))).T)
    assert np.array_equal(unpack_gptq(qweight), in_rows(values, bits))


@pytest.mark.parametrize(("bits", "awq_order"), [(4, True), (4, False), (8, False)])
def test_zero_points(bits: int, awq_order: bool) -> None:
    values = codes((5, 32), bits)
    order = AWQ_ORDER if awq_order else list(range(32 // bits))
    qzeros = _along_rows(values, bits, order)
    unpacked = unpack_zero_points(qzeros, bits=bits, awq_order=awq_order)
    assert np.array_equal(unpacked, values.T)
    if awq_order:
        assert np.array_equal(pack_zero_points_awq(unpacked), qzeros)


@pytest.mark.parametrize("blocks", [1, 4, 7])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_blocks(bits: int, blocks: int) -> None:
    values = codes((6, blocks), bits)
    packed = block_zero_points(values, bits)
    assert packed.shape == (6, -(-blocks * bits // 8))
    assert np.array_equal(unpack_block_zero_points(packed, bits=bits, blocks=blocks), values)
    if bits == 4 and blocks % 2:
        assert (packed[:, -1] >> 4 == 8).all()
