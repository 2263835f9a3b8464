"""Rewrites MatMul to MatMulNBits and the embedding's Gather to GatherBlockQuantized, lazily.

Nothing is computed here: the dense expression of a weight is replaced by block-wise ones, which
the writer evaluates. Operator layouts: ONNX Runtime contrib operators `MatMulNBits` and
`GatherBlockQuantized`; initializer names as ONNX Runtime's own quantizer gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phiconv.errors import ExportError
from phiconv.onnx.graph import OnnxGraph
from phiconv.onnx.weights import Blockwise, Dense, Packed, Part, Quantization, Search

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint.weight_source import Grid, WeightSource


@dataclass(frozen=True)
class Target:
    """What one weight is to become.

    Attributes:
        bits: 4 or 8.
        block_size: 16, 32, 64, 128 or 256 input features for one scale.
        symmetric: Whether zero points are left out.
        search: How a block's scale is chosen; see `Quantization`.
        accuracy_level: MatMulNBits attribute: 0 unset, 1 fp32, 2 fp16, 3 bf16, 4 int8
            activations. Not used by an embedding.
    """

    bits: int
    block_size: int
    symmetric: bool
    search: Search
    accuracy_level: int

    @property
    def grid(self) -> Grid:
        """What its codes are on."""
        from phiconv.checkpoint.weight_source import Grid

        return Grid(self.bits, self.block_size, self.symmetric)


Choose = Callable[["WeightInfo"], "Target | None"]


@dataclass(frozen=True)
class WeightInfo:
    """A quantizable weight, as an override pattern sees it.

    Attributes:
        name: Name of the initializer, such as ``model.layers.0.mlp.down_proj.MatMul.weight``.
        tensors: Names of the checkpoint tensors it is made of.
        role: ``lm_head``, ``embedding`` or ``body``.
    """

    name: str
    tensors: tuple[str, ...]
    role: str


def quantize_graph(
    graph: OnnxGraph, choose: Choose, rounded: Mapping[str, Grid] | None = None
) -> dict[str, Target]:
    """Replace weights by block-wise quantized ones, in place.

    Args:
        graph: A lazy graph; its dense 2-D weights used by MatMul or Gather are candidates.
        choose: Returns what a weight becomes, or None to leave it as it is.
        rounded: Grids of the checkpoint tensors that are integer codes already; on their own grid
            these are copied.

    Returns:
        What was quantized, by initializer name.

    Raises:
        ExportError: A weight is shared by nodes that need it in different forms.
    """
    done: dict[str, Target] = {}
    for node in list(graph.model.graph):
        position = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        if position is None or node.domain:
            continue
        weight = node.inputs[position]
        name = weight.name if weight is not None else None
        expr = graph.weights.get(name) if name is not None else None
        if weight is None or name is None or not isinstance(expr, Dense):
            continue
        target = choose(_describe(name, expr, node.op_type))
        if target is None:
            continue
        if len(weight.uses()) > 1:
            raise ExportError(
                f"{name} is shared by several nodes and cannot be quantized for one of them",
                remedy="export with separate embedding and head",
            )
        tensors = {rows.tensor for rows in expr.rows}
        copied = all((rounded or {}).get(tensor) == target.grid for tensor in tensors)
        if node.op_type == "MatMul":
            _quantize_matmul(graph, node, expr, target, Packed if copied else Blockwise)
        else:
            _quantize_gather(graph, node, expr, target)
        graph.remove_initializer(name)
        done[name] = target
    return done


def take_codes(graph: OnnxGraph, source: WeightSource) -> int:
    """Replace the weights that a source has as integer codes by just these, in place.

    Returns:
        How many weights these are.
    """
    known = source.rounded.tensors if source.rounded is not None else {}

    def choose(weight: WeightInfo) -> Target | None:
        grids = {known.get(tensor) for tensor in weight.tensors}
        grid = grids.pop() if len(grids) == 1 else None
        if grid is None or weight.role == "embedding":
            return None
        return Target(grid.bits, grid.group_size, grid.symmetric, "none", 0)

    return len(quantize_graph(graph, choose, known)) if known else 0


def set_accuracy_levels(graph: OnnxGraph, choose: Callable[[WeightInfo, Grid], int]) -> None:
    """Set the attribute accuracy_level of the weights that are copied from codes.

    Args:
        graph: A lazy graph.
        choose: Returns the level of a weight on a grid; 0 leaves the attribute out.
    """
    import onnx_ir as ir

    from phiconv.checkpoint.weight_source import Grid

    for node in graph.model.graph:
        weight = node.inputs[1] if node.op_type == "MatMulNBits" else None
        expr = graph.weights.get(weight.name or "") if weight is not None else None
        if not isinstance(expr, Packed):
            continue
        q = expr.quantization
        info = _describe(expr.group, expr, "MatMul")
        level = choose(info, Grid(q.bits, q.block_size, q.symmetric))
        node.attributes.pop("accuracy_level", None)
        if level:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)


def _describe(name: str, expr: Dense | Packed, op_type: str) -> WeightInfo:
    role = "body"
    if op_type == "Gather":
        role = "embedding"
    elif name.startswith("lm_head."):
        role = "lm_head"
    return WeightInfo(name, tuple(dict.fromkeys(rows.tensor for rows in expr.rows)), role)


def _quantize_matmul(
    graph: OnnxGraph, node: ir.Node, expr: Dense, target: Target, op: type[Packed | Blockwise]
) -> None:
    """MatMul(x, W[K, N]) becomes MatMulNBits(x, B[N, blocks, blob], scales[N * blocks], ...)."""
    import onnx_ir as ir

    weight = node.inputs[1]
    assert weight is not None and weight.name is not None and weight.shape is not None
    if not expr.transposed:
        raise ExportError(f"{weight.name} is not stored as [N, K] in the checkpoint")
    k, n = (int(dim) for dim in weight.shape.numpy())
    blocks = -(-k // target.block_size)
    shapes: dict[Part, tuple[int, ...]] = {
        "weight": (n, blocks, target.block_size * target.bits // 8),
        "scales": (n * blocks,),
        "zero_points": (n * -(-blocks * target.bits // 8),),
    }
    inputs = [node.inputs[0], *_add_parts(graph, weight, expr, target, shapes, op)]
    attributes = {"K": k, "N": n, "bits": target.bits, "block_size": target.block_size}
    if target.accuracy_level:
        # 0 is the default, and most providers do not know the attribute.
        attributes["accuracy_level"] = target.accuracy_level
    _replace(
        graph,
        node,
        ir.Node(
            "com.microsoft",
            "MatMulNBits",
            inputs,
            [ir.AttrInt64(key, value) for key, value in attributes.items()],
            name=f"{node.name}_Q{target.bits}",
        ),
    )


def _quantize_gather(graph: OnnxGraph, node: ir.Node, expr: Dense, target: Target) -> None:
    """Gather(E[V, K], ids) becomes GatherBlockQuantized with blocks along K."""
    import onnx_ir as ir

    weight = node.inputs[0]
    assert weight is not None and weight.name is not None and weight.shape is not None
    v, k = (int(dim) for dim in weight.shape.numpy())
    if k % target.block_size:
        raise ExportError(
            f"the embedding's width {k} is not a multiple of block_size {target.block_size}",
            where=weight.name,
            remedy="choose another block_size for the embedding, or do not quantize it",
        )
    blocks = k // target.block_size
    shapes: dict[Part, tuple[int, ...]] = {
        "weight": (v, k * target.bits // 8),
        "scales": (v, blocks),
        "zero_points": (v, -(-blocks * target.bits // 8)),
    }
    data, scales, *zero_points = _add_parts(graph, weight, expr, target, shapes)
    attributes = {
        "bits": target.bits,
        "block_size": target.block_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    _replace(
        graph,
        node,
        ir.Node(
            "com.microsoft",
            "GatherBlockQuantized",
            [data, node.inputs[1], scales, *zero_points],
            [ir.AttrInt64(key, value) for key, value in attributes.items()],
            name=f"{node.name}_Q{target.bits}",
        ),
    )


def _add_parts(
    graph: OnnxGraph,
    weight: ir.Value,
    expr: Dense,
    target: Target,
    shapes: dict[Part, tuple[int, ...]],
    op: type[Packed | Blockwise] = Blockwise,
) -> list[ir.Value]:
    """Register packed weight, scales and (asymmetric) zero points of one weight."""
    import onnx_ir as ir

    assert weight.name is not None and weight.dtype is not None
    quantization = Quantization(
        bits=target.bits,
        block_size=target.block_size,
        symmetric=target.symmetric,
        search=target.search,
        scale_dtype="FLOAT" if weight.dtype == ir.DataType.FLOAT else "FLOAT16",
    )

    name = weight.name

    def add(suffix: str, dtype: ir.DataType, part: Part) -> ir.Value:
        part_expr = op(expr.rows, quantization, part, name)
        return graph.add_initializer(f"{name}_{suffix}", dtype, shapes[part], part_expr)

    parts = [
        add(f"Q{target.bits}", ir.DataType.UINT8, "weight"),
        add("scales", weight.dtype, "scales"),
    ]
    if not target.symmetric:
        parts.append(add("zero_points", ir.DataType.UINT8, "zero_points"))
    return parts


def _replace(graph: OnnxGraph, old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`, under the same output name."""
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.model.graph.insert_before(old, new)
    for user, index in list(before.uses()):
        user.replace_input_with(index, after)
    outputs = graph.model.graph.outputs
    for index, output in enumerate(outputs):
        if output is before:
            outputs[index] = after
    graph.model.graph.remove(old, safe=True)
