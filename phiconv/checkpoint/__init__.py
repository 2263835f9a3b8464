"""Hugging Face checkpoints: found, checked, and read lazily.

`resolve` turns what a recipe names into a `Checkpoint`, whose `config` and `tensors` agree and
whose tensors are read row by row.
"""

from __future__ import annotations

from phiconv.checkpoint.config import ModelConfig
from phiconv.checkpoint.digests import DigestCache
from phiconv.checkpoint.problems import CheckpointProblemsError
from phiconv.checkpoint.reader import Checkpoint
from phiconv.checkpoint.rope import RopeScaling
from phiconv.checkpoint.safetensors_file import StoredDtype, TensorInfo, numpy_dtype
from phiconv.checkpoint.source import resolve

__all__ = [
    "Checkpoint",
    "CheckpointProblemsError",
    "DigestCache",
    "ModelConfig",
    "RopeScaling",
    "StoredDtype",
    "TensorInfo",
    "numpy_dtype",
    "resolve",
]
