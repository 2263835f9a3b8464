"""Recipes of Phi-4-mini on trained weights that have its peculiarities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phiconv import machine
from tests.test_tiny_phi3_builds import ROOT, phiconv

TINY = ROOT / "examples" / "tiny-phi4-mini"
RECIPES = ROOT / "recipes" / "phi-4-mini-instruct"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def build(recipe: str, out: Path, home: Path) -> dict[str, Any]:
    file = RECIPES / f"{recipe}.yaml"
    phiconv("build", str(file), "--model", str(TINY), "--out", str(out), home=home)
    report = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    (validation,) = report["result"]["validations"]
    return {**validation["measurement"], "status": report["status"], "result": report["result"]}


@pytest.mark.parametrize(
    "recipe",
    ["cpu-int4-rtn-block-32-acc-level-4", "gpu-int4-rtn-block-32", "gguf-q4", "gguf-fp16"],
)
def test_it_passes_its_gates(recipe: str, tmp_path: Path, home: Path) -> None:
    if recipe.startswith("gguf") and machine.llama_cpp_binding() is None:
        pytest.skip("no package that carries llama.cpp is installed")
    found = build(recipe, tmp_path / "out", home)
    assert found["status"] == "passed"
    (limit,) = found["known_limits"]
    assert limit["from_position"] == (0 if recipe.startswith("gguf") else 1024)
    prefill, decoding = found["length_probes"]
    assert not prefill["departs"]
    if decoding["departs"]:
        assert decoding["limit"] == limit["statement"]
    kinds = {kind["kind"] for kind in found["result"]["tensor_kinds"]}
    assert "lm_head" not in kinds, "a tied embedding is stored once"
