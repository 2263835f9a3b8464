"""Self-attention: how long each text is, the projections, and the operator itself.

ONNX Runtime GenAI feeds `attention_mask` (and `position_ids` where the graph asks for it) and
holds one buffer for each key and value cache, to which `GroupQueryAttention` appends. Operators:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from phiconv.onnx.graph_writer import BATCH, CONTRIB, GraphWriter
from phiconv.onnx.rotary import Rotary
from phiconv.onnx.target import ExportTarget
from phiconv.onnx.weights import Rows

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint import ModelConfig

_MASK = "/model/attn_mask_reformat/attn_mask_subgraph"


class KeyValueCache(NamedTuple):
    """A layer's keys or values `[batch, kv heads, tokens, head size]`: graph inputs and outputs."""

    past_key: ir.Value
    past_value: ir.Value
    present_key: ir.Value
    present_value: ir.Value


class Lengths:
    """What GroupQueryAttention wants to know of the mask `[batch, total sequence]`."""

    def __init__(self, writer: GraphWriter, mask: ir.Value):
        self._writer = writer
        self._mask = mask

    @cached_property
    def longest(self) -> ir.Value:
        """The mask's width: tokens in the cache and new ones, int64."""
        import onnx_ir as ir

        shape = self._writer.apply(
            "Shape", f"{_MASK}/Shape", self._mask, dtype=ir.DataType.INT64, shape=(2,)
        )
        return self._writer.apply(
            "Gather",
            f"{_MASK}/Gather",
            shape,
            self._writer.constant(1),
            dtype=ir.DataType.INT64,
            shape=(),
            axis=0,
        )

    def prepare(self) -> None:
        """Writes the nodes of `operands`."""
        _ = self.operands

    @cached_property
    def operands(self) -> tuple[ir.Value, ir.Value]:
        """`seqlens_k`, the index of each text's last token, and `total_sequence_length`; int32."""
        import onnx_ir as ir

        writer, one = self._writer, self._writer.constant([1])
        int64, int32 = ir.DataType.INT64, ir.DataType.INT32
        count = writer.apply(
            "ReduceSum",
            f"{_MASK}/ReduceSum",
            self._mask,
            one,
            dtype=int64,
            shape=(BATCH,),
            keepdims=0,
        )
        last = writer.apply("Sub", f"{_MASK}/Sub", count, one, dtype=int64, shape=(BATCH,))
        last = writer.apply(
            "Cast", f"{_MASK}/Sub/Cast", last, dtype=int32, shape=(BATCH,), to=int32
        )
        total = writer.apply(
            "Cast", f"{_MASK}/Gather/Cast", self.longest, dtype=int32, shape=None, to=int32
        )
        return last, total


@dataclass(frozen=True)
class Attention:
    """The attention of every layer.

    Attributes:
        writer: Where nodes go.
        config: The architecture.
        target: What the provider's kernels take.
        lengths: Of the texts in the batch.
        rotary: Cosines and sines.
    """

    writer: GraphWriter
    config: ModelConfig
    target: ExportTarget
    lengths: Lengths
    rotary: Rotary

    def layer(self, index: int, hidden: ir.Value, cache: KeyValueCache) -> ir.Value:
        """Writes the attention of one layer, from its normalised input to o_proj's output."""
        writer, config = self.writer, self.config
        name = f"/model/layers.{index}/attn"
        fused = self.target.fuses_rotary(config)
        q, k, v = self._packed(index, hidden) if fused else self._rotated(index, hidden)
        width = config.num_attention_heads * config.head_dim
        mixed = writer.value(
            f"{name}/GroupQueryAttention/output_0", writer.dtype, writer.hidden(width)
        )
        writer.node(
            "GroupQueryAttention",
            f"{name}/GroupQueryAttention",
            [
                *(q, k, v),
                *(cache.past_key, cache.past_value),
                *self.lengths.operands,
                *(self.rotary.caches if fused else (None, None)),
                # position_ids, attention_bias and head_sink
                *(None, None, None),
            ],
            [mixed, cache.present_key, cache.present_value],
            domain=CONTRIB,
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            scale=1 / math.sqrt(config.head_dim),
            local_window_size=self.target.window(config),
            softcap=0.0,
            do_rotary=int(fused),
            rotary_interleaved=0,
        )
        tensor = f"model.layers.{index}.self_attn.o_proj.weight"
        rows = (Rows(tensor, 0, config.hidden_size),)
        return writer.linear(f"{name}/o_proj", mixed, rows, width)

    def _packed(
        self, index: int, hidden: ir.Value
    ) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Queries, keys and values as one input, as the checkpoint stores their weight."""
        packed = self._project(index, "qkv", hidden, 0, sum(self._widths))
        return packed, None, None

    def _rotated(self, index: int, hidden: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Each by itself; queries and keys rotated by an operator of their own."""
        q, k, v = self._widths
        query = self._project(index, "q", hidden, 0, q)
        key = self._project(index, "k", hidden, q, q + k)
        value = self._project(index, "v", hidden, q + k, q + k + v)
        return self._rotate(index, "q", query), self._rotate(index, "k", key), value

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Rows of q, k and v in qkv_proj."""
        key = self.config.num_key_value_heads * self.config.head_dim
        return self.config.num_attention_heads * self.config.head_dim, key, key

    def _project(self, index: int, part: str, hidden: ir.Value, start: int, stop: int) -> ir.Value:
        rows = (Rows(f"model.layers.{index}.self_attn.qkv_proj.weight", start, stop),)
        name = f"/model/layers.{index}/attn/{part}_proj"
        return self.writer.linear(name, hidden, rows, self.config.hidden_size)

    def _rotate(self, index: int, part: str, projected: ir.Value) -> ir.Value:
        config = self.config
        heads = config.num_attention_heads if part == "q" else config.num_key_value_heads
        whole = config.partial_rotary_factor == 1.0
        positions = self.rotary.positions
        assert positions is not None
        return self.writer.apply(
            "RotaryEmbedding",
            f"/model/layers.{index}/attn/{part}_rotary/RotaryEmbedding",
            projected,
            positions,
            *self.rotary.caches,
            shape=self.writer.hidden(heads * config.head_dim),
            domain=CONTRIB,
            interleaved=0,
            # 0 where the kernel sees both by the shape of the caches
            num_heads=0 if whole else heads,
            rotary_embedding_dim=0 if whole else config.rotary_dim,
        )
