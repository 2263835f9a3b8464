"""The parts of a decoder, found in an ONNX graph by its structure, whatever its names.

Attention, norm and linear operators are the landmarks; everything between them (casts, reshapes,
rotary embeddings, activations) is walked through. So graphs of the GenAI model builder, of phiconv
and of tools that use the same operators are read alike, with packed or separate projections, with
fused or separate rotary embedding, and also when they are wired wrongly: a part that is not there
is None, which is a finding of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from phiconv.errors import StageError

if TYPE_CHECKING:
    import onnx_ir as ir

ATTENTION_OPERATORS = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})
NORM_OPERATORS = frozenset(
    {"RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}
)
LINEAR_OPERATORS = frozenset({"FusedMatMul", "Gemm", "MatMul", "MatMulNBits"})
EMBEDDING_OPERATORS = frozenset({"Gather", "GatherBlockQuantized"})
ACTIVATION_OPERATORS = frozenset(
    {"FastGelu", "Gelu", "QuickGelu", "Relu", "Sigmoid", "Silu", "Swish", "Tanh"}
)
# What may stand between an initializer and the operator that takes it as its weight.
_WEIGHT_PATH = frozenset({"Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"})
_SKIP_NORM = "SkipSimplifiedLayerNormalization"
_SKIP_SUM = 3  # output of that operator: the sum of its two inputs

Role = Literal[
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "lm_head",
]


@dataclass(frozen=True, eq=False)
class Linear:
    """A matrix product with a constant weight.

    Attributes:
        node: The operator.
        role: What it computes, by its place in the graph.
        layer: Index of its layer; None for the head.
        output: Its result, after a bias where there is one.
        bias: The constant that is added to the product, or None.
    """

    node: ir.Node
    role: Role
    layer: int | None
    output: ir.Value
    bias: ir.Value | None

    @property
    def input(self) -> ir.Value:
        """What is multiplied."""
        return _required(self.node, 0)


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm, with or without the addition in front of it.

    Attributes:
        node: The operator.
        residual: What is normalised: the residual stream at this point.
        terms: The values whose sum is `residual`; `residual` alone where nothing is added.
    """

    node: ir.Node
    residual: ir.Value
    terms: tuple[ir.Value, ...]

    @property
    def weight(self) -> ir.Value:
        """Its weight."""
        return _required(self.node, 2 if self.node.op_type == _SKIP_NORM else 1)

    @property
    def output(self) -> ir.Value:
        """The normalised values."""
        return self.node.outputs[0]

    @property
    def epsilon(self) -> float:
        """Its epsilon; the operators' default where the node states none."""
        attribute = self.node.attributes.get("epsilon")
        default = 1e-12 if self.node.op_type == _SKIP_NORM else 1e-5
        return default if attribute is None else attribute.as_float()


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """One decoder layer; a part that the graph does not have is None or empty.

    Attributes:
        index: Its index, by the order of the attention operators.
        attention: The attention operator.
        input_norm: The norm that q, k and v read.
        qkv: One packed projection, or those of q, k and v.
        rotary: The separate rotary embeddings of q and k; empty where attention does it.
        o_proj: The projection of attention's result.
        post_norm: The norm that the MLP reads.
        gate_up: One packed projection, or gate and up.
        down: The MLP's last projection.
    """

    index: int
    attention: ir.Node
    input_norm: Norm | None
    qkv: tuple[Linear, ...]
    rotary: tuple[ir.Node, ...]
    o_proj: Linear | None
    post_norm: Norm | None
    gate_up: tuple[Linear, ...]
    down: Linear | None

    @property
    def linears(self) -> Iterator[Linear]:
        """Its projections in the order of computation."""
        yield from self.qkv
        yield from (part for part in (self.o_proj,) if part is not None)
        yield from self.gate_up
        yield from (part for part in (self.down,) if part is not None)


@dataclass(frozen=True, eq=False)
class DecoderGraph:
    """A decoder in an ONNX graph.

    Attributes:
        model: The model; the sum in front of every norm has a name, so it can be looked at.
        embedding: The operator that looks up token embeddings, or None.
        layers: The decoder layers in order.
        final_norm: The norm after the last layer, or None.
        head: The projection to the vocabulary, or None.
        head_norm: The norm the head reads; it should be `final_norm`.
        logits: The graph's logits.
    """

    model: ir.Model
    embedding: ir.Node | None
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm | None
    head: Linear | None
    head_norm: Norm | None
    logits: ir.Value

    @property
    def norms(self) -> Iterator[tuple[str, int | None, Norm]]:
        """Name, layer and node of every norm found, in order."""
        for layer in self.layers:
            if layer.input_norm is not None:
                yield "input_layernorm", layer.index, layer.input_norm
            if layer.post_norm is not None:
                yield "post_attention_layernorm", layer.index, layer.post_norm
        if self.final_norm is not None:
            yield "norm", None, self.final_norm


def read_decoder(model: ir.Model, where: str) -> DecoderGraph:
    """Finds the decoder in a model's graph.

    Args:
        model: The model. Unnamed sums of its skip norms are given a name, nothing else changes.
        where: The model's file, for errors.

    Raises:
        StageError: There is no output called logits, or no attention, norm or linear operator
            that could be read.
    """
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    if logits is None:
        raise StageError("the model has no output 'logits'", where=where)
    return _Reader(model, logits, where).read()


def constant_source(value: ir.Value | None) -> ir.Value | None:
    """The initializer or Constant a value is made of by layout changes alone, or None."""
    while value is not None:
        node = value.producer()
        if node is None:
            return value if value.is_initializer() else None
        if node.op_type == "Constant":
            return value
        if node.op_type not in _WEIGHT_PATH:
            return None
        value = node.inputs[0]
    return None


def _required(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise StageError(f"input {index} of the {node.op_type} is missing", where=str(node.name))
    return value


class _Reader:
    """Walks the graph from landmark to landmark."""

    def __init__(self, model: ir.Model, logits: ir.Value, where: str):
        self._model = model
        self._logits = logits
        self._where = where
        nodes = list(model.graph)
        self._order = {node: index for index, node in enumerate(nodes)}
        self._attention = [node for node in nodes if _is_attention(node)]
        self._linear = [node for node in nodes if _is_linear(node)]
        self._norm = {node: _norm(node) for node in nodes if node.op_type in NORM_OPERATORS}
        self._embedding = next((node for node in nodes if _is_embedding(node)), None)
        self._landmarks = {*self._attention, *self._linear, *self._norm}
        if self._embedding is not None:
            self._landmarks.add(self._embedding)

    def read(self) -> DecoderGraph:
        if not self._attention or not self._norm or not self._linear:
            raise StageError(
                f"no decoder found: {len(self._attention)} attention, {len(self._norm)} RMS norm "
                f"and {len(self._linear)} linear operators",
                where=self._where,
                remedy="diagnose reads graphs with "
                + ", ".join(sorted(ATTENTION_OPERATORS | NORM_OPERATORS)),
            )
        head = next((node for node in self._sources(self._logits) if node in self._linear), None)
        mlps = self._mlps(head)
        layers = tuple(
            self._layer(index, node, mlps[index] if index < len(mlps) else None)
            for index, node in enumerate(self._attention)
        )
        used = {norm for layer in layers for norm in (layer.input_norm, layer.post_norm)}
        left = [norm for norm in self._norm.values() if norm not in used]
        return DecoderGraph(
            model=self._model,
            embedding=self._embedding,
            layers=layers,
            final_norm=left[-1] if left else None,
            head=None if head is None else self._as_linear(head, "lm_head", None),
            head_norm=None if head is None else self._norm_before(head),
            logits=self._logits,
        )

    def _layer(self, index: int, attention: ir.Node, down: ir.Node | None) -> DecoderLayer:
        qkv = self._qkv(attention, index)
        after = [node for node in self._sinks(attention.outputs[0]) if node in self._linear]
        gate_up = self._gate_up(down, index)
        return DecoderLayer(
            index=index,
            attention=attention,
            input_norm=self._norm_before(qkv[0].node) if qkv else None,
            qkv=qkv,
            rotary=self._rotary(attention),
            o_proj=self._as_linear(after[0], "o_proj", index) if after else None,
            post_norm=self._norm_before(gate_up[0].node) if gate_up else None,
            gate_up=gate_up,
            down=None if down is None else self._as_linear(down, "down_proj", index),
        )

    def _qkv(self, attention: ir.Node, layer: int) -> tuple[Linear, ...]:
        inputs = attention.inputs[:3]
        packed = all(value is None for value in inputs[1:])
        roles: tuple[Role, ...] = ("qkv_proj",) if packed else ("q_proj", "k_proj", "v_proj")
        found = []
        for role, value in zip(roles, inputs, strict=False):
            before = [] if value is None else self._sources(value)
            products = [node for node in before if node in self._linear]
            if products:
                found.append(self._as_linear(products[0], role, layer))
        return tuple(found)

    def _mlps(self, head: ir.Node | None) -> list[ir.Node]:
        """The last projection of every MLP: linears that read other linears, in order."""
        found = []
        for node in self._linear:
            if node is head:
                continue
            before = self._sources(_required(node, 0))
            if any(source in self._linear for source in before):
                found.append(node)
        return found

    def _gate_up(self, down: ir.Node | None, layer: int) -> tuple[Linear, ...]:
        if down is None:
            return ()
        before = [node for node in self._sources(_required(down, 0)) if node in self._linear]
        before.sort(key=self._order.__getitem__)
        if len(before) == 1:
            return (self._as_linear(before[0], "gate_up_proj", layer),)
        linears = [self._as_linear(node, "up_proj", layer) for node in before]
        gates = [linear for linear in linears if _is_activated(linear.output)]
        ups = [linear for linear in linears if linear not in gates]
        if len(gates) != 1 or len(ups) != 1:
            return tuple(linears)
        return (self._as_linear(gates[0].node, "gate_proj", layer), ups[0])

    def _as_linear(self, node: ir.Node, role: Role, layer: int | None) -> Linear:
        output, bias = node.outputs[0], _own_bias(node)
        users = output.uses()
        if bias is None and len(users) == 1:
            (user, index) = next(iter(users))
            other = user.inputs[1 - index] if user.op_type == "Add" else None
            if constant_source(other) is not None:
                output, bias = user.outputs[0], other
        return Linear(node, role, layer, output, bias)

    def _norm_before(self, node: ir.Node) -> Norm | None:
        before = self._sources(_required(node, 0))
        return next((self._norm[found] for found in before if found in self._norm), None)

    def _rotary(self, attention: ir.Node) -> tuple[ir.Node, ...]:
        found: list[ir.Node] = []
        for value in attention.inputs[:2]:
            if value is not None:
                passed: list[ir.Node] = []
                self._sources(value, passed)
                found += [node for node in passed if node.op_type == "RotaryEmbedding"]
        return tuple(found)

    def _sources(self, value: ir.Value, passed: list[ir.Node] | None = None) -> list[ir.Node]:
        """The landmarks a value is made of, without what lies behind them."""
        found, seen, stack = [], set(), [value]
        while stack:
            node = stack.pop().producer()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._landmarks:
                found.append(node)
                continue
            if passed is not None:
                passed.append(node)
            stack.extend(item for item in reversed(node.inputs) if item is not None)
        return found

    def _sinks(self, value: ir.Value) -> list[ir.Node]:
        """The landmarks that read a value, without what lies behind them."""
        found, seen, stack = [], set(), [value]
        while stack:
            for node in stack.pop().consumers():
                if node in seen:
                    continue
                seen.add(node)
                if node in self._landmarks:
                    found.append(node)
                else:
                    stack.extend(node.outputs)
        return found


def _is_attention(node: ir.Node) -> bool:
    """Not com.microsoft's Attention, which holds the projections of q, k and v itself."""
    own_projections = node.op_type == "Attention" and node.domain == "com.microsoft"
    return node.op_type in ATTENTION_OPERATORS and not own_projections


def _is_linear(node: ir.Node) -> bool:
    return (
        node.op_type in LINEAR_OPERATORS
        and len(node.inputs) > 1
        and constant_source(node.inputs[1]) is not None
    )


def _is_embedding(node: ir.Node) -> bool:
    if node.op_type not in EMBEDDING_OPERATORS or len(node.inputs) < 2:
        return False
    ids = node.inputs[1]
    return ids is not None and ids.is_graph_input() and constant_source(node.inputs[0]) is not None


def _own_bias(node: ir.Node) -> ir.Value | None:
    index = {"Gemm": 2, "MatMulNBits": 5}.get(node.op_type)
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def _is_activated(value: ir.Value) -> bool:
    return any(node.op_type in ACTIVATION_OPERATORS for node in value.consumers())


def _norm(node: ir.Node) -> Norm:
    if node.op_type != _SKIP_NORM:
        residual = _required(node, 0)
        before = residual.producer()
        if before is None or before.op_type != "Add":
            return Norm(node, residual, (residual,))
        return Norm(node, residual, (_required(before, 0), _required(before, 1)))
    if len(node.outputs) <= _SKIP_SUM:
        first = len(node.outputs)
        node.resize_outputs(_SKIP_SUM + 1)
        for output in node.outputs[first:]:
            output.name = ""  # an optional output that is left out
    residual = node.outputs[_SKIP_SUM]
    if not residual.name:
        residual.name = f"{node.outputs[0].name}.residual"
        residual.type, residual.shape = node.outputs[0].type, node.outputs[0].shape
    return Norm(node, residual, (_required(node, 0), _required(node, 1)))
