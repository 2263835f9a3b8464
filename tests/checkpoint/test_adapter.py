"""A LoRA adapter is refused with how to merge it; what was merged is like any other checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phiconv.checkpoint import Checkpoint
from phiconv.errors import CheckpointError
from tests.phi3_checkpoints import write_phi3_checkpoint

BASE = "microsoft/Phi-3-mini-4k-instruct"


def write_adapter(folder: Path, content: str | None = None) -> Path:
    """An adapter's folder as peft writes it: no config.json."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": BASE, "r": 8}
    text = json.dumps(config) if content is None else content
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    save_file(
        {"lora_A.weight": np.zeros((8, 16), np.float32)}, folder / "adapter_model.safetensors"
    )
    return folder


def test_an_adapter_alone_is_refused_with_how_to_merge_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"a LORA adapter for {BASE} that was not") as caught:
        Checkpoint(write_adapter(tmp_path / "adapter"))
    assert "merge_and_unload()" in str(caught.value.remedy)


def test_an_adapter_beside_its_base_model_is_refused_too(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "model")
    Checkpoint(path)
    with pytest.raises(CheckpointError, match="was not merged"):
        Checkpoint(write_adapter(path))


def test_a_broken_adapter_config_is_an_adapter_all_the_same(tmp_path: Path) -> None:
    for content in ("{", "[]"):
        with pytest.raises(CheckpointError, match="a LoRA adapter that was not merged"):
            Checkpoint(write_adapter(tmp_path / "adapter", content))


def test_a_merged_checkpoint_is_read_as_what_it_is(tmp_path: Path) -> None:
    """Merging adds a product of two thin matrices to a weight, and leaves no other trace."""
    path = write_phi3_checkpoint(tmp_path / "base", dtype="f32")
    merged = shutil.copytree(path, tmp_path / "merged")
    weights = load_file(merged / "model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    rng = np.random.default_rng(0)
    rows, columns = weights[name].shape
    delta = rng.standard_normal((rows, 4), np.float32) @ rng.standard_normal(
        (4, columns), np.float32
    )
    save_file(
        weights | {name: weights[name] + delta},
        merged / "model.safetensors",
        metadata={"format": "pt"},
    )
    found, base = Checkpoint(merged), Checkpoint(path)
    assert found.config == base.config
    assert np.allclose(found.read(name) - base.read(name), delta, atol=1e-5)
