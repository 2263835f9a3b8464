"""Checks what a graph says of itself against the checkpoint's configuration.

Attributes, constants and caches only: no model is run. How the parts are connected is checked in
`phiconv.diagnosis.wiring_lint`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from phiconv.diagnosis.decoder_graph import ACTIVATION_OPERATORS, DecoderGraph, DecoderLayer, Linear
from phiconv.diagnosis.results import Finding
from phiconv.diagnosis.rotary_cache import (
    RotaryCache,
    cache_kinds,
    expected_cache,
    explain,
    matches,
)
from phiconv.diagnosis.stored_weight import constant

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint import ModelConfig

_SILU = frozenset({"Sigmoid", "Silu", "Swish", "QuickGelu"})
_GELU = frozenset({"FastGelu", "Gelu"})
# transformers' names of the activations that these operators compute
_ACTIVATIONS = {"silu": _SILU, "swish": _SILU, "gelu": _GELU, "gelu_new": _GELU}
# Relative difference of a float32 attribute from the configuration's decimal.
_EQUAL = 1e-3
# Which input is the cos cache; the sin cache is the one after it.
_COS_INPUT = {"GroupQueryAttention": 7, "RotaryEmbedding": 2}


def lint_config(graph: DecoderGraph, config: ModelConfig) -> list[Finding]:
    """Every contradiction between a graph and a configuration, equal ones of layers merged."""
    found = list(_model(graph, config))
    windowed = any(_window_size(layer) == config.sliding_window for layer in graph.layers)
    for layer in graph.layers:
        found += _attention(layer, config)
        found += _window(layer, config, windowed)
        found += _mlp(layer, config)
    found += _epsilons(graph, config)
    found += _caches(graph, config)
    return merged(found)


def merged(findings: list[Finding]) -> list[Finding]:
    """Findings that say the same of several layers, as one; in the order of their first."""
    result: dict[tuple[str, str, str], Finding] = {}
    for finding in findings:
        key = (finding.check, finding.component, finding.message)
        before = result.get(key)
        layers = finding.layers if before is None else (*before.layers, *finding.layers)
        result[key] = replace(finding, layers=tuple(dict.fromkeys(layers)))
    return list(result.values())


def _error(check: str, component: str, layer: int | None, message: str) -> Finding:
    return Finding(check, "error", component, () if layer is None else (layer,), message)


def _model(graph: DecoderGraph, config: ModelConfig) -> Iterator[Finding]:
    count = len(graph.layers)
    if count != config.num_hidden_layers:
        message = f"{count} attention operators, the checkpoint has {config.num_hidden_layers}"
        yield _error("layers", "model", None, message)
    shape = graph.logits.shape
    width = None if shape is None else shape[-1]
    if isinstance(width, int) and width != config.vocab_size:
        message = f"{width} logits a token, the checkpoint's vocabulary has {config.vocab_size}"
        yield _error("vocabulary", "lm_head", None, message)
    if graph.head is not None:
        yield from _bias(graph.head, "lm_head")


def _attention(layer: DecoderLayer, config: ModelConfig) -> Iterator[Finding]:
    node, name = layer.attention, "self_attn.attention"
    for attribute, wanted in (
        ("num_heads", config.num_attention_heads),
        ("q_num_heads", config.num_attention_heads),
        ("kv_num_heads", config.num_key_value_heads),
    ):
        found = _number(node, attribute)
        if found is not None and found != wanted:
            message = f"{attribute} {found:g}, the checkpoint has {wanted}"
            yield _error("attention heads", name, layer.index, message)
    scale, wanted_scale = _number(node, "scale"), config.head_dim**-0.5
    if scale and abs(scale / wanted_scale - 1) > _EQUAL:
        message = f"scale {scale:.6g}, the checkpoint has {wanted_scale:.6g}"
        yield _error("attention scale", name, layer.index, message)
    for attribute in ("softcap", "smooth_softmax"):
        if _number(node, attribute):
            message = f"{attribute} {_number(node, attribute):g}, the checkpoint has none"
            yield _error("attention softcap", name, layer.index, message)
    yield from _rotation(layer, config)
    for linear in layer.qkv:
        yield from _bias(linear, f"self_attn.{linear.role}")
    if layer.o_proj is not None:
        yield from _bias(layer.o_proj, "self_attn.o_proj")


def _window_size(layer: DecoderLayer) -> int | None:
    """The window of a layer's attention operator, None where it has none."""
    found = _number(layer.attention, "local_window_size")
    return None if found is None or found <= 0 else int(found)


def _window(layer: DecoderLayer, config: ModelConfig, windowed: bool) -> Iterator[Finding]:
    """The sliding window is the checkpoint's; `windowed` says whether any layer has that.

    A provider may have no windows; then no layer has one, which is known and matters beyond it.
    """
    size = _window_size(layer)
    wanted = config.sliding_window
    if wanted is not None and wanted >= config.max_position_embeddings:
        wanted = None
    if size == wanted:
        return
    text = "none" if wanted is None else str(wanted)
    message = f"attention window {size or 'none'}, the checkpoint has {text}"
    if size is None:
        message += f": another result for more than {text} tokens"
    severity: Any = "error" if windowed or size is not None else "warning"
    yield Finding("attention window", severity, "self_attn.attention", (layer.index,), message)


def _rotation(layer: DecoderLayer, config: ModelConfig) -> Iterator[Finding]:
    fused = bool(_number(layer.attention, "do_rotary"))
    name, check = "self_attn.rotary", "rotary embedding"
    if fused and layer.rotary:
        yield _error(check, name, layer.index, "queries and keys are rotated twice")
    if not fused and len(layer.rotary) < 2:
        yield _error(check, name, layer.index, "queries and keys are not both rotated")
    if fused and _number(layer.attention, "rotary_interleaved"):
        yield _error(check, name, layer.index, "pairs are interleaved, Phi-3's are halves")
    for node in layer.rotary:
        if _number(node, "interleaved"):
            yield _error(check, name, layer.index, "pairs are interleaved, Phi-3's are halves")
        width = _number(node, "rotary_embedding_dim")
        if width and width != config.rotary_dim:
            message = f"it rotates {width:g} dimensions, the checkpoint {config.rotary_dim}"
            yield _error(check, name, layer.index, message)
        if (scale := _number(node, "scale")) is not None and scale != 1:
            yield _error(check, name, layer.index, f"it is scaled by {scale:g}")


def _mlp(layer: DecoderLayer, config: ModelConfig) -> Iterator[Finding]:
    for linear in (*layer.gate_up, *(() if layer.down is None else (layer.down,))):
        yield from _bias(linear, f"mlp.{linear.role}")
    known = _ACTIVATIONS.get(config.hidden_act)
    found = {
        node.op_type
        for linear in layer.gate_up
        for node in _after(linear)
        if node.op_type in ACTIVATION_OPERATORS
    }
    if known is not None and found and not found <= known:
        message = f"activation {', '.join(sorted(found))}, the checkpoint has {config.hidden_act}"
        yield _error("activation", "mlp.activation", layer.index, message)


def _after(linear: Linear) -> Iterator[ir.Node]:
    """The operators that read a projection, through a split."""
    for node in linear.output.consumers():
        yield node
        if node.op_type in ("Split", "Slice"):
            for output in node.outputs:
                yield from output.consumers()


def _bias(linear: Linear, component: str) -> Iterator[Finding]:
    if linear.bias is None:
        return
    values = constant(linear.bias)
    if values is None or values.any():
        message = f"a bias is added ({linear.bias.name}), the checkpoint has none"
        yield _error("bias", component, linear.layer, message)


def _epsilons(graph: DecoderGraph, config: ModelConfig) -> Iterator[Finding]:
    for name, layer, norm in graph.norms:
        if abs(norm.epsilon - config.rms_norm_eps) > _EQUAL * config.rms_norm_eps:
            message = f"epsilon {norm.epsilon:.6g}, the checkpoint has {config.rms_norm_eps:.6g}"
            yield _error("norm epsilon", name, layer, message)


def _caches(graph: DecoderGraph, config: ModelConfig) -> Iterator[Finding]:
    users: dict[tuple[int, int], list[int]] = {}
    pairs: dict[tuple[int, int], tuple[ir.Value, ir.Value]] = {}
    for layer in graph.layers:
        for node in (layer.attention, *layer.rotary):
            first = _COS_INPUT.get(node.op_type)
            inputs = () if first is None else tuple(node.inputs[first : first + 2])
            cos, sin = inputs if len(inputs) == 2 else (None, None)
            if cos is not None and sin is not None:
                key = (id(cos), id(sin))
                pairs[key] = (cos, sin)
                users.setdefault(key, []).append(layer.index)
    for key, (cos, sin) in pairs.items():
        layers = tuple(dict.fromkeys(users[key]))
        for severity, message in _cache_problems(cos, sin, config):
            yield Finding("rotary cache", severity, "self_attn.rotary", layers, message)


def _cache_problems(cos: ir.Value, sin: ir.Value, config: ModelConfig) -> Iterator[tuple[Any, str]]:
    import numpy as np

    branches = _branches(cos, sin)
    if not branches:
        yield "warning", f"{cos.name} and {sin.name} are no constants: not checked"
    for kinds, name, cosines, sines in branches:
        dtype = cosines.dtype.name
        found = RotaryCache(cosines.astype(np.float64), sines.astype(np.float64))
        rows = len(found.cos)
        wanted = [expected_cache(config, kind, rows + 2) for kind in kinds or cache_kinds(config)]
        if not any(matches(found, expected, dtype) for expected in wanted):
            yield "error", f"{name}: {explain(found, wanted[0], config, dtype)}"
        elif rows < config.max_position_embeddings and kinds != ("short",):
            message = f"{name} covers {rows} of {config.max_position_embeddings} positions"
            yield "warning", message


def _branches(cos: ir.Value, sin: ir.Value) -> list[tuple[tuple[str, ...], str, Any, Any]]:
    """What each cache should be (empty: any), its name, cosines and sines.

    An If chooses between the long (then) and the short (else) cache of LongRoPE.
    """
    node = cos.producer()
    if node is None or node.op_type != "If" or sin.producer() is not node:
        cosines, sines = constant(cos), constant(sin)
        found = cosines is not None and sines is not None
        return [((), f"{cos.name} and {sin.name}", cosines, sines)] if found else []
    result: list[tuple[tuple[str, ...], str, Any, Any]] = []
    for branch, kind in (("then_branch", "long"), ("else_branch", "short")):
        graph = node.attributes[branch].as_graph()
        outputs = [graph.outputs[node.outputs.index(value)] for value in (cos, sin)]
        cosines, sines = (constant(output) for output in outputs)
        if cosines is not None and sines is not None:
            name = " and ".join(str(output.name) for output in outputs)
            result.append(((kind,), name, cosines, sines))
    return result


def _number(node: ir.Node, name: str) -> float | None:
    attribute = node.attributes.get(name)
    return None if attribute is None else float(attribute.value)
