from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest

from phiconv.machine import CPU, CUDA
from phiconv.runtimes.placement import (
    RECORD,
    PlacedNode,
    count_nodes,
    does_the_work,
    placed_nodes,
    stray_nodes,
)

NODES = [
    PlacedNode(CUDA, "MatMulNBits", "/layers.0/MatMul"),
    PlacedNode(CPU, "Shape", "/mask/Shape"),
    PlacedNode(CPU, "GroupQueryAttention", "/layers.1/attn"),
    PlacedNode(CUDA, "MatMulNBits", "/layers.1/MatMul"),
    PlacedNode(CPU, "FusedMatMul", ""),
]


def test_a_node_that_does_the_work_elsewhere_is_named() -> None:
    assert stray_nodes(NODES, CUDA) == (
        "GroupQueryAttention /layers.1/attn on CPUExecutionProvider",
        "FusedMatMul (no name) on CPUExecutionProvider",
    )
    assert stray_nodes(NODES[:2], CUDA) == ()


def test_nodes_are_counted_by_provider_and_operator() -> None:
    assert count_nodes(NODES) == {
        CPU: {"FusedMatMul": 1, "GroupQueryAttention": 1, "Shape": 1},
        CUDA: {"MatMulNBits": 2},
    }


@pytest.mark.parametrize(
    ("operator", "works"),
    [("MatMul", True), ("MatMulNBits", True), ("MultiHeadAttention", True), ("FusedGemm", True),
     ("QMoE", True), ("Shape", False), ("Gather", False), ("SkipLayerNormalization", False)],
)  # fmt: skip
def test_which_operators_do_the_work(operator: str, works: bool) -> None:
    assert does_the_work(operator) is works


def test_every_node_of_a_session_is_known_with_its_name(cpu_artifact: Path) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry(RECORD, "1")
    session = ort.InferenceSession(str(cpu_artifact / "model.onnx"), options, providers=[CPU])
    nodes = placed_nodes(session)
    assert {node.provider for node in nodes} == {CPU}
    attention = [node.name for node in nodes if node.operator == "GroupQueryAttention"]
    assert attention == [f"/model/layers.{layer}/attn/GroupQueryAttention" for layer in (0, 1)]
