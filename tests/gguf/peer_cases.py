"""What is compared with llama.cpp's own converter and quantizer, and how it is summed up."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phiconv.checkpoint import Checkpoint
from phiconv.gguf.file_types import FILE_TYPES
from phiconv.gguf.importance import ImportanceMatrix
from phiconv.gguf.plan import plan_tensors
from phiconv.gguf.tensor_types import TypeChoice
from tests.phi3_checkpoints import write_phi3_checkpoint

CHECKPOINTS: Mapping[str, Mapping[str, Any]] = {
    # nine layers: the rules by depth divide by eight
    "wide": {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9},
    # rows of 96 are blocks of 32, not of 256; rows of 208 neither
    "narrow": {
        "hidden_size": 96,
        "intermediate_size": 208,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "dtype": "f16",
    },
    "tied": {"hidden_size": 256, "tie_word_embeddings": True, "dtype": "f32"},
    "longrope": {
        "hidden_size": 256,
        "max_position_embeddings": 2048,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + i / 16 for i in range(32)],
            "long_factor": [1.0 + i / 2 for i in range(32)],
        },
        "sliding_window": 300,
    },
}

CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    **{f"wide {name}": ("wide", {"file_type": name}) for name in FILE_TYPES},
    **{
        f"narrow {name}": ("narrow", {"file_type": name})
        for name in ("F16", "Q8_0", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
    },
    **{f"tied {name}": ("tied", {"file_type": name}) for name in ("Q4_0", "Q4_K_M", "Q8_0")},
    "longrope Q4_K_M": ("longrope", {"file_type": "Q4_K_M"}),
    "own embedding and head": (
        "wide",
        {"file_type": "Q4_K_M", "token_embedding_type": "Q8_0", "output_type": "Q5_1"},
    ),
    "own types by name": (
        "wide",
        {
            "file_type": "Q4_K_M",
            "overrides": [
                {"match": "blk.[0-2].attn_qkv.weight", "type": "Q5_0"},
                {"match": "*.ffn_up.weight", "type": "Q8_0"},
            ],
        },
    ),
}
"""Case -> checkpoint and parameters of `convert-gguf`."""

WEIGHTED: Mapping[str, tuple[str, str]] = {
    f"weighted {name} {file_type}": (name, file_type)
    for name, file_type in (
        ("wide", "Q4_0"),
        ("wide", "Q4_1"),
        ("wide", "Q5_0"),
        ("wide", "Q5_1"),
        ("wide", "Q8_0"),
        ("wide", "Q4_K_M"),
        ("wide", "Q5_K_M"),
        ("wide", "Q6_K"),
        ("narrow", "Q4_K_S"),
    )
}
"""Case -> checkpoint and file type, with the importance matrix of `importance`."""

FILE = Path(__file__).with_name("peer.json")


def write_checkpoint(name: str, folder: Path) -> Path:
    """Writes one of `CHECKPOINTS`."""
    return write_phi3_checkpoint(folder, **CHECKPOINTS[name])


def importance(checkpoint: Path) -> ImportanceMatrix:
    """A seeded importance matrix for a checkpoint; some columns are never used."""
    plan = plan_tensors(Checkpoint(checkpoint), TypeChoice("F16"))
    sums, counts = {}, {}
    for weight in plan.weights:
        if weight.name.startswith("blk.") and not weight.is_vector:
            rng = np.random.default_rng(zlib.crc32(weight.name.encode()))
            sums[weight.name] = rng.exponential(1000, weight.shape[1]).astype(np.float32)
            sums[weight.name][::17] = 0
            counts[weight.name] = 1024
    return ImportanceMatrix(sums, counts, ("seeded",), chunks=2, chunk_size=512)


def summary(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> dict[str, Any]:
    """The types of all tensors in their order, and one digest of everything."""
    digest = hashlib.sha256()
    for name, (kind, shape, data) in tensors.items():
        digest.update(f"{name} {kind} {list(shape)} {len(data)}\n".encode())
        digest.update(data)
    types = " ".join(f"{name}:{kind}" for name, (kind, _, _) in tensors.items() if kind != "F32")
    return {"types": types, "sha256": digest.hexdigest()}


def condensed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and values, long lists as a digest of their text."""
    return {
        key: hashlib.sha256(repr(value).encode()).hexdigest()
        if isinstance(value, list) and len(value) > 40
        else value
        for key, value in metadata.items()
    }
