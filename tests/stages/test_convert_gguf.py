"""The stage in recipes: what a plan refuses, and what a measurement says without llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phiconv import machine
from phiconv.checkpoint import Checkpoint
from phiconv.errors import PhiconvError
from phiconv.gates import judge
from phiconv.plan import Plan, make_plan
from phiconv.preflight import lacking
from phiconv.recipe.resolve import load
from phiconv.report.document import read_measurement
from phiconv.report.results import Validation
from phiconv.stages.reference import Reference, TokenSetParams
from phiconv.stages.stage import Artifact, StageContext
from phiconv.stages.validate import Validate, ValidateParams
from phiconv.workspace import Workspace
from tests.gguf.conversions import convert
from tests.phi3_checkpoints import write_phi3_checkpoint

SHORT = {"windows": 2, "window_length": 48}
RECIPE = """\
schema: 1
name: small
model: {source: model}
stages:
  - {id: gguf, uses: convert-gguf, with: {file_type: Q8_0}}
  - {id: check, uses: validate, with: {WITH}}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phi3_checkpoint(tmp_path_factory.mktemp("recipe") / "model")


def plan(checkpoint: Path, tmp_path: Path, **settings: Any) -> Plan:
    file = checkpoint.parent / "small.yaml"
    file.write_text(RECIPE.replace("{WITH}", json.dumps(settings)), encoding="utf-8")
    workspace = Workspace(tmp_path / "home")
    return make_plan(load(file), Checkpoint(checkpoint), workspace)


def measured(checkpoint: Path, tmp_path: Path, **settings: Any) -> Validation:
    """Runs the reference and the validation by hand."""
    opened = Checkpoint(checkpoint)
    convert(checkpoint, tmp_path / "gguf", "Q8_0")
    for name in ("reference", "measurement"):
        (tmp_path / name).mkdir()
    Reference().run(TokenSetParams(**SHORT), StageContext(tmp_path / "reference", (), opened))
    inputs = [
        Artifact("gguf", "gguf", "0" * 64, tmp_path / "gguf"),
        Artifact("reference", "reference", "1" * 64, tmp_path / "reference"),
    ]
    params = ValidateParams(runtime="llama.cpp", **SHORT, **settings)
    Validate().run(params, StageContext(tmp_path / "measurement", inputs, opened, threads=2))
    measurement = read_measurement(tmp_path / "measurement")
    return Validation("check", "gguf", measurement, judge(measurement, params.limits()))


def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LLAMA_CPP_BINDINGS", {"no-such-package": "1"})


def test_the_file_ships_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    found = plan(checkpoint, tmp_path, runtime="llama.cpp")
    assert [step.id for step in found.steps] == ["gguf", "reference", "check"]
    assert found.shipped == "gguf"
    gguf = found.step("gguf")
    assert gguf.estimate is not None
    weights = sum(info.nbytes for info in Checkpoint(checkpoint).tensors.values()) // 2
    assert gguf.estimate.disk_bytes == pytest.approx(weights * 8.5 / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "runtime onnxruntime does not run an artifact of kind gguf"),
        ({"runtime": "llama.cpp", "provider": "cuda"}, r"llama\.cpp has no provider cuda"),
        ({"runtime": "llama.cpp", "generate_tokens": 481}, "exceeds the model's context"),
    ],
)
def test_what_a_plan_refuses(
    settings: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(PhiconvError, match=message) as caught:
        plan(checkpoint, tmp_path, **settings)
    assert "small.yaml:6" in str(caught.value)


def test_an_onnx_artifact_does_not_run_on_llama_cpp() -> None:
    params = ValidateParams(runtime="llama.cpp")
    (error,) = Validate().check_inputs(params, ["onnx"])
    assert error.remedy == "set runtime: onnxruntime or onnxruntime-genai"
    assert Validate().check_inputs(params, ["gguf"]) == []


def test_everything_that_shapes_the_file_is_in_its_key(checkpoint: Path, tmp_path: Path) -> None:
    key = plan(checkpoint, tmp_path, runtime="llama.cpp").step("gguf").key
    for change in ("Q4_0", "Q8_0, name: Other", "Q8_0, file_name: other.gguf", "Q8_0, license: x"):
        text = RECIPE.replace("Q8_0", change).replace("{WITH}", "{runtime: llama.cpp}")
        (checkpoint.parent / "other.yaml").write_text(text, encoding="utf-8")
        recipe = load(checkpoint.parent / "other.yaml")
        other = make_plan(recipe, Checkpoint(checkpoint), Workspace(tmp_path / "home"))
        assert other.step("gguf").key != key


@pytest.mark.skipif(machine.llama_cpp_binding() is None, reason="llama.cpp is not installed")
def test_measured_on_llama_cpp(checkpoint: Path, tmp_path: Path) -> None:
    gates = {"kl_divergence.mean": {"max": 0.01}, "greedy_agreement": {"min": 0.5}}
    found = measured(checkpoint, tmp_path, gates=gates, generate_tokens=8)
    assert found.verdict == "passed on llama.cpp"
    assert {check.name: check.state for check in found.measurement.checks} == {
        "graph": "clean",
        "tokenizer": "clean",
        "chat template": "clean",
        "weights": "clean",
    }
    assert found.measurement.metrics["parity.tokenizer"] == 0
    assert "parity.genai_config" not in found.measurement.metrics


def test_without_llama_cpp_the_weights_are_measured_and_it_is_said(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama_cpp(monkeypatch)
    gates = {"kl_divergence.mean": {"max": 0.01}}
    found = measured(checkpoint, tmp_path, gates=gates, when_missing="fallback-cpu")
    assert found.verdict == (
        "passed on dequantized weights in PyTorch, target llama.cpp not present"
    )
    graph, *parity, weights = found.measurement.checks
    assert (graph.name, graph.state) == ("graph", "clean")
    assert (weights.name, weights.state) == ("weights", "clean")
    for check in parity:
        assert check.state == "not_checked"
        assert "what is measured is the weights, not the runtime" in check.summary
    assert "greedy_agreement" not in found.measurement.metrics


def test_without_llama_cpp_nothing_is_measured_where_the_recipe_says_so(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_llama_cpp(monkeypatch)
    found = measured(checkpoint, tmp_path, when_missing="skip")
    assert found.verdict == "not run, target llama.cpp not present"
    assert found.status == "not_run"


@pytest.mark.skipif(machine.llama_cpp_binding() is None, reason="llama.cpp is not installed")
def test_a_plan_without_llama_cpp(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = {
        name: plan(checkpoint, tmp_path, runtime="llama.cpp", when_missing=name).step("check")
        for name in ("require", "fallback-cpu")
    }
    without_llama_cpp(monkeypatch)
    required = plan(checkpoint, tmp_path, runtime="llama.cpp")
    assert [item.name for item in required.step("check").missing] == ["llama.cpp"]
    assert any("llama.cpp" in str(error) for error in lacking(required))
    replaced = plan(checkpoint, tmp_path, runtime="llama.cpp", when_missing="fallback-cpu")
    assert replaced.step("check").key != present["fallback-cpu"].key
    assert lacking(replaced) == []
