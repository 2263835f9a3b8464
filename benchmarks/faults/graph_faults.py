"""Faults in an ONNX graph: attributes, constants, rotary caches and connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from benchmarks.faults.planting import Site, Truth, at
from benchmarks.faults.stored import Array, OnnxWeights

GraphFault = Callable[[OnnxWeights, Site], Truth | None]
ROTARY, ATTENTION = "self_attn.rotary", "self_attn.attention"


def _nodes(weights: OnnxWeights, *kinds: str) -> list[ir.Node]:
    return [node for node in weights.model.graph if node.op_type in kinds]


def _node(weights: OnnxWeights, name: str) -> ir.Node:
    return next(node for node in weights.model.graph if node.name == name)


def _layer(weights: OnnxWeights, site: Site) -> tuple[int, ir.Node]:
    """An attention operator, and its layer."""
    nodes = _nodes(weights, "GroupQueryAttention")
    layer = site.random.randrange(len(nodes))
    return layer, nodes[layer]


def _float(node: ir.Node, name: str, value: float) -> None:
    node.attributes[name] = ir.AttrFloat32(name, value)


def _integer(node: ir.Node, name: str, value: int) -> None:
    node.attributes[name] = ir.AttrInt64(name, value)


def epsilon(weights: OnnxWeights, site: Site) -> Truth:
    """One norm has another epsilon."""
    norms = _nodes(weights, "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
    node = site.random.choice(norms)
    value = site.random.choice((1e-6, 1e-8, 1e-12, 2e-5, 1e-3))
    _float(node, "epsilon", value)
    parts = str(node.name).split("/")
    index, name = int(parts[2].split(".")[1]), parts[3]
    last = site.checkpoint.config.num_hidden_layers
    place = (None, "norm") if index == last else (index, name)
    return at(place, f"epsilon {value:g}")


def attention_scale(weights: OnnxWeights, site: Site) -> Truth:
    """One layer's attention is scaled otherwise."""
    layer, node = _layer(weights, site)
    factor = site.random.choice((0.5, 2**0.5, 1.02, 8.0))
    _float(node, "scale", node.attributes["scale"].as_float() * factor)
    return at((layer, ATTENTION), f"scale times {factor:.3g}")


def missing_window(weights: OnnxWeights, site: Site) -> Truth | None:
    """One layer has no sliding window, where the checkpoint has one."""
    layer, node = _layer(weights, site)
    if node.attributes["local_window_size"].as_int() < 0:
        return None
    _integer(node, "local_window_size", -1)
    return at((layer, ATTENTION), "no window")


def other_window(weights: OnnxWeights, site: Site) -> Truth:
    """One layer has another sliding window."""
    layer, node = _layer(weights, site)
    size = site.random.choice((128, 2046, 2048))
    _integer(node, "local_window_size", size)
    return at((layer, ATTENTION), f"window {size}")


def interleaved_pairs(weights: OnnxWeights, site: Site) -> Truth:
    """Rotary pairs are neighbours instead of halves, in one layer."""
    layer, node = _layer(weights, site)
    if node.attributes["do_rotary"].as_int():
        _integer(node, "rotary_interleaved", 1)
    else:
        for rotary in _nodes(weights, "RotaryEmbedding"):
            if f"layers.{layer}/" in str(rotary.name):
                _integer(rotary, "interleaved", 1)
    return at((layer, ROTARY), "pairs are interleaved", (layer, ATTENTION))


def no_rotation(weights: OnnxWeights, site: Site) -> Truth | None:
    """One layer does not rotate at all."""
    layer, node = _layer(weights, site)
    if not node.attributes["do_rotary"].as_int():
        return None
    _integer(node, "do_rotary", 0)
    return at((layer, ROTARY), "nothing is rotated")


def key_value_heads(weights: OnnxWeights, site: Site) -> Truth | None:
    """Query heads use the key/value heads in turn instead of in groups: their order is another."""
    config = site.checkpoint.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads == groups:
        return None
    layer = site.random.randrange(config.num_hidden_layers)
    query = weights.matrices[layer, "self_attn.q_proj"]
    order = np.arange(heads).reshape(groups, -1).T.ravel()
    for array in query.arrays:
        array[:] = array.reshape(heads, -1, *array.shape[1:])[order].reshape(array.shape)
    return at((layer, "self_attn.q_proj"), "heads are in another order")


def fewer_key_value_heads(weights: OnnxWeights, site: Site) -> Truth | None:
    """Attention takes another number of key/value heads than there are."""
    layer, node = _layer(weights, site)
    _integer(node, "kv_num_heads", max(1, node.attributes["kv_num_heads"].as_int() // 2))
    return at((layer, ATTENTION), "half the key/value heads")


def mask_off_by_one(weights: OnnxWeights, site: Site) -> Truth:
    """The number of tokens that attention is told is off by one."""
    node = _node(weights, "/model/attn_mask_reformat/attn_mask_subgraph/Sub")
    value = site.random.choice((0, 2))
    array = np.array([value], np.int64)
    constant = ir.node("Constant", [], {"value": ir.tensor(array)}, name="planted")
    constant.outputs[0].name = "planted/output"
    weights.model.graph.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])
    layers = tuple(range(site.checkpoint.config.num_hidden_layers))
    return Truth(f"tokens - {value} instead of - 1", (ATTENTION,), layers, ("attention",))


def missing_residual(weights: OnnxWeights, site: Site) -> Truth:
    """One block's result replaces the residual stream instead of being added."""
    layer = site.random.randrange(site.checkpoint.config.num_hidden_layers)
    block = site.random.choice(("self_attn", "mlp"))
    following = "final_norm_layernorm" if layer + 1 == site.checkpoint.config.num_hidden_layers \
        else "input_layernorm"  # fmt: skip
    name = (
        f"/model/layers.{layer}/post_attention_layernorm/SkipLayerNorm"
        if block == "self_attn"
        else f"/model/layers.{layer + 1}/{following}/SkipLayerNorm"
    )
    skip = _node(weights, name)
    dtype = weights.norms[layer, "input_layernorm"].dtype
    zero = ir.node("Constant", [], {"value": ir.tensor(np.zeros(1, dtype))}, name="planted/zero")
    nothing = ir.node("Mul", [skip.inputs[0], zero.outputs[0]], name="planted/nothing")
    zero.outputs[0].name, nothing.outputs[0].name = "planted/zero/output", "planted/output"
    weights.model.graph.insert_before(skip, [zero, nothing])
    skip.replace_input_with(0, nothing.outputs[0])
    return at((layer, f"{block}.residual"), "the residual stream is not added")


def gelu(weights: OnnxWeights, site: Site) -> Truth:
    """One layer's MLP has GELU, in half of the cases its approximation x sigmoid(1.702 x)."""
    layer = site.random.randrange(site.checkpoint.config.num_hidden_layers)
    name = f"/model/layers.{layer}/mlp/act_fn"
    product, sigmoid = _node(weights, f"{name}/Mul"), _node(weights, f"{name}/Sigmoid")
    gate = sigmoid.inputs[0]
    assert gate is not None
    if site.random.random() < 0.5:
        quick = ir.node(
            "QuickGelu", [gate], {"alpha": 1.702}, domain="com.microsoft", name="planted"
        )
    else:
        quick = ir.node("Gelu", [gate], domain="com.microsoft", name="planted")
    quick.outputs[0].name = "planted/output"
    quick.outputs[0].type = gate.type
    weights.model.graph.insert_before(product, quick)
    product.outputs[0].replace_all_uses_with(quick.outputs[0])
    weights.model.graph.remove([product, sigmoid], safe=True)
    return at((layer, "mlp.activation"), quick.op_type, (layer, "mlp"))


def gate_is_up(weights: OnnxWeights, site: Site) -> Truth:
    """The activation is applied to the up projection: the two are connected the wrong way."""
    layer = site.random.randrange(site.checkpoint.config.num_hidden_layers)
    prefix = f"/model/layers.{layer}/mlp"
    product = _node(weights, f"{prefix}/Mul")
    activation = [_node(weights, f"{prefix}/act_fn/{name}") for name in ("Mul", "Sigmoid")]
    gate, up = activation[0].inputs[0], product.inputs[1]
    for node in activation:
        node.replace_input_with(0, up)
    product.replace_input_with(1, gate)
    # the projections after which the activation now stands
    weights.model.graph.sort()
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp")
    return Truth(f"layer {layer}: gate and up are connected the wrong way", names, (layer,))


def head_reads_another_norm(weights: OnnxWeights, site: Site) -> Truth:
    """The head reads a norm within the layers."""
    head = next(
        node for node in weights.model.graph if str(node.name).startswith("/lm_head/MatMul")
    )
    layer = site.random.randrange(site.checkpoint.config.num_hidden_layers)
    norm = _node(weights, f"/model/layers.{layer}/post_attention_layernorm/SkipLayerNorm")
    head.replace_input_with(0, norm.outputs[0])
    return at((None, "lm_head"), f"it reads the post_attention_layernorm of layer {layer}")


class Cache(NamedTuple):
    """A pair of rotary caches `[positions, pairs]`, changed in the file."""

    name: str
    cos: Array
    sin: Array


def _caches(weights: OnnxWeights) -> Iterator[Cache]:
    """Those of the graph, or those of the branches of LongRoPE's If."""
    if "cos_cache" in weights.model.graph.initializers:
        yield Cache("cos_cache", weights.array("cos_cache"), weights.array("sin_cache"))
        return
    (choice,) = _nodes(weights, "If")
    for branch in ("then_branch", "else_branch"):
        nodes = list(choice.attributes[branch].as_graph())
        tensors = [node.attributes["value"].as_tensor() for node in nodes]
        arrays = []
        for node, tensor in zip(nodes, tensors, strict=True):
            array = tensor.numpy().copy()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array, name=tensor.name))
            arrays.append(array)
        yield Cache(branch, *arrays)


def _recompute(cache: Cache, change: Callable[[Array], Array]) -> None:
    """Gives a cache the frequencies that `change` makes of its own, its scale kept."""
    cos, sin = cache.cos.astype(np.float64), cache.sin.astype(np.float64)
    scale = np.hypot(cos[1], sin[1])
    angles = np.outer(np.arange(len(cos)), change(np.arctan2(sin[1], cos[1])))
    cache.cos[:], cache.sin[:] = scale * np.cos(angles), scale * np.sin(angles)


def rotary(name: str, change: Callable[[Array, float], Array]) -> GraphFault:
    """Other frequencies in every cache: `change` gets a cache's and a random factor."""

    def plant(weights: OnnxWeights, site: Site) -> Truth:
        factor = site.random.choice((0.1, 0.5, 0.98, 1.05, 2.0, 50.0))
        for cache in _caches(weights):
            _recompute(cache, lambda frequencies: change(frequencies, factor))
        return _rotated(site, f"{name}, times {factor:g}")

    return plant


def _rotated(site: Site, what: str) -> Truth:
    layers = tuple(range(site.checkpoint.config.num_hidden_layers))
    return Truth(what, (ROTARY,), layers)


def _theta(frequencies: Array, factor: float) -> Array:
    count = len(frequencies)
    return frequencies * factor ** (-np.arange(count) / count)


def _one_factor(frequencies: Array, factor: float) -> Array:
    changed = frequencies.copy()
    changed[len(changed) // 2] *= factor
    return changed


def partial_as_whole(weights: OnnxWeights, site: Site) -> Truth | None:
    """Frequencies are spread over the whole head, where only a part of it is rotated."""
    config = site.checkpoint.config
    if config.rotary_dim == config.head_dim:
        return None
    share = 1 - config.rotary_dim / config.head_dim
    for cache in _caches(weights):
        pairs = np.arange(cache.cos.shape[1]) / cache.cos.shape[1]
        factors = config.rope_theta ** (share * pairs)
        _recompute(cache, factors.__mul__)
    return _rotated(site, "frequencies of the whole head")


def cache_scale(weights: OnnxWeights, site: Site) -> Truth:
    """Cosines and sines are scaled, as LongRoPE's are, by another factor."""
    factor = site.random.choice((0.8, 1.05, 1.19))
    for cache in _caches(weights):
        cache.cos[:], cache.sin[:] = cache.cos * factor, cache.sin * factor
    return _rotated(site, f"caches times {factor:g}")


def cache_shifted(weights: OnnxWeights, site: Site) -> Truth:
    """Every row of the caches holds the next position."""
    for cache in _caches(weights):
        cache.cos[:-1], cache.sin[:-1] = cache.cos[1:].copy(), cache.sin[1:].copy()
    return _rotated(site, "shifted by one position")


def short_and_long_exchanged(weights: OnnxWeights, site: Site) -> Truth | None:
    """LongRoPE's switch chooses the wrong branch."""
    found = _nodes(weights, "If")
    if not found:
        return None
    (choice,) = found
    kind = site.random.choice(("branches", "boundary"))
    if kind == "branches":
        then, other = choice.attributes["then_branch"], choice.attributes["else_branch"]
        choice.attributes["then_branch"] = ir.AttrGraph("then_branch", other.as_graph())
        choice.attributes["else_branch"] = ir.AttrGraph("else_branch", then.as_graph())
        return _rotated(site, "short and long are exchanged")
    (greater,) = _nodes(weights, "Greater")
    boundary = ir.node(
        "Constant", [], {"value": ir.tensor(np.array(256, np.int64))}, name="planted"
    )
    boundary.outputs[0].name = "planted/output"
    weights.model.graph.insert_before(greater, boundary)
    greater.replace_input_with(1, boundary.outputs[0])
    return _rotated(site, "the switch is at 256 tokens")


GRAPH_FAULTS: Mapping[str, GraphFault] = {
    "wrong epsilon": epsilon,
    "attention scale": attention_scale,
    "window missing": missing_window,
    "window of another size": other_window,
    "rotary: interleaved": interleaved_pairs,
    "rotary: none": no_rotation,
    "rotary: theta": rotary("theta", _theta),
    "rotary: one factor": rotary("one frequency", _one_factor),
    "rotary: positions scaled": rotary("all frequencies", lambda found, factor: found * factor),
    "rotary: partial factor": partial_as_whole,
    "rotary: cache scaled": cache_scale,
    "rotary: cache shifted": cache_shifted,
    "rotary: short and long": short_and_long_exchanged,
    "key/value heads mapped wrongly": key_value_heads,
    "number of key/value heads": fewer_key_value_heads,
    "mask off by one": mask_off_by_one,
    "residual missing": missing_residual,
    "GELU for SiLU": gelu,
    "gate and up connected wrongly": gate_is_up,
    "head reads another norm": head_reads_another_norm,
}
