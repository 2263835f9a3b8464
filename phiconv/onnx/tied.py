"""Stores a tied embedding once, where the artifact can.

Quantized alike, the packed table of GatherBlockQuantized and the packed weight of MatMulNBits are
the same bytes in other shapes, as are their scales and zero points: two initializers then point to
one place in the data file. In floating point the embedding is [V, K] and MatMul wants [K, V]; the
head becomes a FusedMatMul that takes the embedding as it is (docs/adr/0004-tied-embeddings.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from phiconv.onnx.graph import OnnxGraph
from phiconv.onnx.weights import Dense, Expression

if TYPE_CHECKING:
    import onnx_ir as ir

# Of these ONNX Runtime's FusedMatMul was measured.
_FUSED_PROVIDERS = ("cpu", "cuda")


def share_float_head(graph: OnnxGraph) -> None:
    """Let a floating-point head that is the embedding take the embedding's initializer, in place.

    Nothing happens where either is quantized or cast otherwise, where the model is not tied, and
    in graphs for providers whose FusedMatMul was not measured.
    """
    import onnx_ir as ir

    if _provider(graph) not in _FUSED_PROVIDERS:
        return
    for gather, head in _pairs(graph):
        table, weight = gather.inputs[0], head.inputs[1]
        assert table is not None and weight is not None and weight.name is not None
        node = ir.Node(
            "com.microsoft",
            "FusedMatMul",
            [head.inputs[0], table],
            [ir.AttrInt64("transB", 1)],
            name=head.name,
        )
        _replace(graph, head, node)
        graph.remove_initializer(weight.name)


def _replace(graph: OnnxGraph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`, under the same output name."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    main = graph.model.graph
    main.insert_before(old, new)
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    main.remove(old, safe=True)


def _pairs(graph: OnnxGraph) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Gather and MatMul nodes whose weights are the same rows of the checkpoint, rounded alike."""
    nodes = list(graph.model.graph)
    for gather in nodes:
        table = _dense(graph, gather, "Gather", 0)
        for head in nodes if table is not None and not table.transposed else ():
            weight = _dense(graph, head, "MatMul", 1)
            if weight is None or replace(weight, transposed=False) != table:
                continue
            if _dtype(gather.inputs[0]) == _dtype(head.inputs[1]):
                yield gather, head


def _dense(graph: OnnxGraph, node: ir.Node, op_type: str, position: int) -> Dense | None:
    if node.op_type != op_type or node.domain:
        return None
    value = node.inputs[position]
    expr = graph.weights.get(value.name or "") if value is not None else None
    return expr if isinstance(expr, Dense) else None


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype


def _provider(graph: OnnxGraph) -> str | None:
    """What genai_config.json says that the graph is for; None without one."""
    file = None if graph.genai is None else graph.genai / "genai_config.json"
    if file is None or not file.is_file():
        return None
    decoder = json.loads(file.read_text(encoding="utf-8"))["model"]["decoder"]
    options = decoder.get("session_options", {}).get("provider_options", [])
    return next((str(name).lower() for entry in options for name in entry), "cpu")


def same_bytes(graph: OnnxGraph) -> dict[str, str]:
    """Initializers whose data is that of an earlier one: name -> name of the earlier.

    The parts of one quantized weight are written together, so all of them are shared or none.
    """
    first: dict[tuple[object, ...], dict[str, str]] = {}
    shared: dict[str, str] = {}
    for members in _weights(graph).values():
        content = tuple(_content(graph, name) for name in members.values())
        earlier = first.setdefault(content, members)
        if earlier is not members:
            shared |= {name: earlier[part] for part, name in members.items()}
    return shared


def _weights(graph: OnnxGraph) -> dict[str, dict[str, str]]:
    """The initializers of each weight by part; a dense one has a single part."""
    weights: dict[str, dict[str, str]] = {}
    for name in graph.model.graph.initializers:
        expr = graph.weights.get(name)
        if isinstance(expr, Dense):
            weights[name] = {"": name}
        elif expr is not None:
            weights.setdefault(expr.group, {})[expr.part] = name
    return weights


def _content(graph: OnnxGraph, name: str) -> tuple[Expression, str, int]:
    """What an initializer's bytes follow from."""
    expr, value = graph.weights[name], graph.model.graph.initializers[name]
    assert value.const_value is not None
    content = expr if isinstance(expr, Dense) else replace(expr, group="")
    return content, str(value.dtype), value.const_value.nbytes
