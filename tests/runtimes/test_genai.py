from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.runtimes import RUNTIMES, ArtifactFolder, GeneratingRuntime
from phiconv.runtimes.genai import GenAIModel
from phiconv.runtimes.onnxruntime import Session
from phiconv.runtimes.providers import CPU, ProviderChoice

ON_CPU = ProviderChoice(CPU, CPU)
WINDOWS = np.random.default_rng(1).integers(8, 352, (2, 64))


def open_model(path: Path) -> GenAIModel:
    return GenAIModel(ArtifactFolder(path), ON_CPU, 2)


@pytest.mark.parametrize("artifact", ["cpu_artifact", "dml_artifact"])
def test_prefill_is_a_plain_session(artifact: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(artifact)
    expected = list(Session(ArtifactFolder(path), ON_CPU, 2).logits(WINDOWS))
    found = list(open_model(path).logits(WINDOWS))
    np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=0, atol=1e-5)
    assert found[0].dtype == np.float32


def test_a_window_as_long_as_the_context_fits(cpu_artifact: Path) -> None:
    window = np.random.default_rng(2).integers(8, 352, (1, 512))
    assert next(open_model(cpu_artifact).logits(window)).shape == (512, 352)


@pytest.mark.parametrize(
    ("artifact", "atol"), [("cpu_artifact", 2e-5), ("dml_artifact", 2e-2)], ids=["fp32", "fp16"]
)
def test_decoding_agrees_with_prefill_beyond_the_sliding_window(
    artifact: str, atol: float, request: pytest.FixtureRequest
) -> None:
    model = open_model(request.getfixturevalue(artifact))
    prefill = next(model.logits(WINDOWS))
    decoded = model.decode_logits(WINDOWS[0], 30)
    assert decoded.shape == (34, 352)
    np.testing.assert_allclose(decoded, prefill[30:], rtol=0, atol=atol)


def test_greedy_generation_is_hugging_faces(checkpoint_path: Path, cpu_artifact: Path) -> None:
    prompt = WINDOWS[0, :20]
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path, dtype=torch.float32)
    ids = torch.from_numpy(prompt)[None]
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
    )
    found = open_model(cpu_artifact).generate(prompt, 64)
    assert found.tolist() == expected[0, 20:].tolist()


def test_generation_stops_at_an_end_token(cpu_artifact: Path, tmp_path: Path) -> None:
    prompt = WINDOWS[0, :20]
    free = open_model(cpu_artifact).generate(prompt, 12)
    copy = tmp_path / "copy"
    shutil.copytree(cpu_artifact, copy)
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = int(free[4])
    (copy / "genai_config.json").write_text(json.dumps(config))
    stopped = open_model(copy).generate(prompt, 12)
    first = free.tolist().index(free[4])
    assert stopped.tolist() == free[: first + 1].tolist()


def test_provenance(dml_artifact: Path) -> None:
    choice = ProviderChoice(machine.DML, CPU)
    runtime = RUNTIMES["onnxruntime-genai"](ArtifactFolder(dml_artifact), choice, 1)
    assert isinstance(runtime, GeneratingRuntime)
    found = runtime.provenance()
    assert found.runtime == "onnxruntime-genai"
    assert found.where == "on CPUExecutionProvider, target DmlExecutionProvider not present"


def test_a_plain_session_does_not_generate(cpu_artifact: Path) -> None:
    session = Session(ArtifactFolder(cpu_artifact), ON_CPU, 1)
    assert not isinstance(session, GeneratingRuntime)


@pytest.mark.skipif(machine.CUDA in machine.providers(), reason="this machine has CUDA")
def test_a_missing_provider_is_an_error(cpu_artifact: Path) -> None:
    with pytest.raises((StageError, EnvironmentLacksError)):
        GenAIModel(ArtifactFolder(cpu_artifact), ProviderChoice(machine.CUDA, machine.CUDA), 1)


@pytest.mark.parametrize(
    ("provider", "flavour"),
    [(machine.CUDA, "onnxruntime-genai-cuda"), (machine.DML, "onnxruntime-genai-directml")],
)
def test_a_build_without_the_provider_is_the_environments_fault(
    cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch, provider: str, flavour: str
) -> None:
    """As where onnxruntime-gpu is installed beside the GenAI for the CPU."""
    for question in ("is_cuda_available", "is_dml_available"):
        monkeypatch.setattr(f"onnxruntime_genai.{question}", lambda: False)
    with pytest.raises(EnvironmentLacksError, match=f"was not built for {provider}") as caught:
        GenAIModel(ArtifactFolder(cpu_artifact), ProviderChoice(provider, provider), 1)
    assert f"install {flavour} instead" in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_missing_driver_is_the_environments_fault(
    cpu_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What onnxruntime-genai-cuda 0.18.0 says without one."""
    message = (
        "Cuda interface not available: CUDA error in Create at /ort_genai_src/src/ep/cuda/"
        "cuda_common.h:80 - CUDA driver version is insufficient for CUDA runtime version"
    )

    def model(config: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("onnxruntime_genai.Model", model)
    with pytest.raises(EnvironmentLacksError, match="driver version is insufficient"):
        open_model(cpu_artifact)


def test_what_cannot_be_loaded_is_a_stage_error(cpu_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no genai_config\.json"):
        open_model(tmp_path)
    shutil.copy(cpu_artifact / "genai_config.json", tmp_path)
    with pytest.raises(StageError, match="GenAI failed"):
        open_model(tmp_path)


def test_more_tokens_than_the_context_is_a_stage_error(cpu_artifact: Path) -> None:
    with pytest.raises(StageError, match="context_length"):
        open_model(cpu_artifact).generate(WINDOWS[0], 512)
