from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phiconv.checkpoint import Checkpoint, resolve
from tests.onnx_artifacts import write_onnx_artifact
from tests.parity.tokenizers import KINDS, write_tokenizer_pair
from tests.phi3_checkpoints import write_phi3_checkpoint

Edit = Callable[[dict[str, Any]], None]


class Broken:
    """Copies of an artifact with one fault each."""

    def __init__(self, artifact: Path, folder: Path):
        self.path = folder / "artifact"
        shutil.copytree(artifact, self.path)

    def edit(self, name: str, change: Edit) -> Path:
        """Changes one JSON file in place; returns the artifact's folder."""
        file = self.path / name
        document = json.loads(file.read_text(encoding="utf-8"))
        change(document)
        file.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        return self.path


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phi3_checkpoint(tmp_path_factory.mktemp("parity") / "checkpoint")


@pytest.fixture(scope="session")
def checkpoint(checkpoint_path: Path) -> Checkpoint:
    return resolve(str(checkpoint_path), None, None)


@pytest.fixture(scope="session")
def artifact(checkpoint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx_artifact(checkpoint_path, tmp_path_factory.mktemp("artifact") / "cpu")


@pytest.fixture
def broken(artifact: Path, tmp_path: Path) -> Broken:
    return Broken(artifact, tmp_path)


@pytest.fixture(scope="session")
def tokenizer_pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Kind of tokenizer -> folder of a checkpoint's files and of an artifact's."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_tokenizer_pair(kind, folder / kind) for kind in KINDS}
