"""Starts a model of another shape from a trained one's weights.

Heads are pooled as in "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
Checkpoints" (Ainslie et al., 2023): the key and value heads that become one are averaged. A tied
embedding starts as the head, the rest is copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM


def start_from(model: Phi3ForCausalLM, checkpoint: Path) -> None:
    """Copies the weights of ``checkpoint`` into ``model``, in place.

    Args:
        model: an untrained model of the same widths and depth, with as many key/value heads or a
            divisor of their number.
        checkpoint: folder of a Hugging Face checkpoint.
    """
    import torch
    from transformers import Phi3ForCausalLM

    donor = Phi3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    weights = donor.state_dict()
    if model.config.tie_word_embeddings:
        weights["model.embed_tokens.weight"] = weights["lm_head.weight"]
    for name, weight in weights.items():
        if name.endswith("qkv_proj.weight"):
            weights[name] = pooled(weight, donor.config, model.config)
    model.load_state_dict(weights)


def pooled(weight: torch.Tensor, donor: Phi3Config, config: Phi3Config) -> torch.Tensor:
    """A fused projection, [queries + 2 x donor's key/value rows, in], with fewer of the latter."""
    import torch

    head = config.hidden_size // config.num_attention_heads
    keys = donor.num_key_value_heads * head
    query, key, value = weight.split([weight.shape[0] - 2 * keys, keys, keys])
    groups = (config.num_key_value_heads, -1, head, weight.shape[1])
    key, value = (rows.reshape(groups).mean(1).flatten(0, 1) for rows in (key, value))
    return torch.cat([query, key, value])
