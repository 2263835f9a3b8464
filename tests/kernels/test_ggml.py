from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from phiconv.kernels.ggml import TYPES, dequantize_rows, quantize_rows, row_nbytes

Array = npt.NDArray[Any]

QUANTIZED = [name for name in TYPES if name.startswith("Q")]
# Largest error of a value as a part of its block's largest magnitude: half a step, the rounding
# of the scales to float16 or 6 bits, and what the searches give up on single values.
BOUND = {
    "Q4_0": 0.14,
    "Q4_1": 0.07,
    "Q5_0": 0.07,
    "Q5_1": 0.035,
    "Q8_0": 0.0045,
    "Q4_K": 0.12,
    "Q5_K": 0.06,
    "Q6_K": 0.06,
}
# First 16 digits of the sha256 of what ggml on x86-64 makes of `_weight()`, without and with
# `_importance()`.
GGML_DIGESTS = {
    "Q4_0": ["9bd0a487ad9e8ce8", "75013d82864f0c3f"],
    "Q4_1": ["e82d8f5dfdcbe348", "f9b9201cc439182c"],
    "Q5_0": ["f3636f49ae00161e", "d92c618fb80130f7"],
    "Q5_1": ["dffd1186db4ea146", "af89ecf33ba13458"],
    "Q8_0": ["1c6f46cba007f32b", "1c6f46cba007f32b"],
    "Q4_K": ["aafc96e77be33701", "5148fe808bf4b1f9"],
    "Q5_K": ["775fdba0a551d30b", "5b0915f854b0cde7"],
    "Q6_K": ["e058f39cb242b5f9", "b27ace03aeb4cd8f"],
}


def _weight(n: int = 24, k: int = 768) -> Array:
    """Nearly normal values, of nothing but a fixed stream and exact arithmetic."""
    uniform = np.random.RandomState(0).uniform(size=(12, n, k))
    return (uniform.sum(axis=0) - 6).astype(np.float32)


def _importance(k: int = 768) -> Array:
    uniform = np.random.RandomState(1).uniform(size=k)
    return (uniform * uniform * uniform * uniform).astype(np.float32)


def _quantize(weight: Array, type_name: str, importance: Array | None = None) -> Array:
    out = np.zeros((weight.shape[0], row_nbytes(type_name, weight.shape[1])), np.uint8)
    assert quantize_rows(weight, type_name, out, importance)
    return out


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_bytes_are_the_same_on_every_machine(type_name: str) -> None:
    digests = [
        hashlib.sha256(_quantize(_weight(), type_name, importance).tobytes()).hexdigest()[:16]
        for importance in (None, _importance())
    ]
    assert digests == GGML_DIGESTS[type_name]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("type_name", QUANTIZED)
def test_values_come_back_nearly(type_name: str, weighted: bool) -> None:
    weight = _weight()
    blocks = _quantize(weight, type_name, _importance() if weighted else None)
    error = abs(dequantize_rows(blocks, type_name, 768) - weight).reshape(-1, 32)
    largest = abs(weight).reshape(-1, 32).max(axis=1, keepdims=True)
    root_mean_square = np.sqrt(np.mean((error / largest) ** 2))
    assert root_mean_square < BOUND[type_name] / 2
    if not weighted:
        assert (error <= BOUND[type_name] * largest).all()


@pytest.mark.parametrize("type_name", [name for name in QUANTIZED if name != "Q8_0"])
def test_importance_lowers_the_weighted_error(type_name: str) -> None:
    weight, importance = _weight(), _importance()

    def error(blocks: Array) -> float:
        difference = dequantize_rows(blocks, type_name, 768) - weight
        return float((importance * difference**2).sum())

    weighted = error(_quantize(weight, type_name, importance))
    assert weighted < 0.95 * error(_quantize(weight, type_name))


@pytest.mark.parametrize("type_name", TYPES)
def test_chunks_and_threads_do_not_matter(type_name: str) -> None:
    weight, importance = _weight(45), _importance()
    whole = _quantize(weight, type_name, importance)
    parts = [weight[:1], weight[1:20], weight[20:21], weight[21:]]
    with ThreadPoolExecutor(4) as pool:
        pieces = pool.map(lambda part: _quantize(part, type_name, importance), parts)
    np.testing.assert_array_equal(np.concatenate(list(pieces)), whole)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_reported(type_name: str, bad: float) -> None:
    for place in ((0, 0), (3, 500), (23, 767)):
        weight = _weight()
        weight[place] = bad
        out = np.zeros((24, row_nbytes(type_name, 768)), np.uint8)
        assert not quantize_rows(weight, type_name, out)
        assert not quantize_rows(weight, type_name, out, _importance())


@pytest.mark.parametrize("type_name", TYPES)
def test_no_rows(type_name: str) -> None:
    blocks = _quantize(np.empty((0, 256), np.float32), type_name)
    assert dequantize_rows(blocks, type_name, 256).shape == (0, 256)


def test_row_sizes() -> None:
    assert row_nbytes("Q4_0", 96) == 54
    assert row_nbytes("Q6_K", 512) == 420
    assert row_nbytes("BF16", 7) == 14
    with pytest.raises(ValueError, match="Q4_K wants rows in blocks of 256, not of 96 values"):
        row_nbytes("Q4_K", 96)
    with pytest.raises(ValueError, match="'Q3_K' is none of F32, F16, Q4_0"):
        row_nbytes("Q3_K", 256)


def test_arguments_that_do_not_fit() -> None:
    weight, out = _weight(2), np.empty((2, 432), np.uint8)
    with pytest.raises(ValueError, match="out must be C-contiguous uint8 of shape"):
        quantize_rows(weight, "Q4_K", out[:, :-1])
    with pytest.raises(ValueError, match=r"importance must be float32 \[768\]"):
        quantize_rows(weight, "Q4_K", out, _importance(256))
    with pytest.raises(ValueError, match="importance must be float32"):
        quantize_rows(weight, "Q4_K", out, _importance().astype(np.float64))
    with pytest.raises(ValueError, match="weight must be a matrix"):
        quantize_rows(weight[0], "Q4_K", out)
    with pytest.raises(ValueError, match="blocks must be C-contiguous uint8 of shape"):
        dequantize_rows(out, "Q5_K", 768)
