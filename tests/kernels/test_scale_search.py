"""The error-minimising scale: never worse than the plain one, and close to the best there is."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from tests.kernels import adversarial
from tests.kernels.matmulnbits_reference import dequantize, quantize

Array = npt.NDArray[Any]

VARIANTS = [(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]


def block_errors(
    weight: Array, search: str, *, bits: int, block_size: int, symmetric: bool, half: bool
) -> Array:
    """Squared error of each block, `[n, blocks]`, in float64, against what the kernel is given."""
    how: dict[str, Any] = {"bits": bits, "block_size": block_size}
    quantized, finite = quantize(weight, symmetric=symmetric, search=search, half=half, **how)
    assert finite
    exact = weight.astype(np.float16 if half else np.float32).astype(np.float64)
    with np.errstate(all="ignore"):
        difference = dequantize(quantized, k=weight.shape[1], **how).astype(np.float64) - exact
    padding = -weight.shape[1] % block_size
    squares = np.pad(difference, ((0, 0), (0, padding))) ** 2
    result: Array = squares.reshape(len(weight), -1, block_size).sum(axis=2)
    return result


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), VARIANTS)
def test_no_block_gets_worse(bits: int, symmetric: bool, half: bool) -> None:
    rng = np.random.default_rng(0)
    for block_size in (16, 32, 128):
        k = 2 * block_size + 11
        weights = [
            rng.standard_normal((40, k)).astype(ml_dtypes.bfloat16),
            rng.standard_t(3, (40, k)).astype(np.float32),
            (rng.standard_normal((40, k)) * 1e-6).astype(np.float16),
            adversarial.rows(k, np.float16, seed=block_size),
        ]
        if not half:
            weights.append(adversarial.rows(k, np.float32, seed=block_size))
        for weight in weights:
            how: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "half": half}
            plain = block_errors(weight, "none", block_size=block_size, **how)
            found = block_errors(weight, "mse", block_size=block_size, **how)
            comparable = np.isfinite(plain)  # a range beyond float32 dequantizes to infinity
            assert np.all(found[comparable] <= plain[comparable])


@pytest.mark.parametrize(
    ("bits", "symmetric", "block_size", "at_most"),
    [
        (4, True, 32, 0.90),
        (4, True, 128, 0.89),
        (4, False, 32, 0.91),
        (4, False, 128, 0.90),
        (8, True, 32, 0.82),
        (8, True, 128, 0.94),
        (8, False, 32, 0.80),
    ],
)
def test_lowers_the_error_of_normal_weights(
    bits: int, symmetric: bool, block_size: int, at_most: float
) -> None:
    weight = np.random.default_rng(1).standard_normal((256, 1024)).astype(ml_dtypes.bfloat16)
    how: dict[str, Any] = {"bits": bits, "symmetric": symmetric, "half": False}
    plain = block_errors(weight, "none", block_size=block_size, **how).sum()
    found = block_errors(weight, "mse", block_size=block_size, **how).sum()
    assert found / plain < at_most


def test_is_close_to_an_exhaustive_search() -> None:
    """Against 800 scales of both signs for every block, each refitted to its codes."""
    weight = np.random.default_rng(2).standard_normal((64, 128)).astype(np.float32)
    blocks = weight.reshape(-1, 32).astype(np.float64)
    best = np.full(len(blocks), np.inf)
    largest = np.abs(blocks).max(axis=1)
    for steps in np.linspace(5, 11, 400):
        for sign in (-1, 1):
            codes = np.clip(np.rint(blocks * (sign * steps / largest)[:, None]), -8, 7)
            scale = (blocks * codes).sum(axis=1) / np.maximum((codes * codes).sum(axis=1), 1e-9)
            best = np.minimum(best, ((blocks - scale[:, None] * codes) ** 2).sum(axis=1))
    found = block_errors(weight, "mse", bits=4, block_size=32, symmetric=True, half=False).sum()
    assert best.sum() <= found * (1 + 1e-6)
    assert found < 1.01 * best.sum()


def test_keeps_zero_points_and_exact_blocks() -> None:
    """A block that the plain rule represents exactly keeps its bytes."""
    weight = np.tile(np.arange(-8, 8, dtype=np.float32), (3, 4))
    how: dict[str, Any] = {"bits": 4, "block_size": 16, "symmetric": True}
    plain, _ = quantize(weight, search="none", **how)
    found, _ = quantize(weight, search="mse", **how)
    np.testing.assert_array_equal(plain.packed, found.packed)
    np.testing.assert_array_equal(plain.scales, found.scales)
    weight = np.random.default_rng(3).standard_normal((4, 160)).astype(np.float32)
    how["symmetric"] = False
    plain, _ = quantize(weight, search="none", **how)
    found, _ = quantize(weight, search="mse", **how)
    assert plain.zero_points is not None
    assert found.zero_points is not None
    np.testing.assert_array_equal(plain.zero_points, found.zero_points)
    assert np.any(plain.scales != found.scales)
