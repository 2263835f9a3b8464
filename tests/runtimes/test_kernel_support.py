from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from phiconv.errors import StageError
from phiconv.machine import CPU, CUDA, DML
from phiconv.onnx.graph import GRAPH_FILE, OnnxGraph
from phiconv.onnx.quantize import Target, quantize_graph
from phiconv.runtimes.kernel_support import check_graph
from phiconv.runtimes.kernel_table import kernel_table
from tests.onnx.models import lay_out
from tests.phi3_checkpoints import write_phi3_checkpoint
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
    cast,
    gather,
    matmul,
    matmul_nbits,
    norm,
    one_node,
    rotary,
    verdict,
)

PROVIDERS = {"cpu": CPU, "cuda": CUDA, "dml": DML}
PRECISIONS = {"cpu": "fp32", "cuda": "fp16", "dml": "fp16"}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "partial rotary": {"partial_rotary_factor": 0.5},
    "unfused rotary": {"partial_rotary_factor": 0.75},
    "sliding window": {"sliding_window": 16},
    "longrope": {
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0] * 16,
            "short_factor": [1.0] * 16,
        },
        "max_position_embeddings": 1024,
    },
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_phi3_checkpoint(folder / name, **keys) for name, keys in CONFIGS.items()}


def export(checkpoints: dict[str, Path], scratch: Path, provider: str, config: str) -> OnnxGraph:
    path = checkpoints[config]
    return lay_out(path, scratch, provider, PRECISIONS[provider])  # type: ignore[arg-type]


def quantize(graph: OnnxGraph, *, embedding: bool = False, **changes: Any) -> OnnxGraph:
    settings: dict[str, Any] = {"bits": 4, "block_size": 32, "symmetric": True}
    target = Target(**settings | {"search": "none", "accuracy_level": 4} | changes)
    quantize_graph(
        graph, lambda weight: target if embedding or weight.role != "embedding" else None
    )
    return graph


# --- graphs that phiconv makes --------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_an_exported_graph_is_clean_for_its_provider(
    checkpoints: dict[str, Path], tmp_path: Path, provider: str, config: str
) -> None:
    graph = export(checkpoints, tmp_path, provider, config)
    assert check_graph(graph.model, PROVIDERS[provider]) == []


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"symmetric": False, "block_size": 128},
        {"bits": 8, "block_size": 64, "symmetric": False},
        {"block_size": 16, "accuracy_level": 0},
    ],
    ids=str,
)
def test_a_quantized_graph_is_clean_for_its_provider_saved_or_not(
    checkpoints: dict[str, Path], tmp_path: Path, provider: str, changes: dict[str, Any]
) -> None:
    graph = quantize(export(checkpoints, tmp_path, provider, "plain"), **changes)
    assert any(node.op_type == "MatMulNBits" for node in graph.model.graph)
    assert check_graph(graph.model, PROVIDERS[provider]) == []
    saved = tmp_path / "saved"
    saved.mkdir()
    graph.save(saved)
    assert check_graph(saved / GRAPH_FILE, PROVIDERS[provider]) == []


@pytest.mark.parametrize(("provider", "clean"), [("cpu", True), ("cuda", True), ("dml", False)])
def test_directml_has_no_quantized_embedding(
    checkpoints: dict[str, Path], tmp_path: Path, provider: str, clean: bool
) -> None:
    graph = quantize(export(checkpoints, tmp_path, provider, "plain"), embedding=True, bits=8)
    findings = check_graph(graph.model, PROVIDERS[provider])
    assert [(finding.op, finding.severity) for finding in findings] == (
        [] if clean else [("GatherBlockQuantized", "falls back to CPU")]
    )


def test_a_graph_for_another_provider_is_not_clean(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    # fused rotary and packed query, key and value are what DirectML lacks, fp32 attention is CUDA's
    cuda = export(checkpoints, tmp_path, "cuda", "plain").model
    attention = [f"/model/layers.{layer}/attn/GroupQueryAttention" for layer in range(2)]
    findings = check_graph(cuda, DML)
    assert [(finding.node, finding.severity) for finding in findings] == [
        (name, "unsupported") for name in attention
    ]
    cpu = export(checkpoints, tmp_path, "cpu", "plain").model
    findings = check_graph(cpu, CUDA)
    assert [(finding.node, finding.severity) for finding in findings] == [
        (name, "falls back to CPU") for name in attention
    ]
    assert all("bfloat16, float16, not float" in finding.reason for finding in findings)


def test_fp16_on_the_cpu_is_told_to_run_in_float(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    findings = check_graph(export(checkpoints, tmp_path, "cuda", "plain").model, CPU)
    assert {finding.op for finding in findings} >= {"Sigmoid", "Mul"}
    assert {finding.severity for finding in findings} == {"note"}


def test_types_are_found_without_value_info(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    graph = quantize(export(checkpoints, tmp_path, "cuda", "plain"), symmetric=False)
    outputs = set(graph.model.graph.outputs)
    for node in graph.model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.type = None
    assert check_graph(graph.model, CUDA) == []
    findings = check_graph(graph.model, CPU)
    assert "Sigmoid" in {finding.op for finding in findings}
    assert {finding.severity for finding in findings} == {"note"}


# --- planted faults -------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_planted_three_bit_weight_is_named(
    checkpoints: dict[str, Path], tmp_path: Path, provider: str
) -> None:
    graph = quantize(export(checkpoints, tmp_path, provider, "plain"))
    planted = [node for node in graph.model.graph if node.op_type == "MatMulNBits"][3]
    planted.attributes["bits"] = ir.AttrInt64("bits", 3)
    (finding,) = check_graph(graph.model, PROVIDERS[provider])
    assert finding.node == planted.name
    assert (finding.op, finding.domain, finding.opset) == ("MatMulNBits", "com.microsoft", 1)
    assert finding.severity == "unsupported"
    assert "bits=3" in finding.reason
    assert "matmul_nbits" in finding.reason


@pytest.mark.parametrize(
    ("model", "provider", "severity", "reason"),
    [
        # types and opsets of the table
        (lambda: matmul(F64), DML, "falls back to CPU", "A of float, float16, not double"),
        (lambda: matmul(F64), CUDA, None, ""),
        (lambda: matmul(BF16), CUDA, None, ""),
        (lambda: matmul(BF16), DML, "unsupported", "not bfloat16; CPUExecutionProvider has MatMul"),
        (lambda: cast(F32, F16, 22), DML, None, ""),
        (lambda: cast(F32, F16, 23), DML, "falls back to CPU", "6, 9, 13, 19, 21, not of 23"),
        (lambda: cast(I64, I32, 23), DML, "note", "6, 9, 13, 19, 21, not of 23"),
        (lambda: cast(I64, I32, 23), CUDA, None, ""),
        (lambda: cast(F32, TensorProto.STRING, 22), CUDA, "falls back to CPU", "string"),
        (lambda: norm("SimplifiedLayerNormalization", BF16, ("out",)), CUDA, None, ""),
        # operators that are not there
        (lambda: one_node("NoSuchThing", {"x": (F32, (2,))}), CPU, "unsupported", "no such"),
        (
            lambda: one_node("Fast", {"x": (F32, (2,))}, domain="my.ops", domains=("my.ops",)),
            CPU,
            "unsupported",
            "no such operator",
        ),
        (
            lambda: one_node("RMSNormalization", {"x": (F32, (2, 8)), "s": (F32, (8,))}, opset=23),
            DML,
            "falls back to CPU",
            "DmlExecutionProvider has no RMSNormalization",
        ),
        # operators that ONNX defines by others
        (lambda: one_node("Mish", {"x": (F32, (2,))}), CUDA, "note", "it runs as other operators"),
        (
            lambda: one_node("Mish", {"x": (BF16, (2,))}),
            DML,
            "unsupported",
            "it runs as other operators: DmlExecutionProvider has Softplus of opset 1, not of 22",
        ),
        # MatMulNBits
        (lambda: matmul_nbits(bits=2, kind=HALF), CUDA, "unsupported", "bits=2, not 4 or 8"),
        (lambda: matmul_nbits(bits=2, kind=HALF), DML, "falls back to CPU", "QueryMatMulNBits"),
        (lambda: matmul_nbits(k=80, kind=HALF), DML, "falls back to CPU", "K=80 is not a multiple"),
        (lambda: matmul_nbits(k=80, kind=HALF), CUDA, None, ""),
        (lambda: matmul_nbits(block_size=512, k=512, kind=HALF), CUDA, None, ""),
        (lambda: matmul_nbits(block_size=24, k=48, kind=HALF), CUDA, "unsupported", "power of 2"),
        (lambda: matmul_nbits(bias=True, kind=HALF), DML, "unsupported", "the input bias"),
        (lambda: matmul_nbits(bias=True, kind=HALF), CUDA, None, ""),
        (
            lambda: matmul_nbits(kind=HALF, zero_points=np.zeros(16, HALF)),
            DML,
            "unsupported",
            "not packed uint8",
        ),
        (lambda: matmul_nbits(kind=HALF, zero_points=np.zeros(16, HALF)), CUDA, None, ""),
        (
            lambda: matmul_nbits(kind=HALF, zero_points=np.zeros(16, np.float32)),
            CUDA,
            "falls back to CPU",
            "neither uint8 nor float16",
        ),
        (
            lambda: matmul_nbits(kind=HALF, scales=np.ones(16, np.float32)),
            CUDA,
            "unsupported",
            "scales is float and A is float16",
        ),
        # GatherBlockQuantized
        (lambda: gather(bits=8, zero_points=True), CUDA, None, ""),
        (lambda: gather(width=48, zero_points=True), CUDA, "unsupported", "leave a byte unfilled"),
        (lambda: gather(width=48, zero_points=True), CPU, None, ""),
        (lambda: gather(width=40), CUDA, "unsupported", "not a multiple of block_size=16"),
        (lambda: gather(quantize_axis=-1), CUDA, "unsupported", "quantize_axis=-1, not 1"),
        (lambda: gather(), DML, "falls back to CPU", "has no GatherBlockQuantized"),
        # GroupQueryAttention and RotaryEmbedding
        (lambda: attention(kind=HALF), DML, None, ""),
        (lambda: attention(kind=HALF, do_rotary=1), DML, "unsupported", "do_rotary=1 is ignored"),
        (lambda: attention(kind=HALF, do_rotary=1), CUDA, None, ""),
        (lambda: attention(kind=HALF, key=False, value=False), DML, "unsupported", "packed"),
        (lambda: attention(kind=HALF, key=False, value=False), CUDA, None, ""),
        (lambda: attention(kind=HALF, local_window_size=4), DML, "unsupported", "is ignored"),
        (lambda: attention(kind=HALF, local_window_size=4), CUDA, None, ""),
        (lambda: attention(kind=HALF, local_window_size=0), CUDA, "unsupported", "neither -1"),
        (lambda: attention(kind=HALF, softcap=30.0), DML, "unsupported", "softcap=30.0 is ignored"),
        (lambda: attention(kind=HALF, bias=True), DML, "unsupported", "the input attention_bias"),
        (lambda: attention(kind=HALF, bias=True), CUDA, None, ""),
        (lambda: attention(kind=HALF, bias=True, sink=True), CUDA, "unsupported", "together with"),
        (lambda: attention(kind=HALF, qk_output=1), CUDA, "unsupported", "qk_output=1"),
        (lambda: rotary(rotary_embedding_dim=16), DML, "unsupported", "without num_heads"),
        (lambda: rotary(rotary_embedding_dim=16, num_heads=4), DML, None, ""),
        # normalizations
        (lambda: norm(SKIP, F16, ("out", "", "", "sum")), DML, None, ""),
        (lambda: norm(SKIP, F16, ("out", "mean")), DML, "falls back to CPU", "the output mean"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_node(
    model: Callable[[], onnx.ModelProto], provider: str, severity: str | None, reason: str
) -> None:
    finding = verdict(model(), provider)
    assert (finding.severity if finding else None) == severity, finding
    if finding:
        assert finding.node == "planted"
        assert reason in finding.reason, finding


def test_nodes_of_subgraphs_are_checked() -> None:
    def branch(name: str, kind: int) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Cast", ["x"], [f"{name}_cast"], f"{name}/Cast", to=kind),
            helper.make_node("MatMul", [f"{name}_cast"] * 2, [f"{name}_out"], f"{name}/MatMul"),
            helper.make_node("Cast", [f"{name}_out"], [f"{name}_y"], f"{name}/Back", to=F32),
        ]
        return helper.make_graph(nodes, name, [], [onnx.ValueInfoProto(name=f"{name}_y")])

    choice = helper.make_node(
        "If",
        ["c"],
        ["y"],
        "choice",
        then_branch=branch("then", F32),
        else_branch=branch("else", F64),
    )
    graph = helper.make_graph(
        [choice],
        "g",
        [
            helper.make_tensor_value_info("c", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("x", F32, (2, 2)),
        ],
        [helper.make_tensor_value_info("y", F32, (2, 2))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    findings = check_graph(ir.from_proto(model), DML)
    assert [(finding.node, finding.severity) for finding in findings] == [
        ("else/MatMul", "falls back to CPU")
    ]


def test_an_unknown_type_is_told() -> None:
    model = matmul(F32)
    model.graph.input[0].ClearField("type")
    finding = verdict(model, DML)
    assert finding is not None
    assert (finding.severity, finding.reason) == ("note", "the types of a, out are not known")
    assert str(finding) == "note: MatMul planted (ai.onnx 22): the types of a, out are not known"


def test_what_is_no_model_or_no_provider(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff no model")
    with pytest.raises(StageError, match="not an ONNX model"):
        check_graph(tmp_path / "model.onnx", CPU)
    with pytest.raises(StageError, match="not an ONNX model"):
        check_graph(tmp_path / "missing.onnx", CPU)
    with pytest.raises(StageError, match="no table of the kernels of QNNExecutionProvider"):
        check_graph(ir.from_proto(matmul(F32)), "QNNExecutionProvider")


def test_the_table_is_what_the_document_says() -> None:
    table = kernel_table()
    assert table.providers == (CPU, CUDA, DML)
    assert set(table.domains) == {"ai.onnx", "ai.onnx.ml", "com.microsoft"}
    (kernel,) = table.kernels(DML, "com.microsoft", "MatMulNBits")
    assert (kernel.since, kernel.until) == (1, None)
    assert kernel.types == {"T1": {"float", "float16"}, "T2": {"uint8"}}
    newest = table.kernels(CPU, "ai.onnx", "MatMul")[0]
    assert newest.takes(13)
    assert not newest.takes(14)
    older = table.kernels(CPU, "ai.onnx", "MatMul")[1]
    assert (older.since, older.until, older.opsets) == (9, 12, "9-12")
    assert [older.takes(opset) for opset in (8, 9, 12, 13)] == [False, True, True, False]
    assert table.kernels(DML, "com.microsoft", "GatherBlockQuantized") == ()
