"""The kernel that reads weights through an overlay, against NumPy in the same order."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from phiconv.kernels.overlay import MAX_CLIP, scale_rows


def _expected(
    weight: np.ndarray,
    columns: np.ndarray,
    rows: np.ndarray,
    clip: np.ndarray | None,
    group_size: int,
) -> np.ndarray:
    out = (weight.astype(np.float32) * columns[None]) * rows[:, None]
    for group in range(0 if clip is None else clip.shape[1]):
        part = out[:, group * group_size : (group + 1) * group_size]
        share = (np.float32(20) - clip[:, group].astype(np.float32)) / np.float32(20)
        limit = (np.abs(part).max(1) * share)[:, None]
        part[...] = np.clip(part, -limit, limit)
    return out


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("columns", [64, 100, 33])
def test_equals_numpy_to_the_bit(dtype: type, columns: int) -> None:
    rng = np.random.default_rng(columns)
    weight = rng.standard_normal((17, columns)).astype(np.float32).astype(dtype)
    factors = np.exp(rng.standard_normal(columns)).astype(np.float32)
    rows = np.exp(rng.standard_normal(17)).astype(np.float32)
    clip = rng.integers(0, MAX_CLIP + 1, (17, -(-columns // 32)), np.uint8)
    for limits in (None, clip):
        out = np.empty(weight.shape, np.float32)
        scale_rows(weight, out, columns=factors, rows=rows, clip=limits, group_size=32)
        expected = _expected(weight, factors, rows, limits, 32)
        np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_keeps_what_is_not_finite() -> None:
    weight = np.array([[1.0, np.nan, -2.0, 4.0], [1.0, np.inf, -2.0, 4.0]], np.float32)
    out = np.empty_like(weight)
    ones = np.ones(4, np.float32)
    clip = np.full((2, 1), MAX_CLIP, np.uint8)
    scale_rows(weight, out, columns=ones, rows=ones[:2], clip=clip, group_size=4)
    np.testing.assert_array_equal(out, weight)


def test_refuses_what_does_not_fit() -> None:
    weight, out = np.ones((2, 8), np.float32), np.empty((2, 8), np.float32)
    rows, columns = np.ones(2, np.float32), np.ones(8, np.float32)
    with pytest.raises(ValueError, match="columns must be"):
        scale_rows(weight, out, columns=columns[:7], rows=rows)
    with pytest.raises(ValueError, match="rows must be"):
        scale_rows(weight, out, columns=columns, rows=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="clip must be"):
        clip = np.zeros((2, 3), np.uint8)
        scale_rows(weight, out, columns=columns, rows=rows, clip=clip, group_size=4)
    with pytest.raises(ValueError, match="out has shape"):
        scale_rows(weight, out[:1], columns=columns, rows=rows)
    with pytest.raises(ValueError, match="C-contiguous float32"):
        scale_rows(weight, np.empty((2, 8), np.float64), columns=columns, rows=rows)  # type: ignore[arg-type]
