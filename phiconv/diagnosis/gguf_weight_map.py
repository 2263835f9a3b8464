"""Which rows of which checkpoint tensor each weight of a GGUF file should hold."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from phiconv.checkpoint.config import LM_HEAD
from phiconv.diagnosis.weight_format import Format
from phiconv.diagnosis.weight_part import (
    EMBEDDING,
    FINAL_NORM,
    WeightPart,
    linear_parts,
    whole_part,
)
from phiconv.errors import StageError
from phiconv.gguf.plan import gguf_names
from phiconv.gguf.tensors import GgufTensor, GgufTensors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint

# What shares a scale: 32 weights, in these types a sub-block of 16.
_SMALL_BLOCKS = frozenset({"Q2_K", "Q3_K", "Q6_K"})
_LINEARS = {
    "attn_qkv": "qkv_proj",
    "attn_output": "o_proj",
    "ffn_up": "gate_up_proj",
    "ffn_down": "down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


@dataclass(frozen=True, eq=False)
class GgmlWeight:
    """A tensor of a GGUF file; see `phiconv.diagnosis.weight_format.StoredWeight`.

    Attributes:
        tensor: The tensor.
        weighted: Whether the file's weights were rounded with an importance matrix.
    """

    tensor: GgufTensor
    weighted: bool = False

    @property
    def name(self) -> str:
        """Its name in the file."""
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        """`[N, K]`, or `[N]` for a norm."""
        return self.tensor.shape

    @property
    def format(self) -> Format:
        """Its type, with the weights that share a scale."""
        from gguf import GGML_QUANT_SIZES

        name = self.tensor.type.name
        block, nbytes = GGML_QUANT_SIZES[self.tensor.type]
        if block == 1:
            return Format(8 * nbytes, name.lower())
        size = 16 if name in _SMALL_BLOCKS else 32
        return Format(8 * nbytes / block, name, size, weighted=self.weighted)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `[start, stop)` as float32."""
        return self.tensor.rows(start, stop)


def gguf_weight(tensors: GgufTensors, name: str) -> GgmlWeight:
    """A tensor that can be read.

    Raises:
        StageError: There is none of this name, or of a type that gguf does not read.
    """
    if name not in tensors:
        raise StageError(f"the file has no tensor {name}")
    tensors[name].rows(0, 1)  # its type may be one that gguf does not read
    return GgmlWeight(tensors[name], tensors.weighted)


def map_gguf_weights(tensors: GgufTensors, checkpoint: Checkpoint) -> list[WeightPart]:
    """Maps every weight that llama.cpp's Phi-3 reads, in the order of computation.

    A tensor that the file lacks is mapped, too: reading it fails. Where there is no head, llama.cpp
    takes the embedding, and so does this.
    """
    config = checkpoint.config
    names = gguf_names((EMBEDDING, FINAL_NORM, LM_HEAD), config)
    head = names[LM_HEAD] if names[LM_HEAD] in tensors else names[EMBEDDING]

    def whole(component: str, layer: int | None, name: str, source: str) -> WeightPart:
        return whole_part(component, layer, partial(gguf_weight, tensors, name), source, checkpoint)

    parts = [whole("embed_tokens", None, names[EMBEDDING], EMBEDDING)]
    for layer in range(config.num_hidden_layers):
        for name, component in _NORMS.items():
            source = f"model.layers.{layer}.{component}.weight"
            parts.append(whole(component, layer, f"blk.{layer}.{name}.weight", source))
        for name, role in _LINEARS.items():
            load = partial(gguf_weight, tensors, f"blk.{layer}.{name}.weight")
            parts += linear_parts(role, layer, load, config)
    parts.append(whole("norm", None, names[FINAL_NORM], FINAL_NORM))
    return [*parts, whole("lm_head", None, head, checkpoint.lm_head)]
