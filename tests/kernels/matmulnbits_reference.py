"""The MatMulNBits format written down in numpy, ONNX Runtime's quantizer, and its operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from phiconv.kernels.matmulnbits import dequantize_rows, layout, quantize_rows

Array = npt.NDArray[Any]


class Quantized(NamedTuple):
    packed: Array
    scales: Array
    zero_points: Array | None


def quantize(
    weight: Array,
    *,
    bits: int,
    block_size: int,
    symmetric: bool,
    search: str = "none",
    half: bool = False,
) -> tuple[Quantized, bool]:
    """phiconv's kernel, its outputs prefilled with bytes that must not survive."""
    shapes = layout(*weight.shape, bits=bits, block_size=block_size)
    out = Quantized(
        np.full(shapes.packed, 0xA5, np.uint8),
        np.full(shapes.scales, 7, np.float16 if half else np.float32),
        None if symmetric else np.full(shapes.zero_points, 0xA5, np.uint8),
    )
    finite = quantize_rows(
        weight,
        bits=bits,
        block_size=block_size,
        symmetric=symmetric,
        search=search,  # type: ignore[arg-type]
        packed=out.packed,
        scales=out.scales,
        zero_points=out.zero_points,
    )
    return out, finite


def dequantize(quantized: Quantized, *, bits: int, block_size: int, k: int) -> Array:
    return dequantize_rows(
        *quantized, bits=bits, block_size=block_size, K=k, symmetric=quantized.zero_points is None
    )


def ort_quantize(weight: Array, *, bits: int, block_size: int, symmetric: bool) -> Quantized:
    """What DefaultWeightOnlyQuantizer makes of `weight.T`; float32 or float16 `[n, K]`."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

    n, k = weight.shape
    shapes = layout(n, k, bits=bits, block_size=block_size)
    padding = ((0, shapes.scales[1] * block_size - k), (0, 0))
    transposed = np.pad(np.ascontiguousarray(weight.T), padding)
    packed = np.zeros(shapes.packed, np.uint8)
    scales = np.zeros(shapes.scales, weight.dtype)
    zero_points = np.zeros(shapes.zero_points, np.uint8)
    run = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    run(packed, transposed, scales, zero_points, block_size, n, k, symmetric)
    return Quantized(packed, scales, None if symmetric else zero_points)


def ort_operator(quantized: Quantized, *, bits: int, block_size: int, k: int) -> Array:
    """The weights MatMulNBits multiplies by: its output for the identity, `[n, K]`."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    tensors = {"B": quantized.packed, "scales": quantized.scales.ravel()}
    if quantized.zero_points is not None:
        tensors["zero_points"] = quantized.zero_points.ravel()
    n = len(quantized.packed)
    node = helper.make_node(
        "MatMulNBits",
        ["A", *tensors],
        ["Y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=block_size,
    )
    graph = helper.make_graph(
        [node],
        "dequantize",
        [helper.make_tensor_value_info("A", TensorProto.FLOAT, [k, k])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [k, n])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: Array = session.run(None, {"A": np.eye(k, dtype=np.float32)})[0]
    return result.T


def unpack(quantized: Quantized, *, bits: int) -> tuple[Array, Array]:
    """Codes `[n, blocks, block_size]` and zero points `[n, blocks]`, one a byte."""
    n, blocks, _ = quantized.packed.shape
    codes = quantized.packed
    zeros = quantized.zero_points
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(n, blocks, -1)
        if zeros is not None:
            zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(n, -1)
    if zeros is None:
        zeros = np.full((n, blocks), 1 << (bits - 1), np.uint8)
    return codes, zeros[:, :blocks]


def round_half_away(values: Array) -> Array:
    """C's roundf, by way of float64, in which adding one half is exact here."""
    return np.copysign(np.floor(np.abs(values.astype(np.float64)) + 0.5), values).astype(np.float32)


def plain_rule(
    weight: Array, *, bits: int, block_size: int, symmetric: bool
) -> tuple[Array, Array, Array]:
    """ONNX Runtime's rule: codes `[n, K]`, scales and zero points `[n, blocks]`.

    `weight` is float32 or float16 `[n, K]`; the arithmetic is float32, the scale is rounded to
    the weight's dtype and the codes follow from it as rounded.
    """
    n, k = weight.shape
    top, middle = np.float32((1 << bits) - 1), np.float32(1 << (bits - 1))
    codes = np.empty((n, k), np.uint8)
    blocks = -(-k // block_size)
    scales = np.empty((n, blocks), weight.dtype)
    zeros = np.full((n, blocks), middle, np.uint8)
    for b in range(blocks):
        span = slice(b * block_size, min((b + 1) * block_size, k))
        x = weight[:, span].astype(np.float32)
        low, high = x.min(axis=1), x.max(axis=1)
        with np.errstate(all="ignore"):
            if symmetric:
                largest = np.where(np.abs(high) > np.abs(low), high, low)
                largest = np.where(largest == 0, x[:, 0], largest)
                exact = -largest / middle
            else:
                low, high = np.minimum(low, 0), np.maximum(high, 0)
                exact = (high - low) / top
                point = np.where(exact == 0, 0, -low / exact)
                zeros[:, b] = round_half_away(np.clip(point, 0, top))
            scales[:, b] = exact
            scale = scales[:, b].astype(np.float32)
            reciprocal = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
            scaled = x * reciprocal[:, None] + zeros[:, b, None].astype(np.float32)
            scaled = np.where(np.isnan(scaled), 0, scaled)
        codes[:, span] = round_half_away(np.clip(scaled, 0, top))
    return codes, scales, zeros
