"""Element types of all values of a graph, without shape inference.

Types are ONNX's names: float, float16, bfloat16, double, int64, uint8...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from phiconv.runtimes.kernel_table import Parameter, Signature

if TYPE_CHECKING:
    import onnx_ir as ir

Types = dict["ir.Value", str | None]
"""Type of each value; None if it is not known or the value is not a tensor."""

# Attributes that state the type of an output, of Cast, EyeLike, QuantizeLinear and the like.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def value_types(graph: ir.Graph, signature: Callable[[ir.Node], Signature | None]) -> Types:
    """Types of the values of a graph and its subgraphs.

    A value's own type counts; where it has none, what its node says: an attribute, or the type of
    an input with the same type constraint. That is how all operators of ONNX Runtime for language
    models behave, com.microsoft's included, which ONNX's own inference does not know.

    Args:
        graph: Its nodes in topological order.
        signature: Gives the operator of a node, None if it is unknown.
    """
    types: Types = {}
    _infer(graph, signature, types)
    return types


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node (If, Loop, Scan) has as attributes."""
    import onnx_ir as ir

    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def parameter_at(parameters: tuple[Parameter, ...], index: int) -> Parameter | None:
    """The formal parameter of an actual one: the last of them takes all that follow."""
    return parameters[min(index, len(parameters) - 1)] if parameters else None


def _infer(graph: ir.Graph, signature: Callable[[ir.Node], Signature | None], types: Types) -> None:
    for value in (*graph.inputs, *graph.initializers.values()):
        types[value] = _stated(value)
    for node in graph:
        for subgraph in subgraphs(node):
            _infer(subgraph, signature, types)
        definition = signature(node)
        for index, value in enumerate(node.outputs):
            types[value] = _stated(value) or _result(node, definition, index, types)


def _stated(value: ir.Value) -> str | None:
    import onnx_ir as ir

    return _name(value.type.dtype) if isinstance(value.type, ir.TensorType) else None


def _name(dtype: ir.DataType) -> str | None:
    return None if dtype.name == "UNDEFINED" else dtype.name.lower()


def _result(node: ir.Node, definition: Signature | None, index: int, types: Types) -> str | None:
    """Type of an output of a node, by its attributes, inputs or subgraphs."""
    import onnx_ir as ir

    for name in _TYPE_ATTRIBUTES:
        attribute = node.attributes.get(name)
        if attribute is not None and not attribute.is_ref() and attribute.as_int():
            return _name(ir.DataType(attribute.as_int()))
    if node.op_type in ("Constant", "ConstantOfShape") and not node.domain:
        return _constant(node)
    if node.op_type == "If":
        return types.get(next(subgraphs(node)).outputs[index])
    result = parameter_at(definition.outputs, index) if definition is not None else None
    if definition is None or result is None or result.type is not None:
        return result.type if result is not None else None
    for position, value in enumerate(node.inputs):
        parameter = parameter_at(definition.inputs, position)
        if value is None or parameter is None or not parameter.uniform:
            continue
        if parameter.constraint == result.constraint:
            return types.get(value)
    return None


def _constant(node: ir.Node) -> str | None:
    for name, kind in (
        ("value_int", "int64"),
        ("value_float", "float"),
        ("value_string", "string"),
    ):
        if name in node.attributes or f"{name}s" in node.attributes:
            return kind
    value = node.attributes.get("value")
    if value is not None:
        return _name(value.as_tensor().dtype)
    return "float" if node.op_type == "ConstantOfShape" else None
