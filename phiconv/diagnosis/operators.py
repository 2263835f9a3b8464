"""Every step of a layer as the artifact ran it, against fp32 on the very same inputs.

A linear step is repeated with the artifact's own weights, so what is left is the error of graph and
runtime: a wrong epsilon, rotary embedding, mask, bias or missing addition, an overflow. Errors do
not pass from one step to the next, because every step starts from the artifact's own values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phiconv.diagnosis.decoder_graph import DecoderGraph, DecoderLayer, Linear, Norm
from phiconv.diagnosis.probe import rounds_activations
from phiconv.diagnosis.results import OperatorError, finite
from phiconv.diagnosis.stored_weight import (
    StoredWeight,
    embedding_weight,
    linear_weight,
    norm_weight,
)
from phiconv.errors import StageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from phiconv.checkpoint import ModelConfig
    from phiconv.diagnosis.reference_steps import ReferenceSteps

# What rounding explains, by the coarsest type that a step reads or writes.
_TOLERANCES = {"float32": 1e-3, "float16": 1e-2}
# Activations rounded to int8, each block of them with a scale of its own.
_INT8_TOLERANCE = 5e-2
_WEIGHT_ROWS = 8192

Values = Mapping[str, "NDArray[Any]"]


def layer_end(graph: DecoderGraph, layer: DecoderLayer) -> Norm | None:
    """The norm in front of which a layer's result is added to the residual stream."""
    following = layer.index + 1
    if following < len(graph.layers):
        return graph.layers[following].input_norm
    return graph.final_norm


def layer_values(graph: DecoderGraph, layer: DecoderLayer) -> list[ir.Value]:
    """What `layer_operators` looks at."""
    values: list[ir.Value] = [*layer.attention.outputs[:2]]
    for norm in (layer.input_norm, layer.post_norm):
        if norm is not None:
            values += [norm.residual, norm.output]
    for linear in layer.linears:
        values += [linear.input, linear.output]
    values += [node.outputs[0] for node in layer.rotary]
    end = layer_end(graph, layer)
    return values if end is None else [*values, end.residual]


def end_values(graph: DecoderGraph) -> list[ir.Value]:
    """What `end_operators` looks at."""
    values = [graph.logits]
    if graph.embedding is not None:
        values.append(graph.embedding.outputs[0])
    if graph.final_norm is not None:
        values += [graph.final_norm.residual, graph.final_norm.output]
    if graph.head is not None:
        values.append(graph.head.input)
    return values


def layer_operators(
    graph: DecoderGraph,
    layer: DecoderLayer,
    values: Values,
    steps: ReferenceSteps,
    config: ModelConfig,
) -> list[OperatorError]:
    """The steps of one layer in order; a step whose inputs are not finite is left out.

    Args:
        graph: The decoder.
        layer: One of its layers.
        values: The artifact's values of `layer_values`, one window.
        steps: The reference's steps for windows of that length.
        config: The checkpoint's configuration.
    """
    check = _Check(values, layer.index)
    check.norm("input_layernorm", layer.input_norm, steps)
    for linear in layer.qkv:
        check.linear(f"self_attn.{linear.role}", linear, steps)
    _check_attention(check, layer, steps, config)
    residual = None if layer.input_norm is None else layer.input_norm.residual
    if layer.o_proj is not None:
        check.linear("self_attn.o_proj", layer.o_proj, steps)
        check.addition("self_attn.residual", residual, layer.o_proj.output, layer.post_norm)
    check.norm("post_attention_layernorm", layer.post_norm, steps)
    for linear in layer.gate_up:
        check.linear(f"mlp.{linear.role}", linear, steps)
    if layer.down is not None:
        parts = [linear.output for linear in layer.gate_up]
        check.step("mlp.activation", parts, layer.down.input, lambda *x: steps.gated(_packed(x)))
        check.linear("mlp.down_proj", layer.down, steps)
        residual = None if layer.post_norm is None else layer.post_norm.residual
        check.addition("mlp.residual", residual, layer.down.output, layer_end(graph, layer))
    return check.errors


def end_operators(
    graph: DecoderGraph, values: Values, window: NDArray[np.int64], steps: ReferenceSteps
) -> tuple[list[OperatorError], list[OperatorError]]:
    """The embedding's step, and those of the final norm and the head."""
    before, after = _Check(values, None), _Check(values, None)
    if graph.embedding is not None:
        table = _readable(embedding_weight, graph.embedding)
        if table is not None:
            before.step(
                "embed_tokens", [], graph.embedding.outputs[0], lambda: _rows(table, window)
            )
    after.norm("norm", graph.final_norm, steps)
    if graph.head is not None:
        after.linear("lm_head", graph.head, steps)
    return before.errors, after.errors


def _check_attention(
    check: _Check, layer: DecoderLayer, steps: ReferenceSteps, config: ModelConfig
) -> None:
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    parts = [linear.output for linear in layer.qkv]
    if len(layer.rotary) == 2 and len(parts) == 3:
        for what, source, node in zip(("queries", "keys"), parts, layer.rotary, strict=False):
            name = f"self_attn.rotary ({what})"
            check.step(name, [source], node.outputs[0], lambda x: steps.rotated(x))
    elif len(layer.attention.outputs) > 1 and layer.attention.outputs[1].name:

        def keys(*found: NDArray[Any]) -> NDArray[np.float32]:
            rotated = steps.rotated(_packed(found)[:, q : q + kv])
            heads = rotated.reshape(len(rotated), config.num_key_value_heads, -1)
            return heads.transpose(1, 0, 2)  # as the KV cache has them

        check.step("self_attn.rotary (keys)", parts, layer.attention.outputs[1], keys)
    output = layer.attention.outputs[0]
    check.step("self_attn.attention", parts, output, lambda *x: steps.attention(_packed(x)))


class _Check:
    """Compares steps of one layer and keeps the results."""

    def __init__(self, values: Values, layer: int | None):
        self.errors: list[OperatorError] = []
        self._values = values
        self._layer = layer

    def norm(self, component: str, norm: Norm | None, steps: ReferenceSteps) -> None:
        weight = None if norm is None else _readable(norm_weight, norm.weight)
        if norm is None or weight is None:
            return
        rows = weight.rows(0, weight.shape[0])
        self.step(component, [norm.residual], norm.output, lambda x: steps.norm(x, rows))

    def linear(self, component: str, linear: Linear, steps: ReferenceSteps) -> None:
        weight = _readable(linear_weight, linear.node)
        if weight is None:
            return
        least = _INT8_TOLERANCE if rounds_activations(linear.node) else 0.0
        self.step(
            component, [linear.input], linear.output, lambda x: _product(x, weight, steps), least
        )

    def addition(
        self, component: str, residual: ir.Value | None, block: ir.Value, end: Norm | None
    ) -> None:
        if end is not None and residual is not None:
            self.step(component, [residual, block], end.residual, lambda a, b: _float(a) + b)

    def step(
        self,
        component: str,
        inputs: Sequence[ir.Value],
        output: ir.Value,
        compute: Callable[..., NDArray[np.float32]],
        least_tolerance: float = 0.0,
    ) -> None:
        """Compares `output` with `compute(*inputs)`, all values by name."""
        import numpy as np

        arrays = [self._values.get(str(value.name)) for value in (*inputs, output)]
        if not all(array is not None for array in arrays):
            return
        *read, found = [array for array in arrays if array is not None]
        if not all(np.isfinite(array).all() for array in read):
            return  # the step that made them is the one to name
        expected = compute(*read)
        if found.size != expected.size:
            return  # a shape of its own: what reads it says so
        found = found.reshape(expected.shape)
        kinds = {array.dtype.name for array in (*read, *(a for a in arrays[-1:] if a is not None))}
        tolerance = max(least_tolerance, *(_TOLERANCES.get(kind, 1e-3) for kind in kinds))
        self.errors.append(_error(component, self._layer, found, expected, tolerance))


def _error(
    component: str,
    layer: int | None,
    found: NDArray[Any],
    expected: NDArray[np.float32],
    tolerance: float,
) -> OperatorError:
    import numpy as np

    usable = np.isfinite(found)
    largest = float(np.abs(found[usable].astype(np.float32)).max(initial=0.0))
    if not usable.all():
        count = f"{int((~usable).sum())} of {usable.size} values"
        peak = float(np.abs(expected).max(initial=0.0))
        detail = f"{count} are not finite; in fp32 they reach {peak:.4g}"
        if found.dtype == np.float16 and peak > (limit := float(np.finfo(np.float16).max)):
            detail = f"{count} overflow fp16: they reach {peak:.6g}, it ends at {limit:.6g}"
        return OperatorError(component, layer, None, tolerance, largest, detail)
    return OperatorError(component, layer, relative_error(found, expected), tolerance, largest)


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float | None:
    """|found - expected| / |expected|, Euclidean; None when it is not finite."""
    import numpy as np

    # not numpy.linalg.norm: BLAS would start its threads for a few thousand numbers
    difference = float(np.square(np.subtract(found, expected, dtype=np.float64)).sum())
    length = float(np.square(expected, dtype=np.float64).sum())
    if difference == 0:
        return 0.0
    return finite((difference / length) ** 0.5) if length > 0 else None


def _product(
    values: NDArray[Any], weight: StoredWeight, steps: ReferenceSteps
) -> NDArray[np.float32]:
    import numpy as np

    rows = weight.shape[0]
    flat = values.reshape(len(values), -1)
    blocks = [
        steps.linear(flat, weight.rows(start, min(start + _WEIGHT_ROWS, rows)))
        for start in range(0, rows, _WEIGHT_ROWS)
    ]
    return np.concatenate(blocks, axis=1)


def _rows(table: StoredWeight, window: NDArray[np.int64]) -> NDArray[np.float32]:
    import numpy as np

    return np.concatenate([table.rows(token, token + 1) for token in window.tolist()])


def _readable(read: Callable[[Any], StoredWeight], what: Any) -> StoredWeight | None:
    """A weight, or None where it is stored in a way not known here: `TensorError` says so."""
    try:
        return read(what)
    except StageError:
        return None


def _packed(parts: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    import numpy as np

    return np.concatenate([_float(part).reshape(len(part), -1) for part in parts], axis=1)


def _float(values: NDArray[Any]) -> NDArray[np.float32]:
    import numpy as np

    result: NDArray[np.float32] = values.astype(np.float32, copy=False)
    return result
