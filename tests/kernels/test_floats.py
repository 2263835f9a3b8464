"""Casts against ml_dtypes and numpy, over every 16-bit pattern."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from phiconv.kernels.floats import F16_OVERFLOW, cast_rows, cast_transposed

Array = npt.NDArray[Any]

DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)


def expected_cast(values: Array, dtype: Any) -> Array:
    with np.errstate(all="ignore"):
        return values.astype(np.float32).astype(dtype)


def assert_same_bits(actual: Array, expected: Array) -> None:
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual[~nan].view(np.uint8), expected[~nan].view(np.uint8))


def critical_float32() -> Array:
    """float32 values around every boundary of the 16-bit formats, and random patterns."""
    rng = np.random.default_rng(0)
    patterns = [rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)]
    every = np.arange(1 << 16, dtype=np.uint32)
    near = np.array([-0x1001, -0x1000, -0xFFF, -1, 0, 1, 0xFFF, 0x1000, 0x1001], np.int64)
    # halfway between bfloat16 neighbours, and one float32 to either side
    patterns += [(every << 16) + offset for offset in (0x7FFF, 0x8000, 0x8001)]
    # the same for float16 neighbours, normal and subnormal
    halves = every.astype(np.uint16).view(np.float16)
    exact = halves[np.isfinite(halves)].astype(np.float32).view(np.uint32).astype(np.int64)
    patterns += [((exact + offset) & 0xFFFFFFFF).astype(np.uint32) for offset in near]
    steps = np.arange(0, 4096, dtype=np.float64) / 2 * 2.0**-24  # halves of float16's subnormals
    halfway = steps.astype(np.float32)
    patterns += [halfway.view(np.uint32), np.nextafter(halfway, np.float32(1)).view(np.uint32)]
    return np.concatenate(patterns).view(np.float32)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", [ml_dtypes.bfloat16, np.float16])
def test_every_16_bit_pattern(source: Any, target: Any) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(source)
    out = np.empty(values.shape, target)
    scan = cast_rows(values, out)
    assert_same_bits(out, expected_cast(values, target))
    assert not scan.finite
    assert scan.max_abs == np.inf


@pytest.mark.parametrize("target", DTYPES)
def test_float32_at_every_boundary(target: Any) -> None:
    values = critical_float32()
    out = np.empty(values.shape, target)
    cast_rows(values, out)
    assert_same_bits(out, expected_cast(values, target))


def test_the_scan_tells_overflow_from_infinity() -> None:
    values = np.zeros((3, 5000), np.float32)
    out = np.empty(values.shape, np.float16)
    assert cast_rows(values, out) == (True, 0.0)
    for magnitude, overflows in ((65504.0, False), (65519.99, False), (65520.0, True)):
        for sign in (1, -1):
            values[2, 4999] = sign * magnitude
            scan = cast_rows(values, out)
            assert scan == (True, np.float32(magnitude))
            assert (scan.max_abs >= F16_OVERFLOW) == overflows
            assert np.isinf(out[2, 4999]) == overflows
    for poison in (np.inf, -np.inf, np.nan, -np.nan):
        values[2, 4999] = poison
        assert cast_rows(values, out) == (False, np.inf)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_transposed_is_the_transpose(source: Any, target: Any) -> None:
    rng = np.random.default_rng(1)
    for n, k, k0, k1 in ((1, 1, 0, 1), (64, 128, 0, 128), (70, 300, 3, 290), (200, 33, 32, 33)):
        weight = rng.standard_normal((n, k)).astype(source)
        out = np.full((k1 - k0, n), np.nan, target)
        scan = cast_transposed(weight, k0, k1, out)
        columns = weight[:, k0:k1]
        assert_same_bits(out, np.ascontiguousarray(expected_cast(columns, target).T))
        assert scan == (True, np.abs(columns.astype(np.float32)).max())


def test_transposed_scans_its_columns_only() -> None:
    weight = np.zeros((65, 140), np.float16)
    weight[64, 9] = np.nan
    weight[64, 139] = 3.0
    out = np.empty((130, 65), np.float16)
    assert cast_transposed(weight, 10, 140, out) == (True, 3.0)
    assert not cast_transposed(weight, 9, 139, out).finite


def test_empty_and_one_dimensional_arrays() -> None:
    assert cast_rows(np.empty((0, 4), np.float32), np.empty((0, 4), np.float16)) == (True, 0.0)
    norm = np.array([1.5, -2.25], ml_dtypes.bfloat16)
    out = np.empty(2, np.float32)
    assert cast_rows(norm, out) == (True, 2.25)
    np.testing.assert_array_equal(out, [1.5, -2.25])
    empty = np.empty((0, 3), np.float16)
    assert cast_transposed(np.empty((3, 2), np.float32), 1, 1, empty) == (True, 0.0)


def test_refuses_what_does_not_fit() -> None:
    weight = np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match="out has shape"):
        cast_rows(weight, np.zeros((6, 4), np.float16))
    with pytest.raises(ValueError, match="weight must be bfloat16"):
        cast_rows(weight.astype(np.float64), weight)
    with pytest.raises(ValueError, match="out must be C-contiguous"):
        cast_rows(weight, np.zeros((6, 4), np.float32).T)
    with pytest.raises(ValueError, match=r"columns 2\.\.7"):
        cast_transposed(weight, 2, 7, np.zeros((5, 4), np.float32))
    with pytest.raises(ValueError, match="out has shape"):
        cast_transposed(weight, 2, 5, np.zeros((4, 3), np.float32))
