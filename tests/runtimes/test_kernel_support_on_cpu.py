"""What the table and the limits say of the CPU provider, against the installed ONNX Runtime."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from phiconv.machine import CPU
from phiconv.runtimes.kernel_table import kernel_table
from tests.runtimes.one_node import (
    BF16,
    F16,
    F32,
    F64,
    HALF,
    I32,
    I64,
    SKIP,
    attention,
    gather,
    matmul,
    matmul_nbits,
    norm,
    one_node,
    rotary,
    verdict,
)


def runs_on_cpu(model: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime makes a session of the model and runs it once on zeros."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    refusals = (state.Fail, state.InvalidArgument, state.NotImplemented, state.RuntimeException)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
        session.run(None, {value.name: zeros(value) for value in session.get_inputs()})
    except (*refusals, state.InvalidGraph, RuntimeError):
        return False
    return True


def zeros(value: Any) -> np.ndarray:
    types = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(double)": np.float64,
        "tensor(int64)": np.int64,
        "tensor(bool)": np.bool_,
    }
    return np.zeros(value.shape, types[value.type])


@pytest.mark.parametrize(
    "model",
    [
        *(lambda kind=kind: matmul(kind) for kind in (F16, F32, F64, BF16)),
        *(lambda kind=kind: one_node("Neg", {"a": (kind, (2,))}) for kind in (F16, F64, BF16)),
        *(lambda kind=kind: one_node("Softmax", {"a": (kind, (2,))}) for kind in (F16, BF16)),
        *(lambda kind=kind: one_node("Mish", {"a": (kind, (2,))}) for kind in (F16, F64, BF16)),
        *(lambda kind=kind: one_node("Elu", {"a": (kind, (2,))}) for kind in (F32, BF16)),
        *(lambda bits=bits: matmul_nbits(bits=bits) for bits in (2, 3, 4, 5, 8)),
        *(lambda size=size: matmul_nbits(block_size=size, k=512) for size in (8, 16, 24, 256, 512)),
        lambda: matmul_nbits(k=80),
        lambda: matmul_nbits(kind=HALF),
        lambda: matmul_nbits(zero_points=np.zeros(8, np.uint8)),
        lambda: matmul_nbits(zero_points=np.zeros(16, np.float32)),
        lambda: matmul_nbits(kind=HALF, zero_points=np.zeros(16, np.float32)),
        lambda: matmul_nbits(scales=np.ones((8, 2), np.float32)),
        lambda: matmul_nbits(scales=np.ones(8, np.float32)),
        lambda: matmul_nbits(scales=np.ones(16, HALF)),
        lambda: matmul_nbits(b=np.zeros((8, 2, 8), np.uint8)),
        *(lambda bits=bits: gather(bits=bits) for bits in (2, 3, 4, 8)),
        lambda: gather(block_size=8),
        lambda: gather(block_size=48, width=96),
        lambda: gather(width=48, zero_points=True),
        lambda: gather(quantize_axis=-1),
        lambda: gather(gather_axis=1, quantize_axis=0),
        lambda: gather(bits=8, quantize_axis=0, block_size=16),
        lambda: attention(),
        lambda: attention(do_rotary=1),
        lambda: attention(kind=HALF, do_rotary=1),
        lambda: attention(do_rotary=1, pairs=(None, None)),
        lambda: attention(pairs=(None, None), head_size=8),
        lambda: attention(pairs=(None, None), head_size=12),
        lambda: attention(head_size=24),
        lambda: attention(head_size=32, pairs=(12, 12)),
        lambda: attention(head_size=32, pairs=(24, 24)),
        lambda: attention(pairs=(8, None)),
        lambda: attention(key=False, value=False),
        lambda: attention(value=False),
        lambda: attention(past=(False, False)),
        lambda: attention(past=(True, False)),
        lambda: attention(heads=5, kv_heads=2),
        lambda: rotary(rotary_embedding_dim=16),
        lambda: rotary(rotary_embedding_dim=16, num_heads=4),
        lambda: norm("SimplifiedLayerNormalization", F16, ("out",)),
        lambda: norm(SKIP, F32, ("out", "", "", "sum")),
        lambda: one_node("NoSuchThing", {"x": (F32, (2,))}),
        lambda: one_node("FastGelu", {"x": (F32, (2,))}, domain="com.microsoft", domains=()),
    ],
)  # fmt: skip
def test_the_installed_runtime_agrees(model: Callable[[], onnx.ModelProto]) -> None:
    proto = model()
    finding = verdict(proto, CPU)
    assert runs_on_cpu(proto) == (finding is None or finding.severity == "note"), finding


# Types by operator that the document has and the installed build may not: it runs them in float
# between casts.
NOT_IN_EVERY_BUILD = {"Gemm": {"float16"}, "MatMul": {"float16"}}
# Types of statistics no graph asks for.
STATISTICS = {("LayerNormalization", "U"), ("SimplifiedLayerNormalization", "U")}


def installed_kernels() -> Iterator[tuple[str, str, tuple[int, int | None], dict[str, set[str]]]]:
    """Domain, operator, opsets and types of the CPU kernels of the installed ONNX Runtime."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if "TensorrtExecutionProvider" in state.get_available_providers():
        # asked for kernels, onnxruntime-gpu loads TensorRT's library, and dies where it is missing
        pytest.skip("the list of kernels can only be had from onnxruntime for the CPU")
    kernels: dict[Any, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for kernel in state.get_all_opkernel_def():
        since, until = kernel.version_range
        if kernel.provider != CPU:
            continue
        opsets = (since, None if until >= 2**31 - 1 else until)
        row = kernels[kernel.domain or "ai.onnx", kernel.op_name, opsets]
        for constraint, types in kernel.type_constraints.items():
            row[constraint] |= {kind[7:-1] for kind in types if kind.startswith("tensor(")}
    for (domain, op, opsets), types in kernels.items():
        yield domain, op, opsets, types


def test_the_table_promises_no_cpu_kernel_that_the_installed_runtime_lacks() -> None:
    table = kernel_table()
    installed = {(domain, op, opsets): types for domain, op, opsets, types in installed_kernels()}
    checked = 0
    for domain in table.domains:
        for op in table.operators(CPU, domain):
            for kernel in table.kernels(CPU, domain, op):
                where = (domain, op, (kernel.since, kernel.until))
                assert where in installed
                for constraint, types in kernel.types.items():
                    if (op, constraint) in STATISTICS:
                        continue
                    lacking = types - installed[where][constraint]
                    assert lacking <= NOT_IN_EVERY_BUILD.get(op, set()), (where, constraint)
                    checked += 1
    assert checked > 600


def simple_models(opset: int) -> Iterator[onnx.ModelProto]:
    """One node of each operator of ai.onnx that needs no attribute, for each type it allows."""
    for name in sorted(
        {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    ):
        try:
            schema = onnx.defs.get_schema(name, opset, "")
        except onnx.defs.SchemaError:
            continue
        optional = onnx.defs.OpSchema.FormalParameterOption.Optional
        inputs = [item for item in schema.inputs if item.option != optional]
        outputs = [item for item in schema.outputs if item.option != optional]
        if any(item.required for item in schema.attributes.values()) or len(outputs) != 1:
            continue
        for kind in (F16, F32, F64, BF16, I64, I32, TensorProto.INT8, TensorProto.BOOL):
            kinds = [_allowed(item.types, kind) for item in inputs]
            if kind in kinds and None not in kinds:
                values = {f"x{index}": (kind, (1,)) for index, kind in enumerate(kinds)}
                yield one_node(name, values, opset=opset)  # type: ignore[arg-type]


def _allowed(types: set[str], kind: int) -> int | None:
    for candidate in (kind, I64, TensorProto.BOOL):
        if f"tensor({TensorProto.DataType.Name(candidate).lower()})" in types:
            return candidate
    return None


# What ONNX Runtime 1.31 has beyond the document, and what the document leaves out because the
# kernel constrains no type.
BEYOND_THE_DOCUMENT = {"LayerNormalization", "NonMaxSuppression", "Where"}


@pytest.mark.parametrize("opset", [18, 22, 24])
def test_what_the_installed_runtime_has_no_implementation_for(opset: int) -> None:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = ort.SessionOptions()
    options.log_severity_level = 4
    compared = 0
    for model in simple_models(opset):
        try:
            ort.InferenceSession(model.SerializeToString(), options, providers=[CPU])
            loads = True
        except state.NotImplemented:
            loads = False
        except (state.Fail, state.InvalidGraph):
            continue  # these shapes do not suit the operator
        op = model.graph.node[0].op_type
        finding = verdict(model, CPU)
        if finding is not None and "not known" in finding.reason:
            continue
        said = finding is None or finding.severity == "note"
        assert said == loads or (loads and op in BEYOND_THE_DOCUMENT), (op, finding)
        compared += 1
    assert compared > 400
