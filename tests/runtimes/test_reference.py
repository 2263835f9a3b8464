from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from phiconv.checkpoint import Checkpoint
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.runtimes import reference as module
from phiconv.runtimes.reference import LanguageModelHead, final_hidden_states
from tests.phi3_checkpoints import write_phi3_checkpoint

WINDOWS = np.random.default_rng(0).integers(0, 352, (5, 96))


def longrope(original: int) -> dict[str, Any]:
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1 + i / 10 for i in range(16)],
            "long_factor": [2.0 + i for i in range(16)],
            "original_max_position_embeddings": original,
        },
    }


PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def hugging_face(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def reference_logits(path: Path) -> np.ndarray:
    checkpoint = Checkpoint(path)
    head = LanguageModelHead(checkpoint)
    hidden = final_hidden_states(checkpoint, WINDOWS)
    return np.stack([head.logits(states) for states in hidden])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="grouped-query"),
        pytest.param({"num_key_value_heads": 4}, id="multi-head"),
        pytest.param({"sliding_window": 20}, id="sliding-window"),
        pytest.param({"rope_parameters": PARTIAL}, id="partial-rotary"),
        pytest.param(longrope(128), id="longrope-short"),
        pytest.param(longrope(64), id="longrope-long"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"dtype": "f16", "rope_theta": 500.0, "rms_norm_eps": 1e-3}, id="f16"),
        pytest.param({"dtype": "f32", "shards": 2}, id="f32-shards"),
    ],
)
def test_streamed_layers_are_hugging_faces_model(tmp_path: Path, config: dict[str, Any]) -> None:
    path = write_phi3_checkpoint(tmp_path, **config)
    with torch.inference_mode():
        expected = hugging_face(path)(torch.from_numpy(WINDOWS)).logits.numpy()
    found = reference_logits(path)
    assert found.dtype == np.float32
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_head_of_its_own_is_used_even_where_the_config_ties_it(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with torch.inference_mode():
        expected = hugging_face(path)(torch.from_numpy(WINDOWS)).logits.numpy()
    np.testing.assert_allclose(reference_logits(path), expected, rtol=0, atol=1e-5)


def test_the_residual_stream_is_observed_layer_by_layer(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path, num_hidden_layers=3)
    states: list[np.ndarray] = []
    told: list[tuple[int, str]] = []
    final = final_hidden_states(
        Checkpoint(path),
        WINDOWS,
        observe=lambda index, stream: states.insert(index, stream.copy()),
        advance=lambda amount, what: told.append((amount, what)),
    )
    with torch.inference_mode():
        out = hugging_face(path).model(torch.from_numpy(WINDOWS), output_hidden_states=True)
    # Hugging Face's last hidden state is after the final norm
    for found, expected in zip([*states[:3], final], out.hidden_states, strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)
    assert len(states) == 4
    assert told == [(WINDOWS.size, f"layer {index}") for index in range(3)]


def test_threads_and_repeats_change_no_bit(checkpoint_path: Path) -> None:
    checkpoint = Checkpoint(checkpoint_path)
    one, two, again = (
        final_hidden_states(checkpoint, WINDOWS, threads=threads) for threads in (1, 2, 2)
    )
    assert one.tobytes() == two.tobytes() == again.tobytes()
    heads = (LanguageModelHead(checkpoint, threads=threads) for threads in (1, 2))
    first, second = (head.logits(one[0]) for head in heads)
    assert first.tobytes() == second.tobytes()


def test_torchs_settings_are_left_as_they_were(checkpoint_path: Path) -> None:
    threads = torch.get_num_threads()
    final_hidden_states(Checkpoint(checkpoint_path), WINDOWS[:1], threads=threads + 1)
    assert torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()


def test_blocks_of_the_embedding_and_the_head_change_nothing(
    checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reference_logits(checkpoint_path)
    monkeypatch.setattr(module, "_EMBEDDING_ROWS", 100)
    monkeypatch.setattr(module, "_HEAD_ROWS", 100)
    monkeypatch.setattr(module, "_BATCH_TOKENS", {"cpu": 1})
    np.testing.assert_allclose(reference_logits(checkpoint_path), expected, rtol=0, atol=1e-5)


def test_a_reference_that_is_not_finite_names_the_layer(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path, dtype="f32")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="not finite after layer 1"):
        final_hidden_states(Checkpoint(path), WINDOWS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_cuda_device_is_the_environments_fault(checkpoint_path: Path) -> None:
    with pytest.raises(EnvironmentLacksError, match="no CUDA device"):
        final_hidden_states(Checkpoint(checkpoint_path), WINDOWS, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the installed PyTorch has no CUDA")
def test_cuda_agrees_with_the_cpu(checkpoint_path: Path) -> None:
    checkpoint = Checkpoint(checkpoint_path)
    expected = final_hidden_states(checkpoint, WINDOWS)
    found = final_hidden_states(checkpoint, WINDOWS, device="cuda")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    head = LanguageModelHead(checkpoint, device="cuda")
    np.testing.assert_allclose(
        head.logits(found[0]), LanguageModelHead(checkpoint).logits(expected[0]), atol=1e-4
    )
