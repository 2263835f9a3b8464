"""Models of one node, `planted`, for tests of what a provider makes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from phiconv.runtimes.kernel_support import KernelFinding, check_graph

F16, F32, F64, BF16, I64, I32 = (
    TensorProto.FLOAT16,
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.BFLOAT16,
    TensorProto.INT64,
    TensorProto.INT32,
)
HALF = np.float16
SKIP = "SkipSimplifiedLayerNormalization"
Shape = tuple[int, ...]


def one_node(
    op: str,
    inputs: dict[str, tuple[int, Shape] | np.ndarray | None],
    *,
    domain: str = "",
    opset: int = 22,
    outputs: tuple[str, ...] = ("out",),
    domains: tuple[str, ...] = ("com.microsoft",),
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node; an input is a type and a shape, an initializer, or absent."""
    names = [name if given is not None else "" for name, given in inputs.items()]
    node = helper.make_node(op, names, list(outputs), "planted", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(name, *given)
            for name, given in inputs.items()
            if isinstance(given, tuple)
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs if name],
        [
            onnx.numpy_helper.from_array(given, name)
            for name, given in inputs.items()
            if isinstance(given, np.ndarray)
        ],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def matmul(kind: int, opset: int = 22) -> onnx.ModelProto:
    return one_node("MatMul", {"a": (kind, (2, 3)), "b": (kind, (3, 4))}, opset=opset)


def matmul_nbits(
    *,
    bits: int = 4,
    block_size: int = 32,
    k: int = 64,
    kind: type = np.float32,
    zero_points: np.ndarray | None = None,
    bias: bool = False,
    **changes: Any,
) -> onnx.ModelProto:
    n, blocks = 8, -(-k // max(block_size, 1))
    arrays = {
        "b": np.zeros((n, blocks, block_size * bits // 8), np.uint8),
        "scales": np.ones(n * blocks, kind),
        "zero_points": zero_points,
        "g_idx": None,
        "bias": np.zeros(n, kind) if bias else None,
    } | changes
    return one_node(
        "MatMulNBits",
        {"a": (helper.np_dtype_to_tensor_dtype(np.dtype(kind)), (1, 2, k)), **arrays},
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=block_size,
    )


def attention(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 16,
    pairs: tuple[int | None, int | None] = (8, 8),
    key: bool = True,
    value: bool = True,
    past: tuple[bool, bool] = (True, True),
    kind: type = np.float32,
    bias: bool = False,
    sink: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    cache = (dtype, (1, kv_heads, 0, head_size))
    width = heads if key or value else heads + 2 * kv_heads
    small = (dtype, (1, 3, kv_heads * head_size))
    return one_node(
        "GroupQueryAttention",
        {
            "query": (dtype, (1, 3, width * head_size)),
            "key": small if key else None,
            "value": small if value else None,
            "past_key": cache if past[0] else None,
            "past_value": cache if past[1] else None,
            "seqlens_k": np.array([2], np.int32),
            "total_sequence_length": np.array(3, np.int32),
            "cos_cache": np.ones((8, pairs[0]), kind) if pairs[0] else None,
            "sin_cache": np.ones((8, pairs[1]), kind) if pairs[1] else None,
            "position_ids": None,
            "attention_bias": (dtype, (1, 1, 3, 3)) if bias else None,
            "head_sink": np.ones(heads, kind) if sink else None,
        },
        domain="com.microsoft",
        outputs=("out", "present_key", "present_value"),
        num_heads=heads,
        kv_num_heads=kv_heads,
        **attributes,
    )


def gather(
    *,
    bits: int = 4,
    block_size: int = 16,
    width: int = 64,
    zero_points: bool = False,
    **attributes: Any,
) -> onnx.ModelProto:
    blocks = -(-width // max(block_size, 1))
    packed = 8 // bits if bits in (2, 4, 8) else 1
    shape = (10, -(-blocks // packed))
    return one_node(
        "GatherBlockQuantized",
        {
            "data": np.zeros((10, width // packed), np.uint8),
            "indices": (TensorProto.INT64, (1, 3)),
            "scales": np.ones((10, blocks), np.float32),
            "zero_points": np.zeros(shape, np.uint8) if zero_points else None,
        },
        domain="com.microsoft",
        bits=bits,
        block_size=block_size,
        **attributes,
    )


def rotary(**attributes: int) -> onnx.ModelProto:
    inputs: dict[str, Any] = {
        "x": (TensorProto.FLOAT, (1, 3, 64)),
        "position_ids": (TensorProto.INT64, (1, 3)),
        "cos": np.ones((8, 8), np.float32),
        "sin": np.ones((8, 8), np.float32),
    }
    return one_node("RotaryEmbedding", inputs, domain="com.microsoft", **attributes)


def norm(op: str, kind: int, outputs: tuple[str, ...]) -> onnx.ModelProto:
    domain = "com.microsoft" if op.startswith("Skip") else ""
    inputs: dict[str, Any] = {"x": (kind, (1, 3, 8))}
    if domain:
        inputs["skip"] = (kind, (1, 3, 8))
    return one_node(op, inputs | {"scale": (kind, (8,))}, domain=domain, outputs=outputs)


def cast(source: int, to: int, opset: int) -> onnx.ModelProto:
    return one_node("Cast", {"x": (source, (2,))}, opset=opset, to=to)


def verdict(model: onnx.ModelProto, provider: str) -> KernelFinding | None:
    findings = check_graph(ir.from_proto(model), provider)
    assert len(findings) <= 1
    return findings[0] if findings else None
