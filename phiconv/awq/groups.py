"""Which scales of a Phi-3 layer can be folded into what comes before, as one table.

Scaling the input columns of a weight by s leaves the model as it was when what gives those inputs
is divided by s. Norms and the linear halves of a layer allow that: the value rows of qkv_proj pass
through attention as they are (rotary embeddings touch queries and keys only), the up half of
gate_up_proj is multiplied by the gate after the activation function. With grouped-query attention
several query heads read one value head, so their scales are tied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from phiconv.checkpoint import ModelConfig


def _every_feature(config: ModelConfig) -> slice:
    return slice(0, config.hidden_size)


def _value_rows(config: ModelConfig) -> slice:
    first = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return slice(first, first + config.num_key_value_heads * config.head_dim)


def _up_rows(config: ModelConfig) -> slice:
    return slice(config.intermediate_size, 2 * config.intermediate_size)


@dataclass(frozen=True)
class FoldingGroup:
    """A weight whose input columns can be scaled, and where the inverse goes.

    Attributes:
        name: What losses are reported under.
        linear: The scaled weight, within its layer.
        source: The tensor that gives its inputs, within the layer.
        source_rows: The rows of `source` that do.
        over_heads: The inputs are query heads of values: those that share a value head are tied.
    """

    name: str
    linear: str
    source: str
    source_rows: Callable[[ModelConfig], slice]
    over_heads: bool = False

    def weight(self, layer: int) -> str:
        """The checkpoint's name of the scaled weight."""
        return f"model.layers.{layer}.{self.linear}.weight"

    def source_weight(self, layer: int) -> str:
        """The checkpoint's name of the tensor that is divided."""
        return f"model.layers.{layer}.{self.source}.weight"

    def tie(self, magnitudes: NDArray[np.float64], config: ModelConfig) -> NDArray[np.float64]:
        """Means over the inputs that share a scale: [K] in, [K] out."""
        if not self.over_heads:
            return magnitudes
        shape = (config.num_key_value_heads, -1, config.head_dim)
        heads = magnitudes.reshape(shape)
        return np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape).reshape(-1)

    def rows(self, columns: NDArray[np.float32], config: ModelConfig) -> NDArray[np.float32]:
        """The inverse factors of `source_rows`, float32, for tied factors of the columns [K]."""
        if self.over_heads:
            shape = (config.num_key_value_heads, -1, config.head_dim)
            columns = columns.reshape(shape)[:, 0].reshape(-1)
        return np.float32(1) / columns


GROUPS = (
    FoldingGroup("qkv", "self_attn.qkv_proj", "input_layernorm", _every_feature),
    FoldingGroup("o_proj", "self_attn.o_proj", "self_attn.qkv_proj", _value_rows, over_heads=True),
    FoldingGroup("gate_up", "mlp.gate_up_proj", "post_attention_layernorm", _every_feature),
    FoldingGroup("down_proj", "mlp.down_proj", "mlp.gate_up_proj", _up_rows),
)
"""The groups of every Phi-3 layer, in the order of the computation."""


def query_key_rows(config: ModelConfig) -> int:
    """How many rows of qkv_proj, from the first on, make queries and keys."""
    return (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
