"""Expected caches are transformers' own, and wrong ones are recognised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from phiconv.checkpoint import Checkpoint, ModelConfig
from phiconv.diagnosis.rotary_cache import (
    RotaryCache,
    cache_kinds,
    expected_cache,
    explain,
    matches,
)
from tests.phi3_checkpoints import write_phi3_checkpoint

LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1 + i / 10 for i in range(16)],
        "long_factor": [2.0 + i for i in range(16)],
        "original_max_position_embeddings": 64,
    },
}
PARTIAL = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}


def transformers_cache(path: Path, positions: int) -> RotaryCache:
    rotary = Phi3RotaryEmbedding(Phi3Config.from_pretrained(path))
    cos, sin = rotary(torch.empty(0), position_ids=torch.arange(positions)[None])
    pairs = cos.shape[-1] // 2
    return RotaryCache(cos[0, :, :pairs].double().numpy(), sin[0, :, :pairs].double().numpy())


@pytest.mark.parametrize(
    ("overrides", "kind", "positions"),
    [({}, "plain", 512), (PARTIAL, "plain", 300), (LONGROPE, "short", 64), (LONGROPE, "long", 512)],
    ids=["plain", "partial", "short", "long"],
)
def test_expected_caches_are_those_of_transformers(
    tmp_path: Path, overrides: dict[str, Any], kind: str, positions: int
) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", **overrides)
    config = Checkpoint(path).config
    assert kind in cache_kinds(config)
    expected = expected_cache(config, kind, positions)
    assert matches(transformers_cache(path, positions), expected, "float32")


def test_a_joined_cache_is_short_then_long(tmp_path: Path) -> None:
    config = Checkpoint(write_phi3_checkpoint(tmp_path / "checkpoint", **LONGROPE)).config
    joined = expected_cache(config, "joined", 576)
    assert matches(joined.rows(0, 64), expected_cache(config, "short", 64), "float32")
    assert matches(joined.rows(64, 576), expected_cache(config, "long", 512), "float32")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = write_phi3_checkpoint(tmp_path_factory.mktemp("rotary") / "checkpoint")
    return Checkpoint(path).config


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("theta", "it follows rope_theta 500, the checkpoint has 10000"),
        ("next", "it is shifted: row 0 holds position 1"),
        ("previous", "it is shifted: row 1 holds position 0"),
        ("swapped", "cos and sin are swapped"),
        ("halved", "its positions are multiplied by 0.5"),
        ("scaled", "it is scaled by 1.2, expected 1"),
        ("width", "it rotates 16 dimensions, the checkpoint 32"),
        ("corrupt", "it differs by up to 1, most at position 100"),
        ("nan", "it holds NaN or infinity"),
    ],
)
def test_a_wrong_cache_is_explained(config: ModelConfig, fault: str, text: str, dtype: str) -> None:
    rows = 512
    good = expected_cache(config, "plain", rows + 2)
    cos, sin = (part[:rows].copy() for part in good)
    if fault == "theta":
        cos, sin = expected_cache(replace(config, rope_theta=500.0), "plain", rows)
    elif fault == "next":
        cos, sin = good.rows(1, rows + 1)
    elif fault == "previous":
        cos, sin = np.roll(cos, 1, axis=0), np.roll(sin, 1, axis=0)
        cos[0], sin[0] = 0.5, 0.5
    elif fault == "swapped":
        cos, sin = sin, cos
    elif fault == "halved":
        angles = np.arctan2(good.sin[1], good.cos[1]) / 2 * np.arange(rows)[:, None]
        cos, sin = np.cos(angles), np.sin(angles)
    elif fault == "scaled":
        cos, sin = cos * 1.2, sin * 1.2
    elif fault == "width":
        cos, sin = cos[:, :8], sin[:, :8]
    elif fault == "corrupt":
        cos[100] += 1
    else:
        cos[3, 4] = np.nan
    kind = np.dtype(dtype)
    found = RotaryCache(cos.astype(kind).astype(np.float64), sin.astype(kind).astype(np.float64))
    assert not matches(found, good, dtype)
    assert explain(found, good, config, dtype) == text


def test_rounding_is_no_fault(config: ModelConfig) -> None:
    good = expected_cache(config, "plain", 512)
    half = RotaryCache(*(part.astype(np.float16).astype(np.float64) for part in good))
    assert matches(half, good, "float16")
    assert not matches(half, good, "float32")
