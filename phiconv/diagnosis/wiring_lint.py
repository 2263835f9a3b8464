"""Checks how the parts of a decoder are connected: what each reads, and that nothing is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from phiconv.diagnosis.config_lint import merged
from phiconv.diagnosis.decoder_graph import (
    DecoderGraph,
    DecoderLayer,
    Norm,
    constant_source,
)
from phiconv.diagnosis.operators import layer_end
from phiconv.diagnosis.results import Finding
from phiconv.diagnosis.stored_weight import constant

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint import ModelConfig

# Operators that leave the values as they are.
_TRANSPARENT = frozenset({"Cast", "Dropout", "Identity"})
_SKIP_BIAS = 3  # input of SkipSimplifiedLayerNormalization


def lint_wiring(graph: DecoderGraph, config: ModelConfig) -> list[Finding]:
    """What is missing, or reads something else than it should."""
    found = [*_missing(graph), *_head(graph, config)]
    for layer in graph.layers:
        found += _residuals(graph, layer)
        found += _positions(layer)
    return merged(found)


def _finding(check: str, component: str, layer: int | None, message: str) -> Finding:
    return Finding(check, "error", component, () if layer is None else (layer,), message)


def _missing(graph: DecoderGraph) -> Iterator[Finding]:
    if graph.embedding is None:
        yield _finding("structure", "embed_tokens", None, "no token embedding is found")
    if graph.head is None:
        yield _finding("structure", "lm_head", None, "no projection to the logits is found")
    for layer in graph.layers:
        attention = len(layer.qkv) in (1, 3)
        for component, found in (
            ("self_attn.qkv_proj", attention),
            ("input_layernorm", layer.input_norm is not None),
            ("self_attn.o_proj", layer.o_proj is not None),
            ("mlp.gate_up_proj", len(layer.gate_up) in (1, 2)),
            ("post_attention_layernorm", layer.post_norm is not None),
            ("mlp.down_proj", layer.down is not None),
        ):
            if not found:
                yield _finding("structure", component, layer.index, "it is not in the graph")


def _head(graph: DecoderGraph, config: ModelConfig) -> Iterator[Finding]:
    """The head must read the final norm."""
    if graph.head is None or graph.head_norm is graph.final_norm is not None:
        return
    reads = "something that is no norm"
    for name, layer, norm in graph.norms:
        if norm is graph.head_norm:
            reads = f"the {name} of layer {layer}"
    message = f"it reads {reads}, not the final norm"
    if 2 * config.intermediate_size == config.vocab_size:
        message += (
            "; gate_up_proj is as wide as the vocabulary, and the GenAI model builder finds the "
            "head by its width"
        )
    yield _finding("head", "lm_head", None, message)


def _residuals(graph: DecoderGraph, layer: DecoderLayer) -> Iterator[Finding]:
    """Each block's result must be added to the residual stream it read."""
    if layer.o_proj is not None:
        result = layer.o_proj.output
        yield from _addition("self_attn", layer, layer.input_norm, result, layer.post_norm)
    if layer.down is not None:
        result = layer.down.output
        yield from _addition("mlp", layer, layer.post_norm, result, layer_end(graph, layer))
    for norm in (layer.input_norm, layer.post_norm):
        bias = _skip_bias(norm)
        if bias is not None:
            message = f"a bias is added in front of it ({bias.name}), the checkpoint has none"
            component = (
                "input_layernorm" if norm is layer.input_norm else "post_attention_layernorm"
            )
            yield _finding("bias", component, layer.index, message)


def _addition(
    block: str, layer: DecoderLayer, before: Norm | None, result: ir.Value, after: Norm | None
) -> Iterator[Finding]:
    if before is None or after is None:
        return
    wanted = {_same(before.residual): "the residual stream", _same(result): "its result"}
    terms = {_same(term) for term in after.terms}
    missing = [text for value, text in wanted.items() if value not in terms]
    if len(missing) == 1:
        message = f"{missing[0]} is not added"
        others = [str(term.name) for term in after.terms if _same(term) not in wanted]
        if others:
            message += f", but {', '.join(others)}"
        yield _finding("residual", f"{block}.residual", layer.index, message)
    elif missing:
        names = " and ".join(str(term.name) for term in after.terms)
        message = f"the residual stream after it is {names}"
        yield _finding("residual", f"{block}.residual", layer.index, message)


def _same(value: ir.Value) -> ir.Value:
    """What a value is a copy of."""
    node = value.producer()
    while node is not None and node.op_type in _TRANSPARENT and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _skip_bias(norm: Norm | None) -> ir.Value | None:
    if norm is None or len(norm.node.inputs) <= _SKIP_BIAS or len(norm.terms) < 2:
        return None
    bias = norm.node.inputs[_SKIP_BIAS]
    values = constant(bias)
    return bias if values is None or values.any() else None


def _positions(layer: DecoderLayer) -> Iterator[Finding]:
    """Rotary embeddings must read the position ids as they come, but for LongRoPE's own offset."""
    for node in layer.rotary:
        value = node.inputs[1]
        producer = None if value is None else value.producer()
        if producer is None or producer.op_type not in ("Add", "Sub"):
            continue
        for term in producer.inputs:
            number = constant(constant_source(term))
            if number is not None and number.any():
                which = _which(layer, node)
                message = (
                    f"the positions of {which} are shifted: {producer.op_type} of "
                    f"{number.ravel()[0]:g}"
                )
                yield _finding("positions", "self_attn.rotary", layer.index, message)


def _which(layer: DecoderLayer, rotary: ir.Node) -> str:
    return "queries" if rotary is layer.rotary[0] else "keys"
