"""A part of a stored weight and the rows of the checkpoint that it should equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phiconv.diagnosis.results import place

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint, ModelConfig
    from phiconv.diagnosis.weight_format import StoredWeight

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


def whole_part(
    component: str,
    layer: int | None,
    load: Callable[[], StoredWeight],
    tensor: str,
    checkpoint: Checkpoint,
) -> WeightPart:
    """A weight that holds a whole tensor of the checkpoint."""
    return WeightPart(component, layer, load, 0, checkpoint.tensors[tensor].shape[0], tensor)


def linear_parts(
    role: str, layer: int | None, load: Callable[[], StoredWeight], config: ModelConfig
) -> list[WeightPart]:
    """The parts of a layer's projection: the checkpoint packs q, k, v and gate, up.

    Args:
        role: `qkv_proj`, `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_up_proj`, `gate_proj`,
            `up_proj` or `down_proj`.
        layer: Index of its layer.
        load: Reads the projection's weight.
        config: The checkpoint's configuration.
    """
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    width = config.intermediate_size
    prefix = f"model.layers.{layer}"
    if role in ("o_proj", "down_proj"):
        component = "self_attn.o_proj" if role == "o_proj" else "mlp.down_proj"
        tensor = f"{prefix}.{component}.weight"
        return [WeightPart(component, layer, load, 0, config.hidden_size, tensor)]
    attention = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
    mlp = [("gate_proj", width), ("up_proj", width)]
    packed = role in ("qkv_proj", "gate_up_proj")
    in_attention = role in ("qkv_proj", "q_proj", "k_proj", "v_proj")
    rows, module, tensor = (
        (attention, "self_attn", f"{prefix}.self_attn.qkv_proj.weight")
        if in_attention
        else (mlp, "mlp", f"{prefix}.mlp.gate_up_proj.weight")
    )
    parts, first = [], 0
    for name, length in rows:
        if packed or name == role:
            start = first if packed else 0
            component, stop = f"{module}.{name}", start + length
            parts.append(WeightPart(component, layer, load, start, stop, tensor, first))
        first += length
    return parts
