"""Writes Phi-3 checkpoints of a given shape with seeded random weights, for measuring.

    python -m benchmarks.synthetic OUT --layers 32        # Phi-3-mini-4k: 3.8 B, 7.2 GiB bf16

The weights are normal deviates of a plausible scale; nothing about speed or memory depends on
their values. A tensor is a rotated window of one random block, so that 7 GiB take seconds.
Peak memory is one tensor.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

SHARD_BYTES = 5 << 30
BLOCK_VALUES = 8 << 20
TOKENIZER = Path(__file__).parent.parent / "examples" / "tiny-phi3"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Shape:
    """Dimensions of a checkpoint; the defaults are Phi-3-mini-4k's."""

    layers: int = 32
    hidden: int = 3072
    intermediate: int = 8192
    heads: int = 32
    kv_heads: int = 32
    vocabulary: int = 32064

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape by tensor name, in the order Hugging Face writes them."""
        head_dim = self.hidden // self.heads
        qkv = self.hidden + 2 * self.kv_heads * head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "lm_head.weight": (self.vocabulary, self.hidden),
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
        }
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.input_layernorm.weight": (self.hidden,),
                f"{prefix}.mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{prefix}.mlp.gate_up_proj.weight": (2 * self.intermediate, self.hidden),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
                f"{prefix}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.self_attn.qkv_proj.weight": (qkv, self.hidden),
            }
        return shapes | {"model.norm.weight": (self.hidden,)}

    def config(self) -> dict[str, object]:
        """config.json, with tiny-phi3's special tokens."""
        config = json.loads((TOKENIZER / "config.json").read_text(encoding="utf-8"))
        assert isinstance(config, dict)
        return config | {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
        }


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Write a bf16 checkpoint in shards of at most 5 GiB and return its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (TOKENIZER / name).exists():
            shutil.copyfile(TOKENIZER / name, folder / name)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, dims in shape.tensors().items():
        length = 2 * int(np.prod(dims))
        if size + length > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = dims
        size += length
    # Scale 0.02 as Hugging Face initialises; the bits of bf16 are the upper half of fp32.
    values = np.random.default_rng(seed).standard_normal(BLOCK_VALUES, np.float32) * 0.02
    block = (values.view(np.uint32) >> 16).astype(np.uint16)
    weight_map: dict[str, str] = {}
    total = 0
    for index, tensors in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        total += _write_shard(folder / file, tensors, block, index)
        weight_map |= dict.fromkeys(tensors, file)
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document), encoding="utf-8")
    return total


def _write_shard(
    path: Path, tensors: dict[str, tuple[int, ...]], block: np.ndarray, shard: int
) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in tensors.items():
        end = offset + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for index, dims in enumerate(tensors.values()):
            # A prime step keeps tensors and their rows from repeating each other in phase.
            start = (1_000_003 * (index + 1) + 7919 * shard) % len(block)
            left = int(np.prod(dims))
            while left:
                piece = block[start : start + left]
                file.write(piece.tobytes())
                left -= len(piece)
                start = 0
    return offset


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", default=32, show_default=True)
@click.option("--hidden", default=3072, show_default=True)
@click.option("--intermediate", default=8192, show_default=True)
@click.option("--heads", default=32, show_default=True)
@click.option("--kv-heads", default=32, show_default=True)
@click.option("--vocabulary", default=32064, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, seed: int, **dimensions: int) -> None:
    """Write one checkpoint."""
    size = write_checkpoint(out, Shape(**dimensions), seed)
    click.echo(f"{out}: {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
