"""What a run of GitHub Actions shows of phiconv's errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.terminal import Terminal

RECIPE = """\
schema: 1
name: 100% odd, or not
model: {source: absent}
stages:
  - {id: onnx, uses: export-onx}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.yaml").write_text(RECIPE, encoding="utf-8")
    return "odd.yaml"


def test_each_error_is_shown_at_its_line(
    recipe: str, phiconv: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    done = phiconv("build", recipe)
    assert done.code == 2
    lines = [line for line in done.err.splitlines() if line.startswith("::")]
    assert lines[0].startswith("::error title=phiconv,file=odd.yaml,line=2::name: ")
    assert "100%25 odd" in lines[0]
    assert lines[1] == (
        "::error title=phiconv,file=odd.yaml,line=5::there is no stage 'export-onx'"
        "%0Aremedy: did you mean 'export-onnx'?"
    )
    assert len(lines) == 2


def test_elsewhere_there_are_none(
    recipe: str, phiconv: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert "::error" not in phiconv("build", recipe).err
