"""Fixtures for the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.toy_stages import Bench


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Phi-3 checkpoint with random weights."""
    return write_phi3_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def bench(tmp_path: Path, toy_checkpoint: Path) -> Bench:
    """A place to build recipes with toy stages."""
    return Bench(tmp_path, toy_checkpoint)
