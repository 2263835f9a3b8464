"""ONNX Runtime GenAI's model builder laying out the same graph: what phiconv's is compared with.

The builder's own classes, given a model of `LazyWeight` objects, which have a shape and remember
which rows of which checkpoint tensor they are. So its graph comes out without weights, in the same
form as phiconv's. Its four departures (docs/adr/0006-own-graph.md) are overrides here; a builder
that calls an operation on a weight that is not traced fails.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from phiconv.checkpoint import Checkpoint, ModelConfig
from phiconv.onnx.graph import OnnxGraph, placeholder
from phiconv.onnx.target import ExportTarget, Precision, Provider
from phiconv.onnx.weights import Dense, Expression, Rows, merged, row_count


@dataclass(frozen=True)
class LazyWeight:
    """Rows of a checkpoint tensor, standing in for a torch tensor in the builder."""

    shape: tuple[int, ...]
    rows: tuple[Rows, ...]
    transposed: bool = False
    dtype: str = field(default="lazy", compare=False)

    @property
    def T(self) -> LazyWeight:  # noqa: N802 - torch's name
        return LazyWeight(self.shape[::-1], self.rows, not self.transposed)

    def __add__(self, offset: float) -> LazyWeight:
        assert offset == 0
        return self

    def reshape(self, *shape: int) -> LazyWeight:
        assert tuple(shape) == self.shape
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> LazyWeight:
        assert function is torch.cat
        assert (kwargs or {}).get("dim", 0) == 0
        parts: list[LazyWeight] = list(args[0])
        assert not any(part.transposed for part in parts)
        rows = merged(row for part in parts for row in part.rows)
        return cls((row_count(rows), *parts[0].shape[1:]), rows)


class _Module:
    """A module, equal to itself alone: the builder recognises some by comparing them."""

    def __init__(self, **children: object):
        self.__dict__.update(children)


class _Phi3DecoderLayer(_Module):
    """A decoder layer; the builder recognises it by the end of its class name."""


class _Weights:
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


def builder_graph(
    checkpoint: Checkpoint, provider: Provider, precision: Precision, genai: Path
) -> OnnxGraph:
    """The builder's graph, with the four departures; its side files go into the new folder."""
    genai.mkdir(parents=True)
    with silenced():
        builder = _make_builder(checkpoint, ExportTarget(provider, precision))
        builder.make_model(str(checkpoint.path))
        builder.make_genai_config(builder.hf_config, {}, str(genai))
        builder.save_processing(str(checkpoint.path), {}, str(genai))
    builder.model.graph.sort()
    builder.model.producer_name = "phiconv"
    builder.model.producer_version = None
    return OnnxGraph(builder.model, builder.lazy, genai)


def build_with_builder(path: Path, out: Path, precision: str, provider: str, *options: str) -> Path:
    """The peer's own export, weights and all, through its documented entry points."""
    builder = _import_builder()
    arguments = ("", str(path), str(out), precision, provider, str(out.parent / "cache"))
    with silenced():
        parsed = builder.parse_extra_options(*arguments, list(options))
        builder.create_model(*arguments, **parsed)
    return out


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps what the builder prints off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _import_builder() -> Any:
    # Importing its package puts the builder's own modules on the path.
    import onnxruntime_genai.models  # noqa: F401, I001
    import builder

    return builder


def _make_builder(checkpoint: Checkpoint, target: ExportTarget) -> Any:
    config = checkpoint.config
    name = "Phi3MiniModel" if config.rope is None else "Phi3MiniLongRoPEModel"
    base: Any = getattr(_import_builder(), name)

    class LazyBuilder(base):  # type: ignore[misc]
        lazy: dict[str, Expression]

        def load_weights(self, input_path: str) -> _Weights:
            return _Weights(checkpoint)

        def is_local(self, layer_id: int) -> bool:
            return target.window(config) > 0

        def is_fused_rope_supported(self) -> bool:
            fits = config.rotary_dim // 2 % 8 == 0
            return bool(fits and super().is_fused_rope_supported())

        def is_packed_matmul_supported(self) -> bool:
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

    hf_config = _hugging_face_config(checkpoint)
    LazyBuilder.lazy = {}
    options = {"windowed_kv_cache": False}
    dtype = ir.DataType(target.dtype)
    path = str(checkpoint.path)
    builder = LazyBuilder(hf_config, dtype, dtype, target.provider, path, options)
    builder.hf_config = hf_config
    return builder


def _hugging_face_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration as the builder expects it."""
    from transformers import AutoConfig, AutoTokenizer

    path = str(checkpoint.path)
    config = AutoConfig.from_pretrained(path)
    if checkpoint.config.quantization is not None:
        del config.quantization_config
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_type" in rope:
        # transformers 5 writes only `rope_type`; the builder reads `type` as well.
        rope.setdefault("type", rope["rope_type"])
    if isinstance(rope, dict) and checkpoint.config.rope is not None:
        # The builder would derive the scale from the context lengths alone.
        scale = checkpoint.config.rope.attention_factor
        rope |= {"short_mscale": scale, "long_mscale": scale}
    _import_builder().add_special_token_ids(config, AutoTokenizer.from_pretrained(path))
    return config
