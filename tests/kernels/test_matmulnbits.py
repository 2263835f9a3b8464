"""The plain rule against ONNX Runtime's quantizer, the inverse against its operator."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phiconv.kernels.matmulnbits import BLOCK_SIZES, dequantize_rows, layout, quantize_rows
from tests.kernels import adversarial
from tests.kernels.matmulnbits_reference import (
    Quantized,
    dequantize,
    ort_operator,
    ort_quantize,
    plain_rule,
    quantize,
    unpack,
)

Array = npt.NDArray[Any]

STORED = (ml_dtypes.bfloat16, np.float16, np.float32)
VARIANTS = [(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]


def assert_same_bytes(actual: Quantized, expected: Quantized) -> None:
    for name, ours, theirs in zip(Quantized._fields, actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8), name)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("bits", "symmetric"), VARIANTS)
def test_bytes_of_normal_weights(bits: int, symmetric: bool, stored: Any, half: bool) -> None:
    rng = np.random.default_rng(1)
    for block_size in BLOCK_SIZES:
        for k in (4 * block_size, 3 * block_size, 2 * block_size + 6, block_size + 7, 5):
            weight = (rng.standard_normal((6, k)) * 0.05).astype(stored)
            given_to_ort = weight.astype(np.float16 if half else np.float32)
            how: dict[str, Any] = {"bits": bits, "block_size": block_size, "symmetric": symmetric}
            actual, finite = quantize(weight, half=half, **how)
            assert finite
            assert_same_bytes(actual, ort_quantize(given_to_ort, **how))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("bits", "symmetric"), VARIANTS)
def test_bytes_of_adversarial_weights(bits: int, symmetric: bool, dtype: Any) -> None:
    for block_size in BLOCK_SIZES:
        for k in (3 * block_size, block_size + 9, 2 * block_size + 1):
            weight = adversarial.rows(k, dtype, seed=block_size)
            how: dict[str, Any] = {"bits": bits, "block_size": block_size, "symmetric": symmetric}
            actual, finite = quantize(weight, half=dtype is np.float16, **how)
            assert finite
            assert_same_bytes(actual, ort_quantize(weight, **how))


SPECIAL = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.49999997, 7.5, -7.5, 15.0, -8.0, 127.5, 1e-7, -6e-8, 3e-5]
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(SPECIAL | st.floats(-60000, 60000, width=16), min_size=1, max_size=70),
    st.sampled_from(VARIANTS),
    st.sampled_from([16, 32]),
    st.booleans(),
)
def test_bytes_of_any_row(
    values: list[float], variant: tuple[int, bool], block_size: int, half: bool
) -> None:
    weight = np.array([values], np.float16 if half else np.float32)
    how: dict[str, Any] = {"bits": variant[0], "block_size": block_size, "symmetric": variant[1]}
    actual, finite = quantize(weight, half=half, **how)
    assert finite
    assert_same_bytes(actual, ort_quantize(weight, **how))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("bits", "symmetric"), VARIANTS)
def test_the_rule_as_documented(bits: int, symmetric: bool, dtype: Any) -> None:
    k, block_size = 83, 16
    weight = adversarial.rows(k, dtype, seed=9)
    codes, scales, zeros = plain_rule(weight, bits=bits, block_size=block_size, symmetric=symmetric)
    actual, _ = quantize(
        weight, bits=bits, block_size=block_size, symmetric=symmetric, half=dtype is np.float16
    )
    actual_codes, actual_zeros = unpack(actual, bits=bits)
    np.testing.assert_array_equal(actual_codes.reshape(len(weight), -1)[:, :k], codes)
    np.testing.assert_array_equal(actual_zeros, zeros)
    np.testing.assert_array_equal(actual.scales.view(np.uint8), scales.view(np.uint8))


def test_large_bfloat16_weights_round_to_float16_first() -> None:
    weight = np.array([[65280.0, 1e-7, 3e-8, -1e-30] * 8], ml_dtypes.bfloat16)
    actual, finite = quantize(weight, bits=4, block_size=32, symmetric=False, half=True)
    assert finite
    expected = ort_quantize(weight.astype(np.float16), bits=4, block_size=32, symmetric=False)
    assert_same_bytes(actual, expected)


@pytest.mark.parametrize("search", ["none", "mse"])
def test_rows_do_not_depend_on_how_they_are_cut(search: str) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((23, 208)).astype(ml_dtypes.bfloat16)
    how: dict[str, Any] = {"bits": 4, "block_size": 32, "symmetric": False, "search": search}
    whole, _ = quantize(weight, **how)
    parts = [quantize(weight[start : start + 7], **how)[0] for start in range(0, 23, 7)]
    for name in Quantized._fields:
        pieces = [getattr(part, name) for part in parts]
        np.testing.assert_array_equal(np.concatenate(pieces), getattr(whole, name))


def test_reads_bits_views_and_readonly_and_unaligned_memory() -> None:
    weight = np.random.default_rng(4).standard_normal((3, 64)).astype(ml_dtypes.bfloat16)
    how: dict[str, Any] = {"bits": 4, "block_size": 32, "symmetric": True}
    expected, _ = quantize(weight, **how)
    raw = b"x" + weight.tobytes()
    unaligned = np.frombuffer(raw, ml_dtypes.bfloat16, offset=1).reshape(weight.shape)
    for same in (weight.view(np.uint16), unaligned):
        assert_same_bytes(quantize(same, **how)[0], expected)


@pytest.mark.parametrize("search", ["none", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stored", STORED)
def test_finds_every_non_finite_value(stored: Any, symmetric: bool, search: str) -> None:
    clean = np.random.default_rng(5).standard_normal((2, 45)).astype(stored)
    how: dict[str, Any] = {"bits": 4, "block_size": 32, "symmetric": symmetric, "search": search}
    for half in (False, True):
        assert quantize(clean, half=half, **how)[1]
        for column in (0, 1, 31, 32, 43, 44):  # up to the last value before the padding
            for poison in (np.nan, -np.nan, np.inf, -np.inf):
                weight = clean.copy()
                weight[1, column] = poison
                assert not quantize(weight, half=half, **how)[1]


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float32])
def test_float16_overflow_is_not_finite_for_float16_scales(stored: Any) -> None:
    weight = np.zeros((1, 32), stored)
    weight[0, 17] = -65536.0
    how: dict[str, Any] = {"bits": 8, "block_size": 16, "symmetric": True}
    assert quantize(weight, half=False, **how)[1]
    assert not quantize(weight, half=True, **how)[1]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), VARIANTS)
def test_dequantize_is_the_definition(bits: int, symmetric: bool, half: bool) -> None:
    rng = np.random.default_rng(6)
    for block_size, k in ((16, 83), (32, 96), (256, 300)):
        shapes = layout(3, k, bits=bits, block_size=block_size)
        quantized = Quantized(
            rng.integers(0, 256, shapes.packed, np.uint8),
            rng.standard_normal(shapes.scales).astype(np.float16 if half else np.float32),
            None if symmetric else rng.integers(0, 256, shapes.zero_points, np.uint8),
        )
        codes, zeros = unpack(quantized, bits=bits)
        centred = codes.astype(np.float32) - zeros[:, :, None].astype(np.float32)
        expected = (centred * quantized.scales[:, :, None].astype(np.float32)).reshape(3, -1)
        actual = dequantize(quantized, bits=bits, block_size=block_size, k=k)
        np.testing.assert_array_equal(actual, expected[:, :k])


@pytest.mark.parametrize(("bits", "symmetric"), VARIANTS)
def test_dequantize_is_what_the_operator_multiplies_by(bits: int, symmetric: bool) -> None:
    k = 96
    weight = np.random.default_rng(7).standard_normal((5, k)).astype(np.float32)
    quantized, _ = quantize(weight, bits=bits, block_size=32, symmetric=symmetric)
    np.testing.assert_allclose(
        dequantize(quantized, bits=bits, block_size=32, k=k),
        ort_operator(quantized, bits=bits, block_size=32, k=k),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize(("bits", "symmetric"), VARIANTS)
def test_round_trip_is_within_half_a_step(bits: int, symmetric: bool) -> None:
    weight = np.random.default_rng(8).standard_normal((4, 256)).astype(np.float32)
    quantized, _ = quantize(weight, bits=bits, block_size=64, symmetric=symmetric)
    error = np.abs(dequantize(quantized, bits=bits, block_size=64, k=256) - weight)
    step = np.abs(quantized.scales).repeat(64, axis=1)
    # the end of the range may lie beyond the last code: by one step if symmetric (-8..7), by half
    # a step if the zero point was rounded
    assert np.all(error <= step * (1.0001 if symmetric else 1.001))
    assert np.mean(error <= step * 0.5001) > 0.95


def test_refuses_what_does_not_fit() -> None:
    weight = np.zeros((2, 64), np.float32)
    shapes = layout(2, 64, bits=4, block_size=32)
    good: dict[str, Any] = {
        "bits": 4,
        "block_size": 32,
        "symmetric": True,
        "search": "none",
        "packed": np.zeros(shapes.packed, np.uint8),
        "scales": np.zeros(shapes.scales, np.float32),
        "zero_points": None,
    }
    assert quantize_rows(weight, **good)
    zero_points = np.zeros(shapes.zero_points, np.uint8)
    for bad, message in (
        ({"bits": 2}, "bits must be"),
        ({"block_size": 48}, "block_size must be"),
        ({"search": "best"}, "search must be"),
        ({"symmetric": False}, "zero_points belong"),
        ({"zero_points": zero_points}, "zero_points belong"),
        ({"symmetric": False, "zero_points": zero_points[:1]}, "zero_points must be"),
        ({"packed": np.zeros((2, 2, 15), np.uint8)}, "packed must be"),
        ({"packed": np.zeros(shapes.packed, np.int8)}, "packed must be"),
        ({"scales": np.zeros(shapes.scales, np.float64)}, "scales must be"),
        ({"scales": np.zeros((2, 4), np.float32)[:, ::2]}, "scales must be"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_rows(weight, **{**good, **bad})
    for wrong in (weight.astype(np.float64), weight.astype(">f4"), weight.T):
        with pytest.raises(ValueError, match="weight must be"):
            quantize_rows(wrong, **good)
    with pytest.raises(ValueError, match="a matrix"):
        quantize_rows(weight.reshape(-1), **good)
    with pytest.raises(ValueError, match="zero_points belong"):
        dequantize_rows(
            good["packed"], good["scales"], None, bits=4, block_size=32, K=64, symmetric=False
        )
