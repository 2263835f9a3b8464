"""`phiconv diagnose` on small real artifacts; what it finds is tested in tests/diagnosis."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click
import onnx
import pytest

from phiconv import machine
from tests.gguf.conversions import convert
from tests.onnx_artifacts import write_onnx_artifact
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.terminal import Done, Terminal


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phi3_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="module")
def artifact(checkpoint: Path) -> Path:
    return write_onnx_artifact(checkpoint, checkpoint.parent / "artifact")


@pytest.fixture(scope="module")
def wrong_epsilon(artifact: Path) -> Path:
    """Every norm's epsilon is 0.1."""
    folder = shutil.copytree(artifact, artifact.parent / "wrong")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 0.1
    onnx.save(model, folder / "model.onnx")
    return folder


def diagnose(phiconv: Terminal, checkpoint: Path, artifact: Path, *options: str) -> Done:
    return phiconv(
        "diagnose", str(artifact), "--reference", str(checkpoint), "--windows", "2",
        "--window-length", "48", *options,
    )  # fmt: skip


def test_a_clean_artifact_has_no_fault(phiconv: Terminal, checkpoint: Path, artifact: Path) -> None:
    done = diagnose(phiconv, checkpoint, artifact)
    assert done.code == 0, done.err
    assert done.out.startswith("no fault found: ")
    assert "on CPUExecutionProvider, tokens default 2x48" in done.out
    titles = [line for line in done.out.splitlines() if line and not line.startswith(" ")][1:]
    assert titles == ["Ladder", "Residual stream", "Weights", "Steps"]
    assert "\x1b" not in done.out + done.err


def test_a_fault_is_named(phiconv: Terminal, checkpoint: Path, wrong_epsilon: Path) -> None:
    done = diagnose(phiconv, checkpoint, wrong_epsilon, "--quiet")
    assert done.code == 0
    assert done.err == ""
    (verdict,) = done.out.splitlines()
    assert "norm" in verdict
    assert "0.1" in verdict


def test_a_terminal_gets_tables_that_fit_it(
    phiconv: Terminal, checkpoint: Path, wrong_epsilon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    done = diagnose(phiconv, checkpoint, wrong_epsilon)
    assert done.code == 0
    assert "───" in done.out
    assert "Graph against config.json" in done.out
    assert max(map(len, click.unstyle(done.out).splitlines()[3:])) <= 100


def test_json_holds_all_of_it(phiconv: Terminal, checkpoint: Path, wrong_epsilon: Path) -> None:
    done = diagnose(phiconv, checkpoint, wrong_epsilon, "--json", "--quiet")
    document = json.loads(done.out)
    assert document["schema"] == 1
    assert document["faults"]
    assert document["tokens"]["windows"] == 2


def test_what_cannot_be_diagnosed_is_told(
    phiconv: Terminal, checkpoint: Path, artifact: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert diagnose(phiconv, checkpoint, tmp_path / "absent").code == 2
    assert diagnose(phiconv, checkpoint, checkpoint).code == 3
    assert diagnose(phiconv, tmp_path / "absent", artifact).code == 5
    monkeypatch.setattr(machine, "providers", lambda: (machine.CPU,))
    done = diagnose(phiconv, checkpoint, artifact, "--provider", "cuda")
    assert done.code == 5
    assert "CUDAExecutionProvider is not present" in done.err
    done = diagnose(
        phiconv, checkpoint, artifact, "--provider", "cuda", "--when-missing", "fallback-cpu"
    )
    assert done.code == 0
    assert "on CPUExecutionProvider, target CUDAExecutionProvider not present" in done.out


@pytest.mark.skipif(machine.llama_cpp_binding() is None, reason="llama.cpp is not installed")
def test_a_gguf_file(phiconv: Terminal, tmp_path: Path) -> None:
    checkpoint = write_phi3_checkpoint(tmp_path / "checkpoint", hidden_size=256)
    convert(checkpoint, tmp_path / "gguf", "Q8_0")
    done = diagnose(phiconv, checkpoint, tmp_path / "gguf")
    assert done.code == 0, done.err
    assert done.out.startswith("no fault found: ")
    assert "on llama.cpp, tokens default 2x48" in done.out
    refused = diagnose(phiconv, checkpoint, tmp_path / "gguf" / "model.gguf", "--provider", "cuda")
    assert refused.code == 2
    assert "llama.cpp has no provider cuda" in refused.err
