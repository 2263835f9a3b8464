"""Gives a checkpoint outlier channels without changing the function that it computes.

Some channels of every input are made larger by a power of two where they come from, and the
weights behind them smaller by the same, which is exact in any floating-point format. Large
activations beside small weights are what rounding of real models suffers from and what AWQ undoes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from phiconv.awq.groups import GROUPS
from phiconv.checkpoint import Checkpoint

WEIGHTS = "model.safetensors"


def inject_outliers(source: Path, folder: Path, *, share: float = 0.03, seed: int = 0) -> Path:
    """Writes a copy of a one-file checkpoint with outliers of 8 to 64 times in `share` channels."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = Checkpoint(source).config
    tensors = {name: array.copy() for name, array in load_file(source / WEIGHTS).items()}
    random = np.random.default_rng(seed)
    for layer in range(config.num_hidden_layers):
        for group in GROUPS:
            linear, before = tensors[group.weight(layer)], tensors[group.source_weight(layer)]
            rows = before[group.source_rows(config)]
            factors = np.ones(len(rows), np.float32)
            chosen = random.choice(len(rows), max(1, int(share * len(rows))), replace=False)
            factors[chosen] = 2.0 ** random.integers(3, 7, len(chosen))
            columns = factors
            if group.over_heads:
                heads = factors.reshape(config.num_key_value_heads, 1, config.head_dim)
                repeats = config.num_attention_heads // config.num_key_value_heads
                columns = np.repeat(heads, repeats, axis=1).reshape(-1)
            scaled = rows.astype(np.float32) * factors.reshape(-1, *[1] * (rows.ndim - 1))
            before[group.source_rows(config)] = scaled.astype(before.dtype)
            linear[...] = (linear.astype(np.float32) / columns).astype(linear.dtype)
    assert all(array.dtype in (ml_dtypes.bfloat16, np.float32) for array in tensors.values())
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder
