"""Graph construction by the ONNX Runtime GenAI model builder, without its weights.

The only module that touches `onnxruntime_genai.models`. The builder is given a model made of
`LazyWeight` objects, which have a shape and remember which rows of which checkpoint tensor they
are, so it lays out the graph without reading a byte of weight data. The contract it relies on is
tested in tests/onnx/test_builder_contract.py; a builder that calls an operation on a weight that
is not traced here is an error, never a silently wrong graph.

The builder finds the language-model head by its width. Here the head is handed over as the head,
so a checkpoint whose gate_up_proj is as wide as its vocabulary comes out right.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, ExportError
from phiconv.onnx.graph import OnnxGraph, placeholder
from phiconv.onnx.weights import Dense, Expression, Rows, merged, row_count

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint, ModelConfig

Provider = Literal["cpu", "cuda", "dml"]
Precision = Literal["fp32", "fp16"]

# GroupQueryAttention's fused rotary embedding works on 8 pairs at a time.
FUSED_ROTARY_PAIRS = 8
# The series whose graph construction the contract test covers.
BUILDER_SERIES = "0.18."
# Where GroupQueryAttention's local_window_size is known to be honoured.
WINDOW_PROVIDERS = ("cpu", "cuda")


@dataclass(frozen=True)
class LazyWeight:
    """Rows of a checkpoint tensor, standing in for a torch tensor in the builder.

    Attributes:
        shape: Shape as the builder sees it, after `transposed`.
        rows: Checkpoint rows, concatenated along the first axis.
        transposed: Whether the builder sees the transpose of the stored weight.
    """

    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    transposed: bool = False
    dtype: str = field(default="lazy", compare=False)

    @property
    def T(self) -> LazyWeight:  # noqa: N802 - torch's name
        """The transpose."""
        return LazyWeight(self.shape[::-1], self.rows, not self.transposed)

    def __add__(self, offset: float) -> LazyWeight:
        if offset != 0:
            raise ExportError(f"the model builder adds {offset} to {self.rows[0].tensor}")
        return self

    def reshape(self, *shape: int) -> LazyWeight:
        """The same weight; any other shape is refused."""
        if tuple(shape) != self.shape:
            raise ExportError(f"the model builder reshapes {self.rows[0].tensor} to {shape}")
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> LazyWeight:
        """Trace `torch.cat` along the first axis; refuse every other torch function."""
        import torch

        if function is not torch.cat or (kwargs or {}).get("dim", 0) != 0:
            raise ExportError(f"the model builder applies {function.__name__} to a weight")
        parts: list[LazyWeight] = list(args[0])
        if any(part.transposed for part in parts):
            raise ExportError("the model builder concatenates transposed weights")
        rows = merged(row for part in parts for row in part.rows)
        return cls((row_count(rows), *parts[0].shape[1:]), rows)


class _Module:
    """A module, equal to itself alone: the builder recognises some by comparing them."""

    def __init__(self, **children: object):
        self.__dict__.update(children)


class _Phi3DecoderLayer(_Module):
    """A decoder layer; the builder recognises it by the end of its class name."""


class _Phi3Weights:
    """The module tree that the builder walks, in its own order."""

    def __init__(self, checkpoint: Checkpoint):
        config = checkpoint.config

        def weight(name: str, start: int = 0, stop: int | None = None) -> _Module:
            shape = checkpoint.tensors[name].shape
            stop = shape[0] if stop is None else stop
            rows = (Rows(name, start, stop),)
            return _Module(weight=LazyWeight((stop - start, *shape[1:]), rows), bias=None)

        self.embedding = weight("model.embed_tokens.weight")
        self.final_norm = weight("model.norm.weight")
        self.lm_head = weight(checkpoint.lm_head)
        self._layers = [
            self._layer(config, weight, f"model.layers.{index}")
            for index in range(config.num_hidden_layers)
        ]

    @staticmethod
    def _layer(config: ModelConfig, weight: Any, prefix: str) -> _Phi3DecoderLayer:
        q = config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        qkv = f"{prefix}.self_attn.qkv_proj.weight"
        gate_up = f"{prefix}.mlp.gate_up_proj.weight"
        return _Phi3DecoderLayer(
            input_layernorm=weight(f"{prefix}.input_layernorm.weight"),
            post_attention_layernorm=weight(f"{prefix}.post_attention_layernorm.weight"),
            self_attn=_Module(
                q_proj=weight(qkv, 0, q),
                k_proj=weight(qkv, q, q + kv),
                v_proj=weight(qkv, q + kv, q + 2 * kv),
                o_proj=weight(f"{prefix}.self_attn.o_proj.weight"),
            ),
            mlp=_Module(
                gate_proj=weight(gate_up, 0, config.intermediate_size),
                up_proj=weight(gate_up, config.intermediate_size, 2 * config.intermediate_size),
                down_proj=weight(f"{prefix}.mlp.down_proj.weight"),
            ),
        )

    def modules(self) -> Iterator[object]:
        yield self.embedding
        yield from self._layers
        yield self.final_norm
        yield self.lm_head


def build_graph(
    checkpoint: Checkpoint, *, provider: Provider, precision: Precision, genai: Path
) -> OnnxGraph:
    """Lay out the ONNX graph of a Phi-3 checkpoint for one execution provider.

    Args:
        checkpoint: An opened checkpoint; only its configuration and tensor shapes are used.
        provider: ``cpu``, ``cuda`` or ``dml``; decides how attention and rotary embedding are
            expressed, as the model builder does it.
        precision: Type of graph inputs, outputs and activations.
        genai: Folder to create, for genai_config.json and the tokenizer files.

    Raises:
        ExportError: The builder does not support the configuration, or used a weight in a way
            that is not traced.
    """
    genai.mkdir(parents=True)
    with _captured_output() as output:
        try:
            builder = _make_builder(checkpoint, provider, precision)
            builder.make_model(str(checkpoint.path))
            builder.make_genai_config(builder.hf_config, {}, str(genai))
            builder.save_processing(str(checkpoint.path), {}, str(genai))
        except (NotImplementedError, KeyError, ValueError, AttributeError, TypeError) as error:
            raise ExportError(
                f"the GenAI model builder failed: {type(error).__name__}: {error}",
                where=f"{checkpoint.path}, provider {provider}, precision {precision}",
                remedy="compare config.json with a published Phi-3 checkpoint; the builder said: "
                + (output.getvalue().strip().splitlines() or ["nothing"])[-1],
            ) from error
    builder.model.graph.sort()
    builder.model.producer_name = "phiconv"
    builder.model.producer_version = None
    _check_complete(builder.model, builder.lazy)
    return OnnxGraph(builder.model, builder.lazy, genai)


def _make_builder(checkpoint: Checkpoint, provider: Provider, precision: Precision) -> Any:
    """Instantiate the builder's Phi-3 class with lazy weights and recorded initializers."""
    import onnx_ir as ir

    builder_module = import_builder()
    config = checkpoint.config
    window = config.sliding_window
    windowed = (
        provider in WINDOW_PROVIDERS
        and window is not None
        and window < config.max_position_embeddings
    )
    name = "Phi3MiniModel" if config.rope is None else "Phi3MiniLongRoPEModel"
    base: Any = getattr(builder_module, name)

    class LazyBuilder(base):  # type: ignore[misc]
        lazy: dict[str, Expression]

        def load_weights(self, input_path: str) -> _Phi3Weights:
            return _Phi3Weights(checkpoint)

        def is_local(self, layer_id: int) -> bool:
            # The builder leaves Phi-3's sliding window out, and its logits leave Hugging Face's
            # where the window begins to matter.
            return windowed

        def is_fused_rope_supported(self) -> bool:
            fits = config.rotary_dim // 2 % FUSED_ROTARY_PAIRS == 0
            return bool(fits and super().is_fused_rope_supported())

        def is_packed_matmul_supported(self) -> bool:
            # A separate RotaryEmbedding takes unpacked q and k.
            return bool(self.is_fused_rope_supported() and super().is_packed_matmul_supported())

        def make_initializer(
            self, tensor: Any, /, name: str, *, to: Any = None, raw: bool = False
        ) -> None:
            if not isinstance(tensor, LazyWeight):
                super().make_initializer(tensor, name, to=to, raw=raw)
                return
            value = self.make_value(name, to, tensor.shape)
            value.const_value = placeholder(name, to, tensor.shape)
            self.model.graph.register_initializer(value)
            self.lazy[name] = Dense(tensor.rows, tensor.transposed)

    dtype = ir.DataType.FLOAT if precision == "fp32" else ir.DataType.FLOAT16
    hf_config = _hugging_face_config(checkpoint)
    LazyBuilder.lazy = {}
    # The attention operator masks by the window; the runtime keeps the whole KV cache.
    options = {"windowed_kv_cache": False}
    builder = LazyBuilder(hf_config, dtype, dtype, provider, str(checkpoint.path), options)
    builder.hf_config = hf_config
    return builder


def import_builder() -> ModuleType:
    """The builder's main module; importing it takes seconds, and torch and transformers with it.

    Raises:
        EnvironmentLacksError: It is not installed, or of a series that the contract does not cover.
    """
    version = machine.version("onnxruntime-genai")
    try:
        # Importing its package puts the builder's own modules on the path.
        import onnxruntime_genai.models  # noqa: F401
    except ImportError as error:
        raise EnvironmentLacksError(
            f"onnxruntime-genai cannot be imported: {error}",
            remedy="install phiconv with one of its extras: pip install 'phiconv[cpu]'",
        ) from error
    if version is None or not version.startswith(BUILDER_SERIES):
        raise EnvironmentLacksError(
            f"exporting needs the model builder of onnxruntime-genai {BUILDER_SERIES}x, "
            f"this is {version}",
            remedy="export with the extra cpu or cuda; the artifact then runs and validates here",
        )
    import builder

    return cast(ModuleType, builder)


def _hugging_face_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration as the builder expects it."""
    from transformers import AutoConfig, AutoTokenizer

    path = str(checkpoint.path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if checkpoint.config.quantization is not None:
        # The builder would look for packed weights itself; it is given places for floats.
        del config.quantization_config
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope:
        # transformers 5 writes only `rope_type`; the builder reads `type` as well.
        rope.setdefault("type", rope["rope_type"])
    if isinstance(rope, dict) and checkpoint.config.rope is not None:
        # The builder would derive the scale from the context lengths; transformers also honours
        # `factor` and `attention_factor`, and no other key.
        scale = checkpoint.config.rope.attention_factor
        rope |= {"short_mscale": scale, "long_mscale": scale}
    import_builder().add_special_token_ids(
        config, AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    )
    return config


@contextlib.contextmanager
def _captured_output() -> Iterator[io.StringIO]:
    """Keep what the builder prints, for error messages, off the terminal."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield output


def _check_complete(model: Any, lazy: dict[str, Expression]) -> None:
    """Every graph input of every node is produced, and every lazy initializer is used."""
    for name in lazy:
        if not model.graph.initializers[name].uses():
            raise ExportError(f"the model builder made {name} but no node uses it")
    for node in model.graph:
        for value in node.inputs:
            if value is None or not value.name or value.producer() is not None:
                continue  # an empty name stands for an optional input that is left out
            if not (value.is_graph_input() or value.is_initializer()):
                raise ExportError(f"the model builder left input {value.name} unconnected")
