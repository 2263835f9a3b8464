from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, StageError
from phiconv.runtimes import RUNTIMES, ArtifactFolder
from phiconv.runtimes.onnxruntime import Session, model_file
from phiconv.runtimes.providers import CPU, ProviderChoice, choose
from tests.onnx.models import hugging_face_logits

ON_CPU = ProviderChoice(CPU, CPU)
DML_ON_CPU = ProviderChoice(machine.DML, CPU)
WINDOWS = np.random.default_rng(0).integers(8, 352, (2, 96))


def open_session(path: Path, choice: ProviderChoice = ON_CPU) -> Session:
    return Session(ArtifactFolder(path), choice, 2)


@pytest.mark.parametrize(
    ("artifact", "source", "atol"),
    [
        pytest.param("cpu_artifact", "checkpoint_path", 2e-5, id="fp32"),
        pytest.param("dml_artifact", "dml_checkpoint_path", 5e-2, id="fp16"),
    ],
)
def test_logits_of_every_position_are_hugging_faces(
    artifact: str, source: str, atol: float, request: pytest.FixtureRequest
) -> None:
    session = open_session(request.getfixturevalue(artifact))
    found = list(session.logits(WINDOWS))
    assert len(found) == 2
    for logits, window in zip(found, WINDOWS, strict=True):
        assert logits.shape == (96, 352)
        assert logits.dtype == np.float32
        expected = hugging_face_logits(request.getfixturevalue(source), window)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=atol)


def test_provenance_says_where_every_node_ran(dml_artifact: Path) -> None:
    found = open_session(dml_artifact, DML_ON_CPU).provenance()
    assert found.where == "on CPUExecutionProvider, target DmlExecutionProvider not present"
    assert found.runtime == "onnxruntime"
    assert found.device == machine.processor()
    assert found.threads == 2
    assert set(found.placement) == {CPU}
    nodes = found.placement[CPU]
    model = onnx.load(dml_artifact / "model.onnx", load_external_data=False)
    for operator in ("GroupQueryAttention", "RotaryEmbedding"):
        assert nodes[operator] == sum(node.op_type == operator for node in model.graph.node)
    assert found.strays == ()


def test_the_registry_opens_a_session(cpu_artifact: Path) -> None:
    runtime = RUNTIMES["onnxruntime"](ArtifactFolder(cpu_artifact), ON_CPU, 1)
    assert next(iter(runtime.logits(WINDOWS))).shape == (96, 352)


@pytest.mark.skipif(machine.CUDA in machine.providers(), reason="this machine has CUDA")
def test_a_provider_that_the_runtime_lacks_is_the_environments_fault(cpu_artifact: Path) -> None:
    """It has none, or onnxruntime-gpu finds no driver for it."""
    with pytest.raises(EnvironmentLacksError, match=r"has no CUDAExec|CUDAExec.* did not start"):
        open_session(cpu_artifact, ProviderChoice(machine.CUDA, machine.CUDA))


def test_the_head_size_is_taken_from_the_config_or_the_caller(
    cpu_artifact: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in cpu_artifact.glob("model.onnx*"):
        shutil.copy(file, bare)
    with pytest.raises(StageError, match="shape of the KV cache"):
        next(open_session(bare).logits(WINDOWS))
    session = Session(ArtifactFolder(bare, head_size=32), ON_CPU, 1)
    np.testing.assert_array_equal(
        next(session.logits(WINDOWS)), next(open_session(cpu_artifact).logits(WINDOWS))
    )
    (bare / "genai_config.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(StageError, match=r"not a genai_config\.json"):
        next(open_session(bare).logits(WINDOWS))


def edited(artifact: Path, folder: Path, edit: str) -> Path:
    shutil.copytree(artifact, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    if edit == "renamed logits":
        for node in model.graph.node:
            node.output[:] = ["scores" if name == "logits" else name for name in node.output]
        model.graph.output[0].name = "scores"
    elif edit == "unknown input":
        value = onnx.helper.make_tensor_value_info("use_cache", onnx.TensorProto.BOOL, [1])
        model.graph.input.append(value)
    elif edit == "unknown int input":
        value = onnx.helper.make_tensor_value_info("flags", onnx.TensorProto.INT64, [1])
        model.graph.input.append(value)
    elif edit == "last position":
        squeeze = onnx.helper.make_node("Gather", ["every", "last"], ["logits"], axis=1)
        for node in model.graph.node:
            node.output[:] = ["every" if name == "logits" else name for name in node.output]
        index = onnx.numpy_helper.from_array(np.array([-1]), "last")
        model.graph.initializer.append(index)
        model.graph.node.append(squeeze)
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("renamed logits", "no output 'logits'"),
        ("unknown input", r"input use_cache has the type tensor\(bool\)"),
        ("unknown int input", "an input 'flags'"),
        ("last position", r"logits of shape \[1, 1, 352\] for 96 tokens"),
    ],
)
def test_a_model_that_cannot_be_measured_is_refused(
    cpu_artifact: Path, tmp_path: Path, edit: str, message: str
) -> None:
    folder = edited(cpu_artifact, tmp_path / "edited", edit)
    with pytest.raises(StageError, match=message) as caught:
        next(open_session(folder).logits(WINDOWS))
    assert "model.onnx" in str(caught.value)


def test_a_failure_inside_the_runtime_is_a_stage_error(cpu_artifact: Path) -> None:
    beyond = np.full((1, 4), 10_000)
    with pytest.raises(StageError, match="ONNX Runtime failed"):
        next(open_session(cpu_artifact).logits(beyond))


def test_a_broken_or_missing_model_is_a_stage_error(cpu_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"wanted model\.onnx, the \.onnx files are: none"):
        open_session(tmp_path)
    (tmp_path / "other.onnx").write_bytes(b"not a model")
    with pytest.raises(StageError, match="cannot load the model"):
        open_session(tmp_path)
    shutil.copy(cpu_artifact / "model.onnx", tmp_path / "model.onnx")
    with pytest.raises(StageError, match="cannot load the model"):
        open_session(tmp_path)  # without its external data


def test_one_onnx_file_of_another_name_is_taken(cpu_artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(cpu_artifact, folder)
    (folder / "model.onnx").rename(folder / "decoder.onnx")
    assert next(open_session(folder).logits(WINDOWS)).shape == (96, 352)


def test_of_several_onnx_files_the_named_one_is_taken(tmp_path: Path) -> None:
    for name in ("model.onnx", "decoder.onnx"):
        (tmp_path / name).write_bytes(b"")
    assert model_file(tmp_path).name == "model.onnx"
    config = tmp_path / "genai_config.json"
    config.write_text(json.dumps({"model": {"decoder": {"filename": "decoder.onnx"}}}))
    assert model_file(tmp_path).name == "decoder.onnx"
    config.unlink()
    (tmp_path / "model.onnx").rename(tmp_path / "encoder.onnx")
    with pytest.raises(StageError, match=r"files are: decoder\.onnx, encoder\.onnx"):
        model_file(tmp_path)


class TestWhenTheProviderIsMissing:
    @pytest.fixture(autouse=True)
    def only_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "providers", lambda: (CPU,))

    def test_require_ends_with_exit_code_5(self) -> None:
        with pytest.raises(EnvironmentLacksError, match="CUDAExecutionProvider is not") as caught:
            choose("cuda", "require")
        assert caught.value.exit_code == 5
        assert "phiconv[cuda]" in str(caught.value)

    def test_fallback_runs_on_the_cpu_and_keeps_the_target(self) -> None:
        assert choose("dml", "fallback-cpu") == DML_ON_CPU

    def test_skip_runs_nothing(self) -> None:
        assert choose("cuda", "skip") == ProviderChoice(machine.CUDA, None)

    def test_the_cpu_is_there_whatever_the_recipe_says(self) -> None:
        assert choose("cpu", "require") == ON_CPU

    def test_a_present_provider_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "providers", lambda: (machine.CUDA, CPU))
        assert choose("cuda", "skip") == ProviderChoice(machine.CUDA, machine.CUDA)

    def test_no_runtime_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "providers", lambda: ())
        with pytest.raises(EnvironmentLacksError, match="CPUExecutionProvider is not"):
            choose("cuda", "fallback-cpu")


@pytest.mark.gpu
def test_on_cuda_all_the_work_is_on_cuda(folder: Path, checkpoint_path: Path) -> None:
    from tests.onnx_artifacts import write_onnx_artifact

    artifact = write_onnx_artifact(checkpoint_path, folder / "cuda-fp16", "cuda", "fp16")
    session = open_session(artifact, ProviderChoice(machine.CUDA, machine.CUDA))
    logits = next(session.logits(WINDOWS))
    expected = hugging_face_logits(checkpoint_path, WINDOWS[0])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-2)
    provenance = session.provenance()
    assert provenance.where == "on CUDAExecutionProvider"
    assert provenance.placement[machine.CUDA]["GroupQueryAttention"] == 2
    assert provenance.strays == ()
