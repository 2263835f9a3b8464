from __future__ import annotations

from pathlib import Path

import pytest

from tests.onnx_artifacts import write_onnx_artifact
from tests.phi3_checkpoints import write_phi3_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture(scope="session")
def checkpoint_path(folder: Path) -> Path:
    return write_phi3_checkpoint(folder / "checkpoint", sliding_window=40)


@pytest.fixture(scope="session")
def cpu_artifact(folder: Path, checkpoint_path: Path) -> Path:
    return write_onnx_artifact(checkpoint_path, folder / "cpu-fp32")


@pytest.fixture(scope="session")
def dml_checkpoint_path(folder: Path) -> Path:
    """Without a sliding window, which the model builder leaves out of graphs for DirectML."""
    return write_phi3_checkpoint(folder / "dml-checkpoint")


@pytest.fixture(scope="session")
def dml_artifact(folder: Path, dml_checkpoint_path: Path) -> Path:
    """Separate rotary embedding, unpacked q, k, v, a position_ids input, fp16 throughout."""
    return write_onnx_artifact(dml_checkpoint_path, folder / "dml-fp16", "dml", "fp16")
