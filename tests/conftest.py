"""Fixtures for the tests of the engine and of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.terminal import Terminal
from tests.toy_stages import Bench


@pytest.fixture(scope="session")
def toy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Phi-3 checkpoint with random weights."""
    return write_phi3_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def bench(tmp_path: Path, toy_checkpoint: Path) -> Bench:
    """A place to build recipes with toy stages."""
    return Bench(tmp_path, toy_checkpoint)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a module's commands."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def phiconv(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Terminal]:
    """The command line, offline, in the module's workspace."""
    monkeypatch.setenv("PHICONV_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)  # it adds lines for annotations
    yield Terminal(capsys)


@pytest.fixture(scope="session")
def release_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of the builds that are released."""
    return tmp_path_factory.mktemp("release-home")


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory, release_home: Path) -> dict[str, Path]:
    """The outputs of three recipes, by recipe; fp16-cuda was run on the CPU."""
    from tests.release.builds import CPU, FP16, GGUF, build, licensed_checkpoint

    folder = tmp_path_factory.mktemp("release-builds")
    checkpoint = licensed_checkpoint(folder / "Phi-3-tiny")
    return build((CPU, GGUF, FP16), checkpoint, folder / "dist", release_home)


@pytest.fixture(scope="session")
def released(
    tmp_path_factory: pytest.TempPathFactory, dist: dict[str, Path], release_home: Path
) -> Path:
    """A release of all three."""
    from tests.release.builds import release

    return release(
        list(dist.values()),
        tmp_path_factory.mktemp("released") / "release",
        release_home,
        allow=("not-run:cuda",),
        base_model="microsoft/Phi-3-mini-4k-instruct",
    )
