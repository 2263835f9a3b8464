"""The CUDA recipes on a CUDA device, as a user builds them; run with `pytest -m gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phiconv import machine
from phiconv.runtimes.device import cuda_device
from phiconv.runtimes.placement import does_the_work
from phiconv.runtimes.session import start_problem
from tests.terminal import Terminal

ROOT = Path(__file__).parent.parent
TINY = ROOT / "examples" / "tiny-phi3"

pytestmark = pytest.mark.gpu


def build(phiconv: Terminal, recipe: str, out: Path, *settings: str) -> dict[str, Any]:
    """Builds where a missing provider is an error; returns the one validation of the report."""
    options = [option for text in settings for option in ("--set", text)]
    done = phiconv(
        "build", str(ROOT / "recipes" / f"{recipe}.yaml"), "--model", str(TINY), "--out", str(out),
        "--set", "check.when_missing=require", *options,
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    assert "passed on CUDAExecutionProvider" in done.out
    document = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    (validation,) = document["result"]["validations"]
    return dict(validation)


def test_the_provider_starts() -> None:
    assert start_problem(machine.CUDA) is None


def test_doctor_names_the_device(phiconv: Terminal) -> None:
    findings = {item["name"]: item for item in json.loads(phiconv("doctor", "--json").out)}
    assert findings[machine.CUDA]["ok"] is True
    device = cuda_device()
    assert device is not None
    assert findings[machine.CUDA]["value"] == f"usable, {device[0]}, driver {device[1]}"


@pytest.mark.parametrize("recipe", ["fp16-cuda", "int4-cuda"])
def test_a_recipe_runs_on_cuda(recipe: str, phiconv: Terminal, tmp_path: Path) -> None:
    validation = build(phiconv, recipe, tmp_path / "out")
    measurement = validation["measurement"]
    provenance = measurement["provenance"]
    assert (provenance["device"], provenance["driver"]) == cuda_device()
    assert provenance["strays"] == []
    assert measurement["metrics"]["placement.fallback"] == 0
    assert len(measurement["layers"]) == 5, measurement["layers_note"]
    elsewhere = {
        operator
        for provider, operators in provenance["placement"].items()
        for operator in operators
        if provider != machine.CUDA
    }
    assert not [operator for operator in elsewhere if does_the_work(operator)]
    work = provenance["placement"][machine.CUDA]
    assert work["GroupQueryAttention"] == 4
    # qkv, o, gate, up and down of four layers, and the head
    assert work.get("MatMulNBits", 0) + work.get("MatMul", 0) == 4 * 5 + 1


def test_cuda_computes_what_the_cpu_does(phiconv: Terminal, tmp_path: Path) -> None:
    build(phiconv, "int4-cuda", tmp_path / "cuda")
    done = phiconv(
        "validate", str(tmp_path / "cuda" / "artifact"), "--reference", str(TINY),
        "--out", str(tmp_path / "cpu"),
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    done = phiconv("compare", str(tmp_path / "cpu"), str(tmp_path / "cuda"), "--json")
    assert done.code == 0, done.out + done.err
    (pair,) = json.loads(done.out)["pairs"]
    assert pair["errors"]["kind"] == "paired"
    rows = {row["metric"]: row for row in pair["metrics"]}
    assert abs(rows["kl_divergence.mean"]["difference"]) < 1e-3


def test_genai_decodes_on_cuda(phiconv: Terminal, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    if not og.is_cuda_available():
        pytest.skip("the installed onnxruntime-genai was built for the CPU")
    validation = build(phiconv, "fp16-cuda", tmp_path, "check.runtime=onnxruntime-genai")
    metrics = validation["measurement"]["metrics"]
    assert metrics["decode_error.max"] < 0.5
    assert metrics["greedy_agreement"] > 0.9


def test_the_reference_may_be_computed_on_cuda(phiconv: Terminal, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("the installed PyTorch has no CUDA")
    validation = build(phiconv, "fp16-cuda", tmp_path, "check.reference_device=cuda")
    assert validation["measurement"]["metrics"]["kl_divergence.mean"] < 1e-4
