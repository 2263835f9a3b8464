"""Writes an ONNX graph node by node, in the order in which the nodes run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phiconv.onnx.graph import placeholder
from phiconv.onnx.weights import Dense, Expression, Rows, row_count

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

Shape = Sequence[int | str]

IR_VERSION = 10
OPSET = 22
CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

BATCH, SEQUENCE, TOTAL_SEQUENCE = "batch_size", "sequence_length", "total_sequence_length"


class GraphWriter:
    """A graph in the making, whose weights are expressions over a checkpoint.

    Names are those by which ONNX Runtime GenAI's tools and the published artifacts call the same
    thing: a node `/model/layers.0/mlp/Mul` has the output `/model/layers.0/mlp/Mul/output_0`.

    Args:
        dtype: The type of activations and weights.

    Attributes:
        dtype: That type.
        model: The model, complete up to the node written last.
        weights: Expression by name of each weight.
    """

    def __init__(self, dtype: ir.DataType):
        import onnx_ir as ir

        graph = ir.Graph(
            inputs=(),
            outputs=(),
            nodes=(),
            opset_imports={"": OPSET, CONTRIB: 1},
            name="main_graph",
        )
        self.dtype = dtype
        self.model = ir.Model(graph, ir_version=IR_VERSION, producer_name="phiconv")
        self.weights: dict[str, Expression] = {}
        self._constants: dict[str, ir.Value] = {}

    def hidden(self, width: int) -> Shape:
        """The shape `[batch, sequence, width]` of activations."""
        return (BATCH, SEQUENCE, width)

    def value(self, name: str, dtype: ir.DataType, shape: Shape | None) -> ir.Value:
        """A value that nothing gives yet; `shape` is None where it is not declared."""
        import onnx_ir as ir

        declared = None if shape is None else ir.Shape(shape)
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=declared)

    def input(self, name: str, dtype: ir.DataType, shape: Shape) -> ir.Value:
        """Declares an input of the graph."""
        value = self.value(name, dtype, shape)
        self.model.graph.inputs.append(value)
        return value

    def output(self, name: str, dtype: ir.DataType, shape: Shape) -> ir.Value:
        """Declares an output of the graph, to be given by a node later."""
        value = self.value(name, dtype, shape)
        self.model.graph.outputs.append(value)
        return value

    def node(
        self,
        op_type: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> None:
        """Writes a node; None stands for an optional input or output that is left out."""
        import onnx_ir as ir

        given = [ir.Value(name="") if output is None else output for output in outputs]
        self.model.graph.append(
            ir.node(op_type, inputs, attributes, domain=domain, outputs=given, name=name)
        )

    def apply(
        self,
        op_type: str,
        name: str,
        *inputs: ir.Value,
        shape: Shape | None,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Writes a node with one output, of the type of activations by default."""
        output = self.value(f"{name}/output_0", dtype or self.dtype, shape)
        self.node(op_type, name, inputs, [output], domain=domain, **attributes)
        return output

    def constant(self, value: int | list[int]) -> ir.Value:
        """An int64 constant, written before the first node that takes it."""
        import onnx_ir as ir

        name = f"/model/constants/INT64/{value}"
        if name not in self._constants:
            # declared as a scalar whatever it is, as the GenAI model builder does
            self._constants[name] = self.value(name, ir.DataType.INT64, ())
            tensor = ir.tensor(value, dtype=ir.DataType.INT64, name=name)
            node = f"/model/constant_nodes/INT64/{value}"
            self.node("Constant", node, [], [self._constants[name]], value=tensor)
        return self._constants[name]

    def weight(
        self, name: str, rows: tuple[Rows, ...], width: int | None = None, *, transposed: bool
    ) -> ir.Value:
        """Declares a weight, to be computed when the model is written.

        Args:
            name: Its name in the graph.
            rows: Rows of the checkpoint.
            width: Values a row; None for a vector.
            transposed: Whether it is `[width, rows]`, as MatMul takes a linear's weight.
        """
        count = row_count(rows)
        shape = (count,) if width is None else (width, count) if transposed else (count, width)
        value = self.value(name, self.dtype, shape)
        value.const_value = placeholder(name, self.dtype, shape)
        self.model.graph.register_initializer(value)
        self.weights[name] = Dense(rows, transposed)
        return value

    def linear(
        self,
        name: str,
        hidden: ir.Value,
        rows: tuple[Rows, ...],
        width: int,
        output: ir.Value | None = None,
    ) -> ir.Value:
        """Writes the product with a linear's weight.

        Args:
            name: Such as `/model/layers.0/mlp/up_proj`.
            hidden: `[batch, sequence, width]`.
            rows: Rows of the checkpoint, one an output feature.
            width: Input features.
            output: What it gives, where that is declared already.
        """
        node = f"{name}/MatMul"
        weight = self.weight(
            f"{name[1:].replace('/', '.')}.MatMul.weight", rows, width, transposed=True
        )
        if output is None:
            output = self.value(f"{node}/output_0", self.dtype, self.hidden(row_count(rows)))
        self.node("MatMul", node, [hidden, weight], [output])
        return output

    def tensor(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """Declares an initializer whose data is at hand."""
        import onnx_ir as ir

        tensor = ir.tensor(array, name=name)
        value = self.value(name, tensor.dtype, array.shape)
        value.const_value = tensor
        self.model.graph.register_initializer(value)
        return value

    def branch(
        self, name: str, constants: Sequence[tuple[str, str, np.ndarray[Any, Any]]]
    ) -> ir.Graph:
        """A branch of `If` that gives constants.

        Args:
            name: The branch's name.
            constants: Name of the node, name of its output, and the data of each.
        """
        import onnx_ir as ir

        nodes = []
        for node, output, array in constants:
            value = self.value(output, self.dtype, array.shape)
            attributes = {"value": ir.tensor(array)}
            nodes.append(ir.node("Constant", [], attributes, outputs=[value], name=node))
        outputs = [node.outputs[0] for node in nodes]
        return ir.Graph(inputs=[], outputs=outputs, nodes=nodes, name=name)
