"""Rotary position embedding in the graph: which cosines and sines a token is rotated by."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from phiconv.onnx import rotary_cache
from phiconv.onnx.graph_writer import BATCH, SEQUENCE, GraphWriter
from phiconv.onnx.rotary_cache import RotaryCache
from phiconv.onnx.target import ExportTarget

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint import ModelConfig
    from phiconv.onnx.attention import Lengths

_POSITIONS = "/model/pos_ids_reformat"
_CACHES = "/model/rope_caches_subgraph"


class Rotary:
    """The cosines and sines that attention takes, and the row of them that each token takes.

    Where LongRoPE has two caches, one of them is chosen for the whole text: by `If`, or, where
    the provider has none, by adding the length of the first to the positions, so that they lie in
    the second, which stands behind it.

    Attributes:
        positions: The row of the caches of each token; None where attention counts them itself.
    """

    def __init__(
        self,
        writer: GraphWriter,
        config: ModelConfig,
        target: ExportTarget,
        positions: ir.Value | None,
    ):
        self._writer = writer
        self._config = config
        self._has_if = target.has_if
        self._dtype = target.dtype.numpy()
        self.positions = positions

    def prepare(self, lengths: Lengths) -> None:
        """Writes the choice between LongRoPE's caches."""
        if self._config.rope is None:
            return
        if self._has_if:
            self.caches = self._chosen_caches(lengths)
            return
        self.caches = self._stored(self._short.followed_by(self._long))
        if self.positions is not None:
            self.positions = self._positions_in_joined(self.positions)

    @cached_property
    def caches(self) -> tuple[ir.Value, ir.Value]:
        """`cos_cache` and `sin_cache`, `[positions, rotary_dim / 2]`."""
        return self._stored(rotary_cache.plain_cache(self._config, self._dtype))

    @property
    def _short(self) -> RotaryCache:
        return rotary_cache.short_cache(self._config, self._dtype)

    @property
    def _long(self) -> RotaryCache:
        return rotary_cache.long_cache(self._config, self._dtype)

    def _stored(self, cache: RotaryCache) -> tuple[ir.Value, ir.Value]:
        writer = self._writer
        return writer.tensor("cos_cache", cache.cos), writer.tensor("sin_cache", cache.sin)

    def _chosen_caches(self, lengths: Lengths) -> tuple[ir.Value, ir.Value]:
        import onnx_ir as ir

        writer = self._writer
        original = writer.constant(self._config.original_max_position_embeddings)
        is_long = writer.apply(
            "Greater",
            f"{_CACHES}/Greater",
            lengths.longest,
            original,
            dtype=ir.DataType.BOOL,
            shape=(),
        )
        cos, sin = (
            writer.value(name, writer.dtype, ("max_sequence_length", "head_dim / 2"))
            for name in ("cos_cache", "sin_cache")
        )
        writer.node(
            "If",
            f"{_CACHES}/If",
            [is_long],
            [cos, sin],
            then_branch=self._branch("large", self._long),
            else_branch=self._branch("small", self._short),
        )
        return cos, sin

    def _branch(self, name: str, cache: RotaryCache) -> ir.Graph:
        constants = [
            (f"/{name}/{key}_cache/Constant", f"{key}_cache_{name}", array)
            for key, array in (("cos", cache.cos), ("sin", cache.sin))
        ]
        return self._writer.branch(f"{name}_rope_caches_graph", constants)

    def _positions_in_joined(self, positions: ir.Value) -> ir.Value:
        """Positions plus the length of the short cache where the text is longer than it."""
        import onnx_ir as ir

        writer, int64 = self._writer, ir.DataType.INT64
        last = writer.apply(
            "ReduceMax", f"{_POSITIONS}/ReduceMax", positions, dtype=int64, shape=(1,), keepdims=0
        )
        original = writer.constant(self._config.original_max_position_embeddings)
        is_long = writer.apply(
            "GreaterOrEqual",
            f"{_POSITIONS}/GreaterOrEqual",
            last,
            original,
            dtype=ir.DataType.BOOL,
            shape=(),
        )
        offset = writer.apply(
            "Cast", f"{_POSITIONS}/Cast", is_long, dtype=int64, shape=None, to=int64
        )
        offset = writer.apply("Mul", f"{_POSITIONS}/Mul", offset, original, dtype=int64, shape=None)
        return writer.apply(
            "Add", f"{_POSITIONS}/Add_1", offset, positions, dtype=int64, shape=(BATCH, SEQUENCE)
        )
