"""Which rows of which checkpoint tensor each weight of a decoder graph should hold.

The place in the graph decides, because it is what the model computes; a name may lie.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from phiconv.diagnosis.decoder_graph import DecoderGraph, Norm
from phiconv.diagnosis.stored_weight import embedding_weight, linear_weight, norm_weight
from phiconv.diagnosis.weight_part import (
    EMBEDDING,
    FINAL_NORM,
    WeightPart,
    linear_parts,
    whole_part,
)

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint


def map_weights(graph: DecoderGraph, checkpoint: Checkpoint) -> list[WeightPart]:
    """Maps every weight that the graph's structure identifies, in the order of computation.

    Nothing is read: a part's rows may fall outside its weight when the two do not fit.
    """
    parts = []
    if graph.embedding is not None:
        load = partial(embedding_weight, graph.embedding)
        parts.append(whole_part("embed_tokens", None, load, EMBEDDING, checkpoint))
    seen: set[Norm] = set()
    for name, layer, norm in graph.norms:
        tensor = FINAL_NORM if layer is None else f"model.layers.{layer}.{name}.weight"
        if norm not in seen and tensor in checkpoint.tensors:
            seen.add(norm)
            load = partial(norm_weight, norm.weight)
            parts.append(whole_part(name, layer, load, tensor, checkpoint))
    for decoder_layer in graph.layers[: checkpoint.config.num_hidden_layers]:
        for linear in decoder_layer.linears:
            load = partial(linear_weight, linear.node)
            parts += linear_parts(linear.role, decoder_layer.index, load, checkpoint.config)
    if graph.head is not None:
        load = partial(linear_weight, graph.head.node)
        parts.append(whole_part("lm_head", None, load, checkpoint.lm_head, checkpoint))
    return parts
