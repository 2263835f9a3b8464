from __future__ import annotations

import json
from pathlib import Path

import pytest

from phiconv.checkpoint import Checkpoint, resolve
from phiconv.onnx.target import Precision, Provider
from phiconv.parity.check import check_artifact
from tests.onnx_artifacts import write_onnx_artifact
from tests.parity.conftest import Broken
from tests.phi3_checkpoints import write_phi3_checkpoint

TINY_PHI3 = Path(__file__).parents[2] / "examples" / "tiny-phi3"
ERRORS = ("parity.tokenizer", "parity.template", "parity.genai_config")


@pytest.mark.parametrize(("provider", "precision"), [("cuda", "fp16"), ("dml", "fp16")])
def test_clean_artifact_of_another_provider(
    provider: Provider,
    precision: Precision,
    checkpoint_path: Path,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    artifact = write_onnx_artifact(checkpoint_path, tmp_path / provider, provider, precision)
    report = check_artifact(artifact, checkpoint, provider=provider)
    assert report.findings == ()
    assert report.passed


@pytest.mark.skipif(
    not (TINY_PHI3 / "model.safetensors").is_file(), reason="the example is not in this checkout"
)
def test_tiny_phi3_is_clean(tmp_path: Path) -> None:
    artifact = write_onnx_artifact(TINY_PHI3, tmp_path / "tiny")
    report = check_artifact(artifact, resolve(str(TINY_PHI3), None, None), provider="cpu")
    assert report.lines() == tuple(line for line in report.lines() if "warning: " in line)
    assert report.passed
    assert report.findings == ()
    assert report.tokenizer.tokens > 3000
    assert report.metrics()["parity.runtime_limitations"] == report.tokenizer.warning_count


def test_longrope_artifact_is_clean(tmp_path: Path) -> None:
    factors = [1.0 + index / 16 for index in range(16)]
    path = write_phi3_checkpoint(
        tmp_path / "checkpoint",
        max_position_embeddings=1024,
        rope_scaling={"type": "longrope", "short_factor": factors, "long_factor": factors},
    )
    artifact = write_onnx_artifact(path, tmp_path / "artifact")
    assert check_artifact(artifact, resolve(str(path), None, None)).findings == ()


def test_report_as_json(artifact: Path, checkpoint: Checkpoint) -> None:
    report = check_artifact(artifact, checkpoint, provider="cpu")
    document = json.loads(report.to_json())
    assert document["metrics"] == report.metrics()
    assert {document["metrics"][name] for name in ERRORS} == {0.0}
    assert document["tokenizer"]["texts"] == report.tokenizer.texts
    assert document["tokenizer"]["causes"]["encode: nul_ends_text"] == 3
    assert {"transformers", "tokenizers", "onnxruntime-genai"} <= set(document["versions"])


def test_each_fault_moves_its_metric(broken: Broken, checkpoint: Checkpoint) -> None:
    broken.edit("genai_config.json", lambda config: config["model"].update(eos_token_id=3))
    broken.edit("tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].pop(0))
    report = check_artifact(broken.path, checkpoint)
    assert not report.passed
    metrics = report.metrics()
    assert metrics["parity.genai_config"] == 2  # the eos id, and the merges
    assert metrics["parity.tokenizer"] > 0
    assert metrics["parity.template"] > 0
    lines = report.lines()
    assert lines[0].startswith("error: model.eos_token_id lacks 6 '<|end|>'")
    severities = [line.partition(":")[0] for line in lines]
    assert severities == sorted(severities)


def test_tokenizer_that_does_not_load_fails_every_metric(
    broken: Broken, checkpoint: Checkpoint
) -> None:
    (broken.path / "tokenizer.json").unlink()
    report = check_artifact(broken.path, checkpoint)
    assert {name: report.metrics()[name] for name in ERRORS} == dict.fromkeys(ERRORS, 1.0)
    assert report.lines()[0].startswith("error: ONNX Runtime GenAI cannot load the tokenizer")
    json.loads(report.to_json())


def test_report_does_not_depend_on_the_folder(
    artifact: Path, broken: Broken, checkpoint: Checkpoint
) -> None:
    here, there = check_artifact(artifact, checkpoint), check_artifact(broken.path, checkpoint)
    assert here.to_json() == there.to_json()
