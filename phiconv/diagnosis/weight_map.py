"""Which rows of which checkpoint tensor each weight of a decoder graph should hold.

The place in the graph decides, because it is what the model computes; a name may lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from phiconv.diagnosis.decoder_graph import DecoderGraph, Linear, Norm
from phiconv.diagnosis.results import place
from phiconv.diagnosis.stored_weight import (
    StoredWeight,
    embedding_weight,
    linear_weight,
    norm_weight,
)

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint, ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True, eq=False)
class WeightPart:
    """A part of a stored weight and what it should equal.

    Attributes:
        component: Such as `self_attn.q_proj`, `mlp.down_proj`, `input_layernorm`, `lm_head`.
        layer: Index of its layer, or None.
        load: Reads the weight; raises StageError when it is stored in a way not known here.
        start: The first of its rows in the stored weight.
        stop: One past the last of them.
        tensor: The checkpoint tensor.
        tensor_start: The first of its rows in that tensor.
    """

    component: str
    layer: int | None
    load: Callable[[], StoredWeight]
    start: int
    stop: int
    tensor: str
    tensor_start: int = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def place(self) -> str:
        """Component with its layer: `layer 3, mlp.down_proj`."""
        return place(self.layer, self.component)


def map_weights(graph: DecoderGraph, checkpoint: Checkpoint) -> list[WeightPart]:
    """Maps every weight that the graph's structure identifies, in the order of computation.

    Nothing is read: a part's rows may fall outside its weight when the two do not fit.
    """
    parts = []
    if graph.embedding is not None:
        load = partial(embedding_weight, graph.embedding)
        parts.append(_whole("embed_tokens", None, load, EMBEDDING, checkpoint))
    seen: set[Norm] = set()
    for name, layer, norm in graph.norms:
        tensor = FINAL_NORM if layer is None else f"model.layers.{layer}.{name}.weight"
        if norm not in seen and tensor in checkpoint.tensors:
            seen.add(norm)
            load = partial(norm_weight, norm.weight)
            parts.append(_whole(name, layer, load, tensor, checkpoint))
    for decoder_layer in graph.layers[: checkpoint.config.num_hidden_layers]:
        for linear in decoder_layer.linears:
            parts += _linear_parts(linear, checkpoint.config)
    if graph.head is not None:
        load = partial(linear_weight, graph.head.node)
        parts.append(_whole("lm_head", None, load, checkpoint.lm_head, checkpoint))
    return parts


def _whole(
    component: str,
    layer: int | None,
    load: Callable[[], StoredWeight],
    tensor: str,
    checkpoint: Checkpoint,
) -> WeightPart:
    return WeightPart(component, layer, load, 0, checkpoint.tensors[tensor].shape[0], tensor)


def _linear_parts(linear: Linear, config: ModelConfig) -> list[WeightPart]:
    """The parts of a layer's projection: the checkpoint packs q, k, v and gate, up."""
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    width = config.intermediate_size
    layer, load = linear.layer, partial(linear_weight, linear.node)
    prefix = f"model.layers.{layer}"
    if linear.role in ("o_proj", "down_proj"):
        component = "self_attn.o_proj" if linear.role == "o_proj" else "mlp.down_proj"
        tensor = f"{prefix}.{component}.weight"
        return [WeightPart(component, layer, load, 0, config.hidden_size, tensor)]
    attention = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
    mlp = [("gate_proj", width), ("up_proj", width)]
    packed = linear.role in ("qkv_proj", "gate_up_proj")
    in_attention = linear.role in ("qkv_proj", "q_proj", "k_proj", "v_proj")
    rows, module, tensor = (
        (attention, "self_attn", f"{prefix}.self_attn.qkv_proj.weight")
        if in_attention
        else (mlp, "mlp", f"{prefix}.mlp.gate_up_proj.weight")
    )
    parts, first = [], 0
    for name, length in rows:
        if packed or name == linear.role:
            start = first if packed else 0
            component, stop = f"{module}.{name}", start + length
            parts.append(WeightPart(component, layer, load, start, stop, tensor, first))
        first += length
    return parts
