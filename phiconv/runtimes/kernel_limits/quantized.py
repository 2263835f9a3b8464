"""Limits of MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from phiconv.machine import CPU, CUDA, DML
from phiconv.runtimes.kernel_limits.limit import (
    MICROSOFT,
    Effect,
    Limit,
    OperatorNode,
    Problem,
    one_of,
    without_input,
)


def _power_of_two_block(node: OperatorNode) -> str | None:
    size = node.attribute("block_size", 128)
    if size >= 16 and size & (size - 1) == 0:
        return None
    return f"block_size={size}, not a power of 2 from 16"


def _partial_block(node: OperatorNode) -> str | None:
    k, size = node.attribute("K", 0), node.attribute("block_size", 0)
    if size > 0 and k % size == 0:
        return None
    return f"K={k} is not a multiple of block_size={size}"


def _float_zero_points(node: OperatorNode) -> str | None:
    kind = node.type_of(3)
    return None if kind in (None, "uint8") else f"zero_points are {kind}, not packed uint8"


def _mixed_zero_points(node: OperatorNode) -> str | None:
    scales, kind = node.type_of(2), node.type_of(3)
    if scales is None or kind in (None, "uint8", scales):
        return None
    return f"zero_points are {kind}, neither uint8 nor {scales} as the scales"


def _packed_shapes(node: OperatorNode) -> str | None:
    """B must be [N, blocks, block_size * bits / 8], and scales N * blocks."""
    n, k, size = (node.attribute(name, 0) for name in ("N", "K", "block_size"))
    if size <= 0:
        return None
    blocks = -(-k // size)
    wanted = (n, blocks, size * node.attribute("bits", 4) // 8)
    weight, scales = node.shape(1), node.shape(2)
    if weight is not None and None not in weight and weight != wanted:
        return f"B has the shape {list(weight)}, not {list(wanted)} as N, K, bits, block_size say"
    if scales is not None and None not in scales and scales not in ((n * blocks,), (n, blocks)):
        return f"scales have the shape {list(scales)}, not [{n * blocks}] or [{n}, {blocks}]"
    return None


def _gather_bits(node: OperatorNode) -> str | None:
    bits, data = node.attribute("bits", 4), node.type_of(0)
    allowed = (2, 4, 8) if data == "uint8" else (4,)
    if data is None or bits in allowed:
        return None
    return f"bits={bits} with {data} data, not {' or '.join(str(item) for item in allowed)}"


def _gather_axis(node: OperatorNode) -> str | None:
    axis, shape = node.attribute("gather_axis", 0), node.shape(0)
    if node.type_of(0) != "uint8" or axis == 0 or (shape and axis + len(shape) == 0):
        return None
    return f"gather_axis={axis} with uint8 data, not 0"


def _positive_last_axis(node: OperatorNode) -> str | None:
    axis, shape = node.attribute("quantize_axis", 1), node.shape(0)
    if shape is None or axis == len(shape) - 1:
        return None
    return f"quantize_axis={axis}, not {len(shape) - 1}, the last axis"


def _last_axis_of_bytes(node: OperatorNode) -> str | None:
    if node.type_of(0) != "uint8" or node.attribute("quantize_axis", 1) == -1:
        return None
    return _positive_last_axis(node)


def _unfilled_rows(node: OperatorNode) -> str | None:
    """Blocks, and zero points in their bytes, are numbered on from row to row."""
    width, bits = node.dim(0, -1), node.attribute("bits", 4)
    if width is None or bits not in (2, 4, 8):
        return None
    size = node.attribute("block_size", 128)
    features = width * (8 // bits if node.type_of(0) == "uint8" else 1)
    if features % size:
        return f"rows of {features} are not a multiple of block_size={size}"
    if node.has_input(3) and features // size * bits % 8:
        return f"the zero points of a row, {features // size} of {bits} bits, leave a byte unfilled"
    return None


def _matmul(providers: tuple[str, ...], effect: Effect, source: str, problem: Problem) -> Limit:
    return Limit(providers, MICROSOFT, ("MatMulNBits",), effect, source, problem)


def _gather(providers: tuple[str, ...], effect: Effect, source: str, problem: Problem) -> Limit:
    return Limit(providers, MICROSOFT, ("GatherBlockQuantized",), effect, source, problem)


_CPU_MATMUL = "contrib_ops/cpu/quantization/matmul_nbits.cc: MatMulNBits::MatMulNBits"
_CPU_MATMUL_KERNELS = "contrib_ops/cpu/quantization/matmul_nbits.cc: registrations"
_CUDA_MATMUL_KERNELS = "contrib_ops/cuda/quantization/matmul_nbits.cc: registrations"
_CUDA_MATMUL = "contrib_ops/cuda/quantization/matmul_nbits.cc: MatMulNBits::ComputeInternal"
_MATMUL_INPUTS = "contrib_ops/cpu/quantization/matmul_nbits_helper.h: CheckInputs"
_DML_MATMUL = "core/providers/dml/DmlExecutionProvider/src/Operators/DmlOperatorMatMulNBits.cpp: "
_CPU_GATHER = "contrib_ops/cpu/quantization/gather_block_quantized.cc: GatherBlockQuantized::"
_CUDA_GATHER = "contrib_ops/cuda/quantization/gather_block_quantized."
_GATHER_SCHEMA = "core/graph/contrib_ops/contrib_defs.cc: GatherBlockQuantized"

QUANTIZED_LIMITS = (
    _matmul((CPU,), "refused", _CPU_MATMUL, one_of("bits", 2, 4, 8, default=4)),
    _matmul(
        (CPU,), "refused", _CPU_MATMUL, one_of("block_size", 16, 32, 64, 128, 256, default=None)
    ),
    _matmul((CUDA,), "refused", _MATMUL_INPUTS, one_of("bits", 2, 4, 8, default=4)),
    # every width but 8 goes to the 4-bit kernels
    _matmul((CUDA,), "misread", _CUDA_MATMUL, one_of("bits", 4, 8, default=4)),
    _matmul((CUDA,), "refused", _MATMUL_INPUTS, _power_of_two_block),
    # registered for pairs of types, which the table does not show
    _matmul((CPU,), "declined", _CPU_MATMUL_KERNELS, _mixed_zero_points),
    _matmul((CUDA,), "declined", _CUDA_MATMUL_KERNELS, _mixed_zero_points),
    _matmul((CPU, CUDA), "refused", _MATMUL_INPUTS, _packed_shapes),
    _matmul((DML,), "declined", _DML_MATMUL + "QueryMatMulNBits", one_of("bits", 4, 8, default=4)),
    _matmul((DML,), "declined", _DML_MATMUL + "QueryMatMulNBits", _partial_block),
    _matmul((DML,), "refused", _DML_MATMUL + "DmlOperatorMatMulNBits", without_input(4, "g_idx")),
    _matmul((DML,), "refused", _DML_MATMUL + "DmlOperatorMatMulNBits", without_input(5, "bias")),
    _matmul((DML,), "misread", _DML_MATMUL + "DmlOperatorMatMulNBits", _float_zero_points),
    _gather((CPU, CUDA, DML), "refused", _GATHER_SCHEMA, _gather_axis),
    _gather((CPU,), "refused", _CPU_GATHER + "GatherBlockQuantized", _gather_bits),
    _gather((CPU,), "refused", _CPU_GATHER + "GatherBlockQuantized", _power_of_two_block),
    _gather((CPU,), "refused", _CPU_GATHER + "PrepareForCompute", _last_axis_of_bytes),
    _gather(
        (CUDA,),
        "refused",
        _CUDA_GATHER + "cc: GatherBlockQuantized::GatherBlockQuantized",
        _power_of_two_block,
    ),
    _gather(
        (CUDA,),
        "refused",
        _CUDA_GATHER + "cc: GatherBlockQuantized::ComputeInternal",
        _positive_last_axis,
    ),
    _gather((CUDA,), "misread", _CUDA_GATHER + "cu: GatherBlockQuantizedKernel", _unfilled_rows),
)
