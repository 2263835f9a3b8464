"""Every format against ggml's own quantizer and dequantizer, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from phiconv.kernels.ggml import TYPES, dequantize_rows, quantize_rows, row_nbytes
from tests import llama_cpp_oracle

pytestmark = pytest.mark.skipif(
    llama_cpp_oracle.missing() is not None, reason=str(llama_cpp_oracle.missing())
)

Array = npt.NDArray[Any]
Generator = np.random.Generator

QUANTIZED = [name for name in TYPES if name.startswith("Q")]


def _blocks(values: Array) -> Array:
    """Repeats each column 32 times."""
    return values.repeat(32, axis=1)


def _near_constant(rng: Generator, n: int, k: int) -> Array:
    """Blocks whose values differ by a few units in the last place."""
    base = _blocks(rng.standard_normal((n, k // 32), np.float32))
    return (base.view(np.int32) + rng.integers(-2, 3, (n, k), np.int32)).view(np.float32)


def _any_bits(rng: Generator, n: int, k: int) -> Array:
    values = rng.integers(0, 2**32, (n, k), np.uint32).view(np.float32)
    return np.where(np.isfinite(values), values, np.float32(0))


def _scaled(rng: Generator, n: int, k: int, low: float, high: float, columns: int) -> Array:
    """Normal values, each row or block on a scale of its own between powers of ten."""
    powers = 10.0 ** rng.uniform(low, high, (n, columns)).repeat(k // columns, axis=1)
    return np.clip(rng.standard_normal((n, k)) * powers, -3.4e38, 3.4e38)


DISTRIBUTIONS: dict[str, Callable[[Generator, int, int], Array]] = {
    "normal": lambda rng, n, k: rng.standard_normal((n, k)) * 0.02,
    "heavy tails": lambda rng, n, k: rng.standard_t(1.2, (n, k)) * 0.02,
    "zero": lambda rng, n, k: np.zeros((n, k)),
    "negative zero": lambda rng, n, k: np.full((n, k), -0.0),
    "mostly zeros of both signs": lambda rng, n, k: np.where(
        rng.random((n, k)) < 0.95, rng.choice([0.0, -0.0], (n, k)), rng.standard_normal((n, k))
    ),
    "constant blocks": lambda rng, n, k: _blocks(rng.standard_normal((n, k // 32))),
    "near-constant blocks": _near_constant,
    "two values": lambda rng, n, k: rng.choice([-0.7, 0.7], (n, k)),
    "integers": lambda rng, n, k: rng.integers(-8, 9, (n, k)) * 0.25,
    "negative only": lambda rng, n, k: -abs(rng.standard_normal((n, k))) - 3,
    "positive only": lambda rng, n, k: abs(rng.standard_normal((n, k))) + 3,
    "one outlier": lambda rng, n, k: np.where(
        np.arange(k) % 256 == 77, 1e4, rng.standard_normal((n, k)) * 1e-3
    ),
    "subnormal": lambda rng, n, k: _scaled(rng, n, k, -46, -36, 1),
    "tiny": lambda rng, n, k: _scaled(rng, n, k, -36, -10, 1),
    "huge": lambda rng, n, k: _scaled(rng, n, k, 3, 38, 1),
    "blocks of all scales": lambda rng, n, k: _scaled(rng, n, k, -20, 5, k // 32),
    "any bits": _any_bits,
}

IMPORTANCE: dict[str, Callable[[Generator, int], Array | None]] = {
    "none": lambda rng, k: None,
    "random": lambda rng, k: rng.random(k) ** 4,
    "ones": lambda rng, k: np.ones(k),
    "some zeros": lambda rng, k: np.where(rng.random(k) < 0.7, 0, rng.random(k)),
    "zeros": lambda rng, k: np.zeros(k),
    "extreme": lambda rng, k: 10.0 ** rng.uniform(-38, 38, k),
    "few": lambda rng, k: np.where(rng.random(k) < 0.05, 1e6, rng.random(k)),
}


def _quantize(weight: Array, type_name: str, importance: Array | None) -> Array:
    out = np.full((weight.shape[0], row_nbytes(type_name, weight.shape[1])), 0xAA, np.uint8)
    assert quantize_rows(weight, type_name, out, importance)
    return out


def _assert_as_ggml(weight: Array, type_name: str, importance: Array | None) -> None:
    expected = llama_cpp_oracle.quantize(weight.astype(np.float32), type_name, importance)
    np.testing.assert_array_equal(_quantize(weight, type_name, importance), expected)


@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("type_name", QUANTIZED)
def test_bytes_are_ggmls(type_name: str, importance: str) -> None:
    for seed, distribution in enumerate(DISTRIBUTIONS.values()):
        rng = np.random.default_rng(seed)
        for n, k in ((1, 256), (5, 768), (19, 512)):
            weight = np.ascontiguousarray(distribution(rng, n, k), np.float32)
            columns = IMPORTANCE[importance](rng, k)
            if columns is not None:
                columns = columns.astype(np.float32)
            _assert_as_ggml(weight, type_name, columns)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("type_name", QUANTIZED)
def test_weights_as_stored(type_name: str, dtype: npt.DTypeLike) -> None:
    rng = np.random.default_rng(3)
    for scale in (1e-6, 0.02, 100):
        weight = (rng.standard_normal((7, 1024)) * scale).astype(dtype)
        _assert_as_ggml(weight, type_name, None)
        _assert_as_ggml(weight, type_name, rng.random(1024, np.float32))


@pytest.mark.parametrize("type_name", [name for name in QUANTIZED if TYPES[name].block_size == 32])
def test_rows_not_divisible_by_256(type_name: str) -> None:
    rng = np.random.default_rng(4)
    for k in (32, 96, 2080):
        weight = rng.standard_normal((37, k), np.float32)
        _assert_as_ggml(weight, type_name, None)
        _assert_as_ggml(weight, type_name, rng.random(k, np.float32))


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16"])
def test_floats_are_ggmls(type_name: str) -> None:
    rng = np.random.default_rng(5)
    for distribution in DISTRIBUTIONS.values():
        weight = np.ascontiguousarray(distribution(rng, 3, 512), np.float32)
        _assert_as_ggml(weight, type_name, None)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SUBNORMAL = st.floats(-(2.0**-126), 2.0**-126, width=32)
TIES = st.sampled_from([-1, -0.5, -0.0, 0.0, 0.5, 1])


@pytest.mark.parametrize("type_name", QUANTIZED)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    row=st.one_of(arrays(np.float32, (1, 256), elements=e) for e in (FINITE, SUBNORMAL, TIES)),
    weighted=st.booleans(),
)
def test_bytes_are_ggmls_for_whatever_hypothesis_finds(
    type_name: str, row: Array, weighted: bool
) -> None:
    importance = np.arange(256, dtype=np.float32) % 5 if weighted else None
    _assert_as_ggml(row, type_name, importance)


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_values_are_ggmls(type_name: str) -> None:
    rng = np.random.default_rng(6)
    weights = [distribution(rng, 4, 512) for distribution in DISTRIBUTIONS.values()]
    blocks = _quantize(np.concatenate(weights).astype(np.float32), type_name, None)
    random = rng.integers(0, 256, blocks.shape, np.uint8)
    for source in (blocks, random):
        values = dequantize_rows(source, type_name, 512)
        expected = llama_cpp_oracle.dequantize(source, type_name, 512)
        both_nan = np.isnan(values) & np.isnan(expected)
        same = (values.view(np.uint32) == expected.view(np.uint32)) | both_nan
        assert same.all()
