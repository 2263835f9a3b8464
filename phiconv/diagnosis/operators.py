"""Every step of a layer as the artifact ran it, against fp32 on the very same inputs.

A linear step is repeated with the artifact's own weights, so what is left is the error of graph and
runtime: a wrong epsilon, rotary embedding, mask, bias or missing addition, an overflow. Errors do
not pass from one step to the next, because every step starts from the artifact's own values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from phiconv.diagnosis.decoder_graph import DecoderGraph, DecoderLayer, Linear, Norm
from phiconv.diagnosis.probe import rounds_activations
from phiconv.diagnosis.results import OperatorError
from phiconv.diagnosis.step_check import INT8_TOLERANCE, StepCheck, Values
from phiconv.diagnosis.stored_weight import embedding_weight, linear_weight, norm_weight
from phiconv.errors import StageError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from phiconv.checkpoint import ModelConfig
    from phiconv.diagnosis.reference_steps import ReferenceSteps
    from phiconv.diagnosis.weight_format import StoredWeight


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
    check = StepCheck(values, layer.index, steps)
    _check_norm(check, "input_layernorm", layer.input_norm)
    for linear in layer.qkv:
        _check_linear(check, f"self_attn.{linear.role}", linear)
    _check_attention(check, layer, steps, config)
    residual = None if layer.input_norm is None else layer.input_norm.residual
    if layer.o_proj is not None:
        _check_linear(check, "self_attn.o_proj", layer.o_proj)
        end = layer.post_norm
        _check_addition(check, "self_attn.residual", residual, layer.o_proj.output, end)
    _check_norm(check, "post_attention_layernorm", layer.post_norm)
    for linear in layer.gate_up:
        _check_linear(check, f"mlp.{linear.role}", linear)
    if layer.down is not None:
        parts = [_name(linear.output) for linear in layer.gate_up]
        gated = _name(layer.down.input)
        check.step("mlp.activation", parts, gated, lambda *x: steps.gated(_packed(x)))
        _check_linear(check, "mlp.down_proj", layer.down)
        residual = None if layer.post_norm is None else layer.post_norm.residual
        end = layer_end(graph, layer)
        _check_addition(check, "mlp.residual", residual, layer.down.output, end)
    return check.errors


def end_operators(
    graph: DecoderGraph, values: Values, window: NDArray[np.int64], steps: ReferenceSteps
) -> tuple[list[OperatorError], list[OperatorError]]:
    """The embedding's step, and those of the final norm and the head."""
    before, after = StepCheck(values, None, steps), StepCheck(values, None, steps)
    if graph.embedding is not None:
        table = _readable(embedding_weight, graph.embedding)
        if table is not None:
            output = _name(graph.embedding.outputs[0])
            before.rows("embed_tokens", output, table, window.tolist())
    _check_norm(after, "norm", graph.final_norm)
    if graph.head is not None:
        _check_linear(after, "lm_head", graph.head)
    return before.errors, after.errors


def _check_attention(
    check: StepCheck, layer: DecoderLayer, steps: ReferenceSteps, config: ModelConfig
) -> None:
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    parts = [_name(linear.output) for linear in layer.qkv]
    if len(layer.rotary) == 2 and len(parts) == 3:
        for what, source, node in zip(("queries", "keys"), parts, layer.rotary, strict=False):
            name = f"self_attn.rotary ({what})"
            check.step(name, [source], _name(node.outputs[0]), lambda x: steps.rotated(x))
    elif len(layer.attention.outputs) > 1 and layer.attention.outputs[1].name:

        def keys(*found: NDArray[Any]) -> NDArray[np.float32]:
            rotated = steps.rotated(_packed(found)[:, q : q + kv])
            heads = rotated.reshape(len(rotated), config.num_key_value_heads, -1)
            return heads.transpose(1, 0, 2)  # as the KV cache has them

        check.step("self_attn.rotary (keys)", parts, _name(layer.attention.outputs[1]), keys)
    output = _name(layer.attention.outputs[0])
    check.step("self_attn.attention", parts, output, lambda *x: steps.attention(_packed(x)))


def _check_norm(check: StepCheck, component: str, norm: Norm | None) -> None:
    if norm is not None:
        weight = _readable(norm_weight, norm.weight)
        check.norm(component, _name(norm.residual), _name(norm.output), weight)


def _check_linear(check: StepCheck, component: str, linear: Linear) -> None:
    weight = _readable(linear_weight, linear.node)
    least = INT8_TOLERANCE if rounds_activations(linear.node) else 0.0
    check.linear(component, _name(linear.input), _name(linear.output), weight, least)


def _check_addition(
    check: StepCheck, component: str, residual: ir.Value | None, block: ir.Value, end: Norm | None
) -> None:
    if end is not None and residual is not None:
        names = [_name(residual), _name(block)]
        check.step(component, names, _name(end.residual), lambda a, b: _float(a) + b)


def _name(value: ir.Value) -> str:
    return str(value.name)


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
