"""Stored weights are read as ONNX Runtime itself reads them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from phiconv.diagnosis.stored_weight import constant, embedding_weight, linear_weight
from phiconv.errors import StageError

N, K = 24, 80
RNG = np.random.default_rng(0)
MICROSOFT = "com.microsoft"


def single(
    op: str, domain: str, inputs: list[np.ndarray | str | None], output: Any, **attributes: Any
) -> ir.Model:
    """A model of one operator; arrays become initializers, names graph inputs."""
    values: list[ir.Value | None] = []
    graph_inputs, initializers = [], []
    for index, item in enumerate(inputs):
        if item is None:
            values.append(None)
        elif isinstance(item, str):
            kind = ir.DataType.INT64 if item == "ids" else ir.DataType.FLOAT
            value = ir.Value(name=item, type=ir.TensorType(kind), shape=ir.Shape([None, None]))
            graph_inputs.append(value)
            values.append(value)
        else:
            tensor = ir.tensor(item, name=f"constant_{index}")
            value = ir.Value(
                name=tensor.name,
                type=ir.TensorType(tensor.dtype),
                shape=tensor.shape,
                const_value=tensor,
            )
            initializers.append(value)
            values.append(value)
    node = ir.node(op, values, attributes, domain=domain, name=op)
    node.outputs[0].name = "output"
    node.outputs[0].type = ir.TensorType(output)
    graph = ir.Graph(
        graph_inputs,
        node.outputs,
        nodes=[node],
        initializers=initializers,
        opset_imports={"": 22, MICROSOFT: 1},
    )
    return ir.Model(graph, ir_version=10)


def outputs(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    proto = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def random_bytes(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


# ONNX Runtime has no 8-bit kernel with float zero points to compare with
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize(
    ("bits", "zero_points"),
    [(4, "none"), (4, "packed"), (4, "float"), (8, "none"), (8, "packed")],
)
def test_matmul_nbits(bits: int, block_size: int, zero_points: str) -> None:
    blocks = -(-K // block_size)
    packed = random_bytes(N, blocks, block_size * bits // 8)
    scales = RNG.standard_normal((N, blocks)).astype(np.float32)
    zero: np.ndarray | None = None
    if zero_points == "packed":
        zero = random_bytes(N, -(-blocks * bits // 8))
    elif zero_points == "float":
        zero = RNG.uniform(0, 15, (N, blocks)).astype(np.float32)
    model = single(
        "MatMulNBits",
        MICROSOFT,
        ["x", packed, scales, zero],
        ir.DataType.FLOAT,
        K=K,
        N=N,
        bits=bits,
        block_size=block_size,
    )
    weight = linear_weight(model.graph[0])
    assert weight.shape == (N, K)
    expected = outputs(model, x=np.eye(K, dtype=np.float32)).T
    np.testing.assert_allclose(weight.rows(0, N), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(weight.rows(5, 9), weight.rows(0, N)[5:9])


@pytest.mark.parametrize("dtype", ["uint8-4", "uint8-8", "int4", "uint4"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_gather_block_quantized(dtype: str, asymmetric: bool) -> None:
    rows, width, block_size = 12, 64, 16
    blocks = width // block_size
    bits = 8 if dtype == "uint8-8" else 4
    codes, zero = random_bytes(rows, width * bits // 8), random_bytes(rows, blocks * bits // 8)
    if dtype in ("int4", "uint4"):
        low = -8 if dtype == "int4" else 0
        kind = getattr(ml_dtypes, dtype)
        codes = RNG.integers(low, low + 16, (rows, width)).astype(kind)
        zero = RNG.integers(low, low + 16, (rows, blocks)).astype(kind)
    scales = RNG.standard_normal((rows, blocks)).astype(np.float32)
    model = single(
        "GatherBlockQuantized",
        MICROSOFT,
        [codes, "ids", scales, *([zero] if asymmetric else [])],
        ir.DataType.FLOAT,
        bits=bits,
        block_size=block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    weight = embedding_weight(model.graph[0])
    assert weight.shape == (rows, width)
    expected = outputs(model, ids=np.arange(rows)[None])[0]
    np.testing.assert_allclose(weight.rows(0, rows), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_dequantize_linear_in_front_of_a_matmul(axis: int, asymmetric: bool) -> None:
    shape, block_size = (64, 32), 16
    blocks = tuple(s // block_size if i == axis else s for i, s in enumerate(shape))
    codes = RNG.integers(-8, 8, shape).astype(ml_dtypes.int4)
    scales = RNG.standard_normal(blocks).astype(np.float32)
    zero = RNG.integers(-8, 8, blocks).astype(ml_dtypes.int4) if asymmetric else None
    model = single(
        "DequantizeLinear",
        "",
        [codes, scales, zero],
        ir.DataType.FLOAT,
        axis=axis,
        block_size=block_size,
    )
    expected = outputs(model)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    product = ir.node("MatMul", [x, model.graph[0].outputs[0]])
    weight = linear_weight(product)
    assert weight.format.quantized
    assert (weight.format.bits, weight.format.block_size) == (4, block_size)
    np.testing.assert_allclose(weight.rows(0, 32), expected.T, rtol=1e-6)


def test_gemm_and_matmul_weights_are_rows_of_outputs() -> None:
    array = RNG.standard_normal((K, N)).astype(np.float16)
    plain = single("MatMul", "", ["x", array], ir.DataType.FLOAT16)
    np.testing.assert_array_equal(
        linear_weight(plain.graph[0]).rows(0, N), array.T.astype(np.float32)
    )
    transposed = single("Gemm", "", ["x", array.T], ir.DataType.FLOAT16, transB=1)
    np.testing.assert_array_equal(
        linear_weight(transposed.graph[0]).rows(2, 7), array.T[2:7].astype(np.float32)
    )


def test_what_is_not_known_is_refused() -> None:
    packed, scales = random_bytes(N, 5, 12), np.ones((N, 5), np.float32)
    three_bits = single(
        "MatMulNBits", MICROSOFT, ["x", packed, scales], ir.DataType.FLOAT, K=K, N=N, bits=3
    )
    with pytest.raises(StageError, match="MatMulNBits of 3 bits"):
        linear_weight(three_bits.graph[0])
    integers = single("MatMul", "", ["x", random_bytes(K, N)], ir.DataType.FLOAT)
    with pytest.raises(StageError, match="UINT8 without scales"):
        linear_weight(integers.graph[0])


@pytest.fixture
def in_a_file(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A MatMul whose weight lies in a file beside the model."""
    weight = RNG.standard_normal((K, N)).astype(np.float32)
    model = single("MatMul", "", ["x", weight], ir.DataType.FLOAT)
    ir.save(model, tmp_path / "model.onnx", external_data="w.data", size_threshold_bytes=0)
    return tmp_path / "model.onnx", weight


def test_a_file_with_two_names_is_read(in_a_file: tuple[Path, np.ndarray]) -> None:
    file, weight = in_a_file
    try:
        os.link(file.parent / "w.data", file.parent / "other")
    except OSError:
        pytest.skip("no hard links here")
    node = ir.load(file).graph.node(0)
    np.testing.assert_array_equal(linear_weight(node).rows(0, N), weight.T)


def test_threads_may_share_a_tensor(in_a_file: tuple[Path, np.ndarray]) -> None:
    file, weight = in_a_file
    node = ir.load(file).graph.node(0)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: constant(node.inputs[1]), range(64)):
            np.testing.assert_array_equal(found, weight)


def test_data_that_is_cut_off_or_elsewhere_is_told(in_a_file: tuple[Path, np.ndarray]) -> None:
    file, _ = in_a_file
    data = file.parent / "w.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-4])
    with pytest.raises(StageError, match=r"w\.data ends within it"):
        constant(ir.load(file).graph.node(0).inputs[1])
    data.unlink()
    (file.parent.parent / "w.data").write_bytes(whole)
    with pytest.raises(StageError, match=r"w\.data is missing"):
        constant(ir.load(file).graph.node(0).inputs[1])
