"""The operators that ONNX defines an operator by: what runs where nothing has a kernel for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def function_body(node: ir.Node, opset: int, types: tuple[str | None, ...]) -> ir.Graph | None:
    """The graph that an operator of ai.onnx stands for, its inputs typed.

    As `Node::TryGetFunctionProto` of ONNX Runtime (core/graph/graph.cc) finds it: the newest body
    for the model's opset; a fixed one only if its operators have not changed since it was written.

    Args:
        node: A node whose operator ONNX defines as a function.
        opset: Opset of the model.
        types: Types of the node's inputs, None for an absent or unknown one.

    Returns:
        The body; None if there is none for this opset and these types.
    """
    import onnx
    import onnx_ir as ir

    dtypes = [ir.DataType[kind.upper()] if kind else None for kind in types]
    schema: Any = onnx.defs.get_schema(node.op_type, opset, "")
    fixed = schema.has_function and not schema.has_context_dependent_function
    written = (
        schema.function_opset_versions
        if fixed
        else schema.context_dependent_function_opset_versions
    )
    version = max((version for version in written if version <= opset), default=None)
    if version is None:
        return None
    if fixed:
        serialized = schema.get_function_with_opset_version(version)
    else:
        given = [
            onnx.helper.make_tensor_type_proto(dtype, None).SerializeToString() if dtype else b""
            for dtype in dtypes
        ]
        call = ir.to_proto(node).SerializeToString()
        serialized = schema.get_context_dependent_function_with_opset_version(version, call, given)
    proto = onnx.FunctionProto.FromString(serialized)
    if not proto.node or (fixed and not _unchanged(proto, version, opset)):
        return None
    proto.ClearField("output")  # LayerNormalization's lists some that nothing in it makes
    body: ir.Graph = ir.from_proto(proto).graph
    for value, dtype in zip(body.inputs, dtypes, strict=False):
        if dtype is not None:
            value.type = ir.TensorType(dtype)
    return body


def _unchanged(body: onnx.FunctionProto, written: int, opset: int) -> bool:
    """Whether the operators of a body are the same in both opsets."""
    from onnx.defs import get_schema

    return all(
        get_schema(op, written, "").since_version == get_schema(op, opset, "").since_version
        for op in {node.op_type for node in body.node}
    )
