"""Which node of a session ran on which execution provider, by ONNX Runtime's own record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_WORK = ("MatMul", "Gemm", "Attention", "MoE")

RECORD = "session.record_ep_graph_assignment_info"
"""The entry of a session's configuration, set to 1, that `placed_nodes` needs."""


@dataclass(frozen=True)
class PlacedNode:
    """A node after graph optimisation and the provider it was given to."""

    provider: str
    operator: str
    name: str


def does_the_work(operator: str) -> bool:
    """Whether an operator, such as MatMulNBits, should never be off the provider in use.

    Graph optimisation makes operators such as FusedMatMul, so what counts is a part of the name.
    """
    return any(word in operator for word in _WORK)


def placed_nodes(session: Any) -> list[PlacedNode]:
    """Every node of an `onnxruntime.InferenceSession` made with `RECORD`."""
    return [
        PlacedNode(subgraph.ep_name, node.op_type, node.name)
        for subgraph in session.get_provider_graph_assignment_info()
        for node in subgraph.get_nodes()
    ]


def count_nodes(nodes: Iterable[PlacedNode]) -> dict[str, dict[str, int]]:
    """Provider -> operator type -> number of nodes."""
    counts: dict[str, Counter[str]] = {}
    for node in nodes:
        counts.setdefault(node.provider, Counter())[node.operator] += 1
    return {name: dict(sorted(counts[name].items())) for name in sorted(counts)}


def stray_nodes(nodes: Iterable[PlacedNode], provider: str) -> tuple[str, ...]:
    """The nodes that do the work elsewhere than on `provider`, one line each."""
    return tuple(
        f"{node.operator} {node.name or '(no name)'} on {node.provider}"
        for node in nodes
        if does_the_work(node.operator) and node.provider != provider
    )
