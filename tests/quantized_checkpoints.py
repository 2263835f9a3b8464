"""Writes AutoAWQ and GPTQ checkpoints by the formats' definitions, one code at a time.

Nothing here uses phiconv's own packing. A checkpoint is made from a float one: its decoder matrices
are rounded to random-free min-max grids, and what they then stand for is returned.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class Quantized:
    """A quantized checkpoint and what its weights stand for.

    Attributes:
        path: The folder.
        codes: uint8 [K, N] by tensor.
        zeros: uint8 [groups, N] by tensor.
        scales: float16 [groups, N] by tensor.
        weights: float32 [N, K] by tensor.
    """

    path: Path
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    zeros: dict[str, np.ndarray] = field(default_factory=dict)
    scales: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)


def write_quantized(
    source: Path,
    path: Path,
    *,
    method: str,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    version: str | None = None,
    group_order: list[int] | None = None,
    head: bool = False,
    config: dict[str, Any] | None = None,
    zero_bias: bool = False,
) -> Quantized:
    """Writes the AWQ or GPTQ form of a float checkpoint in one file.

    Args:
        source: The float checkpoint, `model.safetensors`.
        path: The folder to make.
        method: awq or gptq.
        bits: 4, or 8 for gptq.
        group_size: Features that share a scale; -1 for all.
        symmetric: Whether zero points are the middle.
        version: gemm, gptq or gptq_v2.
        group_order: Stored group of each group of consecutive features (gptq).
        head: Quantize the head, too.
        config: More keys of quantization_config.
        zero_bias: Store biases that are zero.
    """
    path.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, path / file.name)
    made = Quantized(path)
    version = version or ("gemm" if method == "awq" else "gptq")
    stored: dict[str, np.ndarray] = {}
    for name, values in load_file(source / "model.safetensors").items():
        wanted = name.startswith("model.layers.") or (head and name == "lm_head.weight")
        if values.ndim != 2 or not wanted:
            stored[name] = values
            continue
        size = values.shape[1] if group_size == -1 else group_size
        codes, zeros, scales = _round(values.astype(np.float32).T, bits, size, symmetric)
        steps = np.repeat(scales.astype(np.float32), size, axis=0)
        offsets = np.repeat(zeros.astype(np.float32), size, axis=0)
        made.codes[name], made.zeros[name], made.scales[name] = codes, zeros, scales
        made.weights[name] = np.ascontiguousarray(((codes - offsets) * steps).T)
        assert made.weights[name].dtype == np.float32  # 5 (or 9) bits times 11: exact
        module = name.removesuffix(".weight")
        stored |= _pack(module, codes, zeros, scales, method, bits, version, group_order, size)
        if zero_bias:
            stored[f"{module}.bias"] = np.zeros(values.shape[0], np.float16)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((path / "config.json").read_text())
    document["quantization_config"] = {
        "quant_method": method,
        "bits": bits,
        "group_size": group_size,
        **(
            {"version": version, "zero_point": True}
            if method == "awq"
            else {"checkpoint_format": version, "sym": symmetric, "desc_act": False}
        ),
        **(config or {}),
    }
    (path / "config.json").write_text(json.dumps(document))
    return made


def _round(
    weight: np.ndarray, bits: int, size: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [K, N], zero points and scales [K / size, N] of a [K, N] matrix."""
    top = (1 << bits) - 1
    groups = weight.reshape(-1, size, weight.shape[1])
    if symmetric:
        scales = np.abs(groups).max(1) / (top // 2)
        zeros = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    else:
        low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
        scales = (high - low) / top
        # GPTQ's first format has no zero point of 0
        zeros = np.clip(np.rint(-low / scales), 1, top).astype(np.uint8)
    scales = scales.astype(np.float16)
    codes = np.rint(groups / scales[:, None].astype(np.float32)) + zeros[:, None]
    return np.clip(codes, 0, top).astype(np.uint8).reshape(weight.shape), zeros, scales


def _pack(
    module: str,
    codes: np.ndarray,
    zeros: np.ndarray,
    scales: np.ndarray,
    method: str,
    bits: int,
    version: str,
    group_order: list[int] | None,
    size: int,
) -> dict[str, np.ndarray]:
    per_item = 32 // bits
    if method == "awq":
        packed = {"qweight": _along_rows(codes, 4, AWQ_ORDER)}
        packed["qzeros"] = _along_rows(zeros, 4, AWQ_ORDER)
        packed["scales"] = scales
    else:
        order = group_order or list(range(len(zeros)))
        place = np.argsort(order)  # stored group g holds what belongs to features of place[g]
        kept = zeros[place].astype(np.int64) - (1 if version == "gptq" else 0)
        packed = {
            "qweight": _along_rows(codes.T, bits, list(range(per_item))).T,
            "qzeros": _along_rows(kept, bits, list(range(per_item))),
            "scales": scales[place],
            "g_idx": np.repeat(np.array(order, np.int32), size)[: len(codes)],
        }
    # save_file writes an array's memory, whatever its order
    return {f"{module}.{part}": np.ascontiguousarray(array) for part, array in packed.items()}


def _along_rows(values: np.ndarray, bits: int, order: list[int]) -> np.ndarray:
    """Item c of a row holds values order[0], order[1], ... of its part, from the lowest bits."""
    rows, columns = values.shape
    per_item = 32 // bits
    out = np.zeros((rows, columns // per_item), np.uint32)
    for item in range(columns // per_item):
        for place, offset in enumerate(order):
            value = values[:, item * per_item + offset].astype(np.uint32)
            out[:, item] |= value << np.uint32(place * bits)
    return out.view(np.int32)
