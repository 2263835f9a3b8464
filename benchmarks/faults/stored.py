"""Weights of ONNX and GGUF artifacts as arrays over their files: what is written changes the file.

Names and layouts are spelled out here, and nothing of `phiconv.diagnosis` is used, so that a
mistake there does not hide itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.faults.planting import Place
from phiconv.checkpoint import ModelConfig

Array = NDArray[Any]
MODEL = "model.onnx"

# Bytes of a GGML block, where its float16 scale lies, and where its codes lie.
_GGML_BLOCKS = {
    "Q8_0": (34, 0, (2, 34)),
    "Q4_K": (144, 0, (16, 144)),
    "Q6_K": (210, 208, (0, 192)),
}


@dataclass(frozen=True, eq=False)
class Stored:
    """One weight.

    Attributes:
        arrays: All its data, each with a row of the weight along the first axis.
        dense: `[N, K]` floats, or None.
        codes: `[N, blocks, bytes]` uint8, or None.
        scales: Bit patterns of the scales `[N, blocks]`, unsigned, or None.
        zeros: Packed zero points `[N, bytes]`, or None.
    """

    arrays: tuple[Array, ...]
    dense: Array | None = None
    codes: Array | None = None
    scales: Array | None = None
    zeros: Array | None = None

    @property
    def rows(self) -> int:
        """N."""
        return len(self.arrays[0])

    def part(self, start: int, stop: int) -> Stored:
        """Rows `[start, stop)`."""
        pick = slice(start, stop)
        parts = (self.dense, self.codes, self.scales, self.zeros)
        return Stored(
            tuple(array[pick] for array in self.arrays),
            *(None if part is None else part[pick] for part in parts),
        )

    def like(self, other: Stored) -> bool:
        """Whether the two are stored alike."""
        mine, its = ([(a.shape, a.dtype) for a in s.arrays] for s in (self, other))
        return mine == its


def dense(values: Array) -> Stored:
    """A weight `[N, K]` of floats."""
    return Stored((values,), dense=values)


class Weights:
    """Every weight of an artifact by its place, and every norm's."""

    matrices: Mapping[Place, Stored]
    norms: Mapping[Place, Array]

    @property
    def linears(self) -> list[Place]:
        """The places of the layers' projections."""
        return [place for place in self.matrices if place[0] is not None]


class OnnxWeights(Weights):
    """Those of an ONNX folder, by the names that phiconv and the model builder give.

    Attributes:
        model: The graph; `save` writes it.
    """

    def __init__(self, folder: Path, config: ModelConfig):
        self._folder, self._config = folder, config
        self.model = ir.load(folder / MODEL)

    def save(self) -> None:
        """Writes the graph; data that is not in its own file goes into the model file."""
        ir.save(self.model, self._folder / MODEL)

    def array(self, name: str) -> Array:
        """An initializer's data in its file."""
        tensor = self.model.graph.initializers[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        return np.memmap(
            self._folder / str(tensor.location),
            tensor.dtype.numpy(),
            "r+",
            tensor.offset or 0,
            tuple(tensor.shape.numpy()),
        )

    @cached_property
    def matrices(self) -> Mapping[Place, Stored]:  # type: ignore[override]
        """Every weight by its place."""
        found: dict[Place, Stored] = {}
        for layer in range(self._config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for place, name, start, stop in _parts(self._config, layer):
                packed = self._matrix(f"{prefix}.{name}.MatMul.weight")
                if packed is not None:
                    found[place] = packed.part(start, stop)
            for component in ("attn.o_proj", "attn.q_proj", "attn.k_proj", "attn.v_proj",
                              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):  # fmt: skip
                weight = self._matrix(f"{prefix}.{component}.MatMul.weight")
                if weight is not None:
                    found[layer, component.replace("attn", "self_attn")] = weight
        head = self._matrix("lm_head.MatMul.weight")
        if head is not None:
            found[None, "lm_head"] = head
        if "model.embed_tokens.weight" in self.model.graph.initializers:
            found[None, "embed_tokens"] = dense(self.array("model.embed_tokens.weight"))
        return found

    @cached_property
    def norms(self) -> Mapping[Place, Array]:  # type: ignore[override]
        """Every norm's weight by its place."""
        last = self._config.num_hidden_layers
        names: dict[str, Place] = {
            f"model.layers.{last}.final_norm_layernorm.weight": (None, "norm")
        }
        for layer in range(last):
            for name in ("input_layernorm", "post_attention_layernorm"):
                names[f"model.layers.{layer}.{name}.weight"] = (layer, name)
        return {place: self.array(name) for name, place in names.items()}

    def _matrix(self, name: str) -> Stored | None:
        known = self.model.graph.initializers
        if name in known:
            return dense(self.array(name).T)
        for bits in (4, 8):
            if f"{name}_Q{bits}" in known:
                return self._blocks(name, bits)
        return None

    def _blocks(self, name: str, bits: int) -> Stored:
        codes = self.array(f"{name}_Q{bits}")
        codes = codes.reshape(codes.shape[0], -1, codes.shape[-1])
        scales = self.array(f"{name}_scales").reshape(codes.shape[:2])
        zeros = None
        if f"{name}_zero_points" in self.model.graph.initializers:
            zeros = self.array(f"{name}_zero_points").reshape(len(codes), -1)
        arrays = (codes, scales) if zeros is None else (codes, scales, zeros)
        bit_patterns = scales.view(f"<u{scales.itemsize}")
        return Stored(arrays, codes=codes, scales=bit_patterns, zeros=zeros)


def _parts(config: ModelConfig, layer: int) -> list[tuple[Place, str, int, int]]:
    """Packed projections: place, name in an ONNX graph, rows."""
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    qkv, gate_up, width = "attn.qkv_proj", "mlp.gate_up_proj", config.intermediate_size
    return [
        ((layer, "self_attn.q_proj"), qkv, 0, q),
        ((layer, "self_attn.k_proj"), qkv, q, q + kv),
        ((layer, "self_attn.v_proj"), qkv, q + kv, q + 2 * kv),
        ((layer, "mlp.gate_proj"), gate_up, 0, width),
        ((layer, "mlp.up_proj"), gate_up, width, 2 * width),
    ]


class GgufWeights(Weights):
    """Those of a GGUF file.

    Attributes:
        reader: The file; what is written into `reader.fields` is written to the file.
    """

    def __init__(self, file: Path, config: ModelConfig):
        import gguf

        self.reader = gguf.GGUFReader(file, "r+")
        self._tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self._config = config

    def flush(self) -> None:
        """Writes what was changed."""
        self.reader.data.flush()

    def vector(self, name: str) -> Array | None:
        """A vector of floats, None where the file has none."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.data

    @cached_property
    def matrices(self) -> Mapping[Place, Stored]:  # type: ignore[override]
        """Every weight by its place."""
        found: dict[Place, Stored] = {}
        names = {"attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
        for layer in range(self._config.num_hidden_layers):
            for place, name, start, stop in _parts(self._config, layer):
                found[place] = self._matrix(f"blk.{layer}.{names[name]}.weight").part(start, stop)
            found[layer, "self_attn.o_proj"] = self._matrix(f"blk.{layer}.attn_output.weight")
            found[layer, "mlp.down_proj"] = self._matrix(f"blk.{layer}.ffn_down.weight")
        found[None, "embed_tokens"] = self._matrix("token_embd.weight")
        if "output.weight" in self._tensors:
            found[None, "lm_head"] = self._matrix("output.weight")
        return found

    @cached_property
    def norms(self) -> Mapping[Place, Array]:  # type: ignore[override]
        """Every norm's weight by its place."""
        names: dict[str, Place] = {"output_norm.weight": (None, "norm")}
        for layer in range(self._config.num_hidden_layers):
            names[f"blk.{layer}.attn_norm.weight"] = (layer, "input_layernorm")
            names[f"blk.{layer}.ffn_norm.weight"] = (layer, "post_attention_layernorm")
        return {place: self._tensors[name].data for name, place in names.items()}

    def _matrix(self, name: str) -> Stored:
        tensor = self._tensors[name]
        kind, data = tensor.tensor_type.name, tensor.data
        if kind not in _GGML_BLOCKS:
            return dense(data)
        size, scale, (first, last) = _GGML_BLOCKS[kind]
        blocks = data.reshape(len(data), -1, size)
        scales = blocks[:, :, scale : scale + 2].view("<u2")[:, :, 0]
        return Stored((data,), codes=blocks[:, :, first:last], scales=scales)
