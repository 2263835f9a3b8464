"""Rewrites an fp32 graph to fp16, lazily: types change, weights are rounded when written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from phiconv.errors import ExportError
from phiconv.onnx.graph import OnnxGraph, placeholder
from phiconv.onnx.weights import Dense

if TYPE_CHECKING:
    import onnx_ir as ir


def cast_graph(graph: OnnxGraph, *, overflow: Literal["error", "clamp"]) -> int:
    """Turn every float32 value of a graph into float16, in place.

    Args:
        graph: A lazy graph whose weights are not quantized yet.
        overflow: What the writer does with a weight beyond fp16's largest value, 65504.

    Returns:
        How many values changed their type.

    Raises:
        ExportError: The graph is already quantized, or holds a float constant beyond fp16.
    """
    import onnx_ir as ir

    if any(not isinstance(expr, Dense) for expr in graph.weights.values()):
        raise ExportError(
            "a quantized graph cannot be cast: its scales were computed for fp32",
            remedy="put the cast stage before the quantize stage",
        )
    half = ir.TensorType(ir.DataType.FLOAT16)
    changed = 0
    for value in _values(graph.model):
        if value.dtype != ir.DataType.FLOAT:
            continue
        value.type = half
        changed += 1
        if value.name is not None and value.name in graph.weights:
            expr = graph.weights[value.name]
            assert isinstance(expr, Dense) and value.shape is not None
            graph.weights[value.name] = replace(expr, overflow=overflow)
            shape = tuple(int(dim) for dim in value.shape.numpy())
            value.const_value = placeholder(value.name, ir.DataType.FLOAT16, shape)
        elif value.const_value is not None and value.is_initializer():
            value.const_value = _half(value.const_value)
    for node in graph.model.graph:
        _cast_attributes(node)
    return changed


def _values(model: ir.Model) -> list[ir.Value]:
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values()]
    return values + [value for node in graph for value in node.outputs]


def _cast_attributes(node: ir.Node) -> None:
    """Constants and explicit casts name a type of their own."""
    import onnx_ir as ir

    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrTensor(name, _half(tensor))
        elif (node.op_type, name) == ("Cast", "to") and attribute.as_int() == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT16))


def _half(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    import numpy as np
    import onnx_ir as ir

    values = tensor.numpy()
    if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError(f"constant {tensor.name} leaves the range of fp16")
    return ir.Tensor(values.astype(np.float16), name=tensor.name)
