"""Overlays made by hand: random scales that keep the function, random clip limits, odd codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.overlaid import OverlaidCheckpoint
from phiconv.checkpoint.overlay import Overlay
from phiconv.checkpoint.rounded import RoundedWriter
from phiconv.checkpoint.weight_source import Grid
from phiconv.kernels import matmulnbits


def random_overlay(
    checkpoint: Checkpoint, grid: Grid, *, clip: bool = True, seed: int = 0, spread: float = 0.5
) -> Overlay:
    """Every group of Phi-3 scaled by factors around 1, tied over the query heads of a KV head."""
    config = checkpoint.config
    rng = np.random.default_rng(seed)
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    shared = config.num_attention_heads // config.num_key_value_heads

    def scales(count: int) -> np.ndarray:
        return np.exp(rng.standard_normal(count) * spread).astype(np.float32)

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        qkv, gate_up = f"{prefix}.self_attn.qkv_proj.weight", f"{prefix}.mlp.gate_up_proj.weight"
        columns[qkv] = scales(config.hidden_size)
        rows[f"{prefix}.input_layernorm.weight"] = 1 / columns[qkv]
        values = scales(kv_rows)
        rows[qkv] = np.concatenate([np.ones(q_rows + kv_rows, np.float32), 1 / values])
        heads = values.reshape(config.num_key_value_heads, config.head_dim)
        columns[f"{prefix}.self_attn.o_proj.weight"] = np.repeat(heads, shared, axis=0).reshape(-1)
        columns[gate_up] = scales(config.hidden_size)
        rows[f"{prefix}.post_attention_layernorm.weight"] = 1 / columns[gate_up]
        up = scales(config.intermediate_size)
        rows[gate_up] = np.concatenate([np.ones(config.intermediate_size, np.float32), 1 / up])
        columns[f"{prefix}.mlp.down_proj.weight"] = up
    clips = {}
    for name in columns if clip else ():
        n, k = checkpoint.tensors[name].shape
        clips[name] = rng.integers(0, 5, (n, -(-k // grid.group_size)), np.uint8)
    return Overlay(checkpoint.digest, grid, columns=columns, rows=rows, clips=clips)


def write_codes(folder: Path, checkpoint: Checkpoint, overlay: Overlay) -> None:
    """Codes beside an overlay, a little off those of plain rounding."""
    grid = overlay.grid
    source = OverlaidCheckpoint(checkpoint, overlay, clip=True)
    shapes: dict[str, tuple[int, int]] = {}
    for name in overlay.columns:
        n, k = source.tensors[name].shape
        shapes[name] = (n, k)
    with RoundedWriter(folder, grid, shapes) as writer:
        for name in shapes:
            packed, scales, zero_points = quantized(source.read(name), grid, np.float16)
            writer.write(name, packed, scales * np.float16(1.01), zero_points)


def quantized(
    weight: np.ndarray, grid: Grid, scale_dtype: type
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes, scales and zero points of plain rounding."""
    shapes = matmulnbits.layout(*weight.shape, bits=grid.bits, block_size=grid.group_size)
    packed = np.empty(shapes.packed, np.uint8)
    scales: np.ndarray = np.empty(shapes.scales, scale_dtype)
    zero_points = None if grid.symmetric else np.empty(shapes.zero_points, np.uint8)
    matmulnbits.quantize_rows(
        weight,
        bits=grid.bits,
        block_size=grid.group_size,
        symmetric=grid.symmetric,
        search="none",
        packed=packed,
        scales=scales,
        zero_points=zero_points,
    )
    return packed, scales, zero_points
