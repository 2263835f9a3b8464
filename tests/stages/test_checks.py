"""What a check says; what it finds is tested where it is found."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from phiconv.machine import CPU, CUDA
from phiconv.report.results import Provenance
from phiconv.runtimes.placement import count_nodes, placed_nodes, stray_nodes
from phiconv.stages.checks import Checked, check_placement


@dataclass(frozen=True)
class Node:
    """As ONNX Runtime's EpAssignedNode."""

    op_type: str
    name: str


@dataclass(frozen=True)
class Subgraph:
    """As ONNX Runtime's EpAssignedSubgraph: what it gave to a provider."""

    ep_name: str
    nodes: tuple[Node, ...]

    def get_nodes(self) -> tuple[Node, ...]:
        return self.nodes


class Recorded:
    """A session with such a record."""

    def __init__(self, *subgraphs: Subgraph) -> None:
        self._subgraphs = subgraphs

    def get_provider_graph_assignment_info(self) -> tuple[Subgraph, ...]:
        return self._subgraphs


# How the CUDA provider of onnxruntime-gpu 1.31.1 divides the graph of recipes/int4-cuda.yaml, one
# layer of it: what computes a length on the way to a value of the CPU stays there.
LENGTHS = (
    Node("Gather", "/model/attn_mask_reformat/attn_mask_subgraph/Gather"),
    Node("Cast", "/model/attn_mask_reformat/attn_mask_subgraph/Gather/Cast"),
)
LAYER = (
    Node("MatMulNBits", "/model/layers.0/attn/qkv_proj/MatMul_Q4"),
    Node("GroupQueryAttention", "/model/layers.0/attn/GroupQueryAttention"),
    Node(
        "SkipSimplifiedLayerNormalization", "/model/layers.0/post_attention_layernorm/SkipLayerNorm"
    ),
)
HEAD = Node("MatMulNBits", "/lm_head/MatMul_Q8")


def checked(*subgraphs: Subgraph, provider: str = CUDA) -> Checked:
    nodes = placed_nodes(Recorded(*subgraphs))
    return check_placement(
        Provenance(
            runtime="onnxruntime",
            runtime_version="1.31.1",
            target_provider=provider,
            provider=provider,
            placement=count_nodes(nodes),
            strays=stray_nodes(nodes, provider),
        )
    )


def test_lengths_on_the_cpu_are_as_they_should_be() -> None:
    found = checked(Subgraph(CPU, LENGTHS), Subgraph(CUDA, (*LAYER, HEAD)))
    (check,) = found.checks
    assert check.state == "clean"
    assert check.summary == (
        "4 nodes on CUDAExecutionProvider; 2 nodes on CPUExecutionProvider, none of them MatMul "
        "or attention"
    )
    assert found.counts == {"placement.fallback": 0}


def test_work_on_the_cpu_is_counted_and_named() -> None:
    found = checked(Subgraph(CPU, (*LENGTHS, HEAD)), Subgraph(CUDA, LAYER))
    (check,) = found.checks
    assert check.state == "errors"
    assert check.summary.startswith(
        "1 MatMul or attention node fell back from CUDAExecutionProvider; 3 nodes on CUDA"
    )
    assert check.findings == ("MatMulNBits /lm_head/MatMul_Q8 on CPUExecutionProvider",)
    assert found.counts == {"placement.fallback": 1}


@pytest.mark.parametrize("provider", [CPU, CUDA])
def test_one_provider_for_everything(provider: str) -> None:
    (check,) = checked(Subgraph(provider, LAYER), provider=provider).checks
    assert (check.state, check.summary) == ("clean", f"3 nodes on {provider}")
    (check,) = checked(provider=provider).checks
    assert check.summary == f"every node on {provider}, the only provider"
