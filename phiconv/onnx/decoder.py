"""The graph of a Phi-3 decoder, laid out for one execution provider, without its weights.

Operators, names and order are those of ONNX Runtime GenAI's model builder, which the runtime's
fusions, GenAI and other tools know; tests/onnx/test_builder_contract.py compares with the builder
itself. docs/adr/0006-own-graph.md says where and why the graph is otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phiconv.checkpoint.config import EMBEDDING
from phiconv.onnx.attention import Attention, KeyValueCache, Lengths
from phiconv.onnx.graph_writer import BATCH, CONTRIB, SEQUENCE, TOTAL_SEQUENCE, GraphWriter
from phiconv.onnx.rotary import Rotary
from phiconv.onnx.target import ExportTarget
from phiconv.onnx.weights import Rows

if TYPE_CHECKING:
    import onnx_ir as ir

    from phiconv.checkpoint import ModelConfig

INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
LOGITS = "logits"
PAST = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
PRESENT = {"key": "present.%d.key", "value": "present.%d.value"}


class Decoder:
    """Inputs and outputs of the model, and the nodes between them.

    Args:
        writer: Where nodes go; empty.
        config: The architecture.
        lm_head: The checkpoint's tensor that is the head's weight.
        target: What the provider's kernels take.
    """

    def __init__(
        self, writer: GraphWriter, config: ModelConfig, lm_head: str, target: ExportTarget
    ):
        import onnx_ir as ir

        self._writer = writer
        self._config = config
        self._lm_head = lm_head
        int64 = ir.DataType.INT64
        self._ids = writer.input(INPUT_IDS, int64, (BATCH, SEQUENCE))
        mask = writer.input(ATTENTION_MASK, int64, (BATCH, TOTAL_SEQUENCE))
        positions = None
        if not target.fuses_rotary(config):
            positions = writer.input(POSITION_IDS, int64, (BATCH, SEQUENCE))
        past = self._past()
        self._logits = writer.output(LOGITS, writer.dtype, writer.hidden(config.vocab_size))
        present = self._present()
        self._caches = [KeyValueCache(*both) for both in zip(*past, *present, strict=True)]
        self._lengths = Lengths(writer, mask)
        self._rotary = Rotary(writer, config, target, positions)
        self._attention = Attention(writer, config, target, self._lengths, self._rotary)

    def write(self) -> None:
        """Writes all nodes in the order in which they run."""
        config = self._config
        # What depends on the mask and the positions alone comes first, and once for all layers.
        self._rotary.prepare(self._lengths)
        self._lengths.prepare()
        residual = self._embedding()
        added: ir.Value | None = None
        for index in range(config.num_hidden_layers):
            name, tensor = f"/model/layers.{index}", f"model.layers.{index}"
            normalised, residual = self._norm(
                f"{name}/input_layernorm", f"{tensor}.input_layernorm.weight", residual, added
            )
            added = self._attention.layer(index, normalised, self._caches[index])
            normalised, residual = self._norm(
                f"{name}/post_attention_layernorm",
                f"{tensor}.post_attention_layernorm.weight",
                residual,
                added,
            )
            added = self._mlp(index, normalised)
        # Named as if it were one more layer's, which is how GenAI's tools find it.
        name = f"/model/layers.{config.num_hidden_layers}/final_norm_layernorm"
        normalised, _ = self._norm(name, "model.norm.weight", residual, added, last=True)
        rows = (Rows(self._lm_head, 0, config.vocab_size),)
        self._writer.linear("/lm_head", normalised, rows, config.hidden_size, output=self._logits)

    def _past(self) -> list[list[ir.Value]]:
        """Declares the caches as they are given; the last extent is the head size."""
        shape = (BATCH, self._config.num_key_value_heads, "past_sequence_length", "kv_cache_dim")
        layers = range(self._config.num_hidden_layers)
        return [
            [self._writer.input(name % index, self._writer.dtype, shape) for index in layers]
            for name in PAST.values()
        ]

    def _present(self) -> list[list[ir.Value]]:
        """Declares the caches as they are left."""
        shape = (BATCH, self._config.num_key_value_heads, TOTAL_SEQUENCE, "kv_cache_dim")
        layers = range(self._config.num_hidden_layers)
        return [
            [self._writer.output(name % index, self._writer.dtype, shape) for index in layers]
            for name in PRESENT.values()
        ]

    def _embedding(self) -> ir.Value:
        config, writer = self._config, self._writer
        rows = (Rows(EMBEDDING, 0, config.vocab_size),)
        weight = writer.weight(EMBEDDING, rows, config.hidden_size, transposed=False)
        shape = writer.hidden(config.hidden_size)
        return writer.apply("Gather", "/model/embed_tokens/Gather", weight, self._ids, shape=shape)

    def _norm(
        self,
        name: str,
        tensor: str,
        residual: ir.Value,
        added: ir.Value | None,
        *,
        last: bool = False,
    ) -> tuple[ir.Value, ir.Value]:
        """RMS norm of the residual stream, after what was computed from it is added.

        One operator does both but for the first, where nothing has been computed yet.

        Returns:
            The normalised stream, and the stream itself.
        """
        config, writer = self._config, self._writer
        shape = writer.hidden(config.hidden_size)
        weight = writer.weight(
            f"{name[1:].replace('/', '.')}.weight",
            (Rows(tensor, 0, config.hidden_size),),
            transposed=False,
        )
        normalised = writer.value(f"{name}/output_0", writer.dtype, shape)
        if added is None:
            writer.node(
                "SimplifiedLayerNormalization",
                f"{name}/LayerNorm",
                [residual, weight],
                [normalised],
                epsilon=config.rms_norm_eps,
                axis=-1,
                stash_type=1,
            )
            return normalised, residual
        stream = writer.value(f"{name}/output_3", writer.dtype, shape)
        writer.node(
            "SkipSimplifiedLayerNormalization",
            f"{name}/SkipLayerNorm",
            [residual, added, weight],
            # mean and inverse deviation are of training alone
            [normalised] if last else [normalised, None, None, stream],
            domain=CONTRIB,
            epsilon=config.rms_norm_eps,
        )
        return normalised, stream

    def _mlp(self, index: int, hidden: ir.Value) -> ir.Value:
        """`down(silu(gate(x)) * up(x))`; gate and up are the halves of gate_up_proj."""
        config, writer = self._config, self._writer
        name, tensor = f"/model/layers.{index}/mlp", f"model.layers.{index}.mlp"
        width, middle = config.hidden_size, config.intermediate_size
        gate_up = f"{tensor}.gate_up_proj.weight"
        gate = writer.linear(f"{name}/gate_proj", hidden, (Rows(gate_up, 0, middle),), width)
        rows = (Rows(gate_up, middle, 2 * middle),)
        up = writer.linear(f"{name}/up_proj", hidden, rows, width)
        shape = writer.hidden(middle)
        # SiLU is no operator of its own here: ONNX Runtime fuses these two.
        sigmoid = writer.apply("Sigmoid", f"{name}/act_fn/Sigmoid", gate, shape=shape)
        activated = writer.apply("Mul", f"{name}/act_fn/Mul", gate, sigmoid, shape=shape)
        product = writer.apply("Mul", f"{name}/Mul", activated, up, shape=shape)
        rows = (Rows(f"{tensor}.down_proj.weight", 0, width),)
        return writer.linear(f"{name}/down_proj", product, rows, middle)
