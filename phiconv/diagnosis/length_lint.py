"""Checks what attention is told of lengths: tokens in the mask, and where LongRoPE switches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from phiconv.diagnosis.config_lint import merged
from phiconv.diagnosis.decoder_graph import DecoderGraph, DecoderLayer, constant_source
from phiconv.diagnosis.results import Finding
from phiconv.diagnosis.stored_weight import constant

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint import ModelConfig

_COPIES = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
# Inputs of GroupQueryAttention.
_LAST_POSITION, _TOTAL_LENGTH = 5, 6
_POSITIONS = 1  # input of RotaryEmbedding


class _Shifted(NamedTuple):
    """A value as the result of an operator and a number that is added to it."""

    operator: ir.Node
    offset: float


def lint_lengths(graph: DecoderGraph, config: ModelConfig) -> list[Finding]:
    """What is a token off, and a switch between LongRoPE's factors at another length.

    Only what is computed as the GenAI model builder lays it out is judged: the last position from
    the sum of the mask, the length from its shape, the switch by one comparison.
    """
    found = [finding for layer in graph.layers for finding in _lengths(layer)]
    if config.rope is not None:
        for layer in graph.layers:
            found += _switch(layer, config.original_max_position_embeddings)
    return merged(found)


def _lengths(layer: DecoderLayer) -> Iterator[Finding]:
    node = layer.attention
    if node.op_type != "GroupQueryAttention":
        return
    for index, operator, wanted, what in (
        (_LAST_POSITION, "ReduceSum", -1, "the index of the last token"),
        (_TOTAL_LENGTH, "Gather", 0, "the number of tokens"),
    ):
        found = _shifted(node.inputs[index])
        if found is None or found.operator.op_type != operator or found.offset == wanted:
            continue
        message = f"{what} is off by {found.offset - wanted:+g}: attention mask {found.offset:+g}"
        yield Finding("attention mask", "error", "self_attn.attention", (layer.index,), message)


def _switch(layer: DecoderLayer, boundary: int) -> Iterator[Finding]:
    """The comparison that chooses LongRoPE's factors: of lengths, or of the greatest position."""
    for node in (layer.attention, *layer.rotary):
        for value in node.inputs:
            choice = None if value is None else value.producer()
            if choice is None:
                continue
            if choice.op_type == "If":
                yield from _compared(choice.inputs[0], boundary, layer)
            elif choice.op_type == "Add" and value is node.inputs[_POSITIONS]:
                for term in choice.inputs:
                    yield from _offset(term, boundary, layer)


def _offset(term: ir.Value | None, boundary: int, layer: DecoderLayer) -> Iterator[Finding]:
    """Rows of the short factors that positions step over: a product with the comparison."""
    product = None if term is None else term.producer()
    if product is None or product.op_type != "Mul":
        return
    for factor in product.inputs:
        number = _number(factor)
        if number is None:
            yield from _compared(factor, boundary, layer)
        elif number != boundary:
            yield _finding(f"positions step over {number:g} rows, not over {boundary}", layer)


def _compared(value: ir.Value | None, boundary: int, layer: DecoderLayer) -> Iterator[Finding]:
    node = None if value is None else value.producer()
    while node is not None and node.op_type in _COPIES:
        source = node.inputs[0]
        node = None if source is None else source.producer()
    if node is None or node.op_type not in ("Greater", "GreaterOrEqual"):
        return
    number, left = _number(node.inputs[1]), _shifted(node.inputs[0])
    if number is None:
        return
    # a length is the greatest position and one
    is_length = left is None or left.operator.op_type != "ReduceMax"
    longest = number if node.op_type == "Greater" else number - 1
    longest += 0 if is_length else 1
    if longest != boundary:
        message = f"the factors for short texts end at {longest:g} tokens, not at {boundary}"
        yield _finding(message, layer)


def _finding(message: str, layer: DecoderLayer) -> Finding:
    return Finding("rotary switch", "error", "self_attn.rotary", (layer.index,), message)


def _shifted(value: ir.Value | None) -> _Shifted | None:
    """Follows copies and additions of numbers back to an operator."""
    offset = 0.0
    while value is not None and (node := value.producer()) is not None:
        numbers = [_number(term) for term in node.inputs[:2]]
        if node.op_type in _COPIES:
            value = node.inputs[0]
        elif node.op_type in ("Add", "Sub") and numbers[1] is not None:
            offset += numbers[1] if node.op_type == "Add" else -numbers[1]
            value = node.inputs[0]
        elif node.op_type == "Add" and numbers[0] is not None:
            offset += numbers[0]
            value = node.inputs[1]
        else:
            return _Shifted(node, offset)
    return None


def _number(value: ir.Value | None) -> float | None:
    """A constant of one number."""
    found = constant(constant_source(value))
    return float(found.ravel()[0]) if found is not None and found.size == 1 else None
