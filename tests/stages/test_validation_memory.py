"""The memory that a plan foretells of a validation, and what one takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phiconv.checkpoint import Checkpoint, ModelConfig
from phiconv.stages.convert_gguf import ConvertGgufParams
from phiconv.stages.export_onnx import ExportOnnxParams
from phiconv.stages.quantize import QuantizeParams
from phiconv.stages.stage import InputRef
from phiconv.stages.validate import Validate, ValidateParams
from tests.onnx_artifacts import write_onnx_artifact
from tests.phi3_checkpoints import write_phi3_checkpoint

TINY = Path(__file__).parent.parent.parent / "examples" / "tiny-phi3"
EXPORT = ("export-onnx", ExportOnnxParams(provider="cuda", precision="fp16"))
INT4 = ("quantize", QuantizeParams(bits=4, block_size=32))


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return Checkpoint(TINY).config


def memory(config: ModelConfig, *made_by: Any, kind: str = "onnx", **params: Any) -> int:
    artifact = InputRef("made", kind, "0" * 64, Path("not there"), made_by or (EXPORT, INT4))
    return Validate().estimate(ValidateParams(**params), config, (artifact,)).ram_bytes


def test_it_covers_what_a_validation_takes_and_little_more(tmp_path: Path) -> None:
    """A vocabulary so large that logits are half of it, in a process of its own."""
    checkpoint = write_phi3_checkpoint(tmp_path / "model", vocab_size=100_000)
    artifact = write_onnx_artifact(checkpoint, tmp_path / "onnx")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "phiconv", "validate", str(artifact), "--windows", "1"]
    command += ["--reference", str(checkpoint), "--out", str(out), "--threads", "1", "-q"]
    environment = {**os.environ, "PHICONV_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((out / "report.json").read_text(encoding="utf-8"))
    (stage,) = [item for item in document["result"]["stages"] if item["uses"] == "validate"]
    given = InputRef("artifact", "onnx", "0" * 64, artifact)
    found = Validate().estimate(ValidateParams(windows=1), Checkpoint(checkpoint).config, (given,))
    assert stage["peak_rss_bytes"] > 700_000_000, "the logits are there"
    assert 0.95 < found.ram_bytes / stage["peak_rss_bytes"] < 1.5
    assert stage["size_bytes"] == pytest.approx(found.disk_bytes, rel=0.3)


def test_logits_grow_with_the_window_and_hidden_states_with_all(config: ModelConfig) -> None:
    short, long = (memory(config, window_length=length) for length in (2048, 4096))
    assert long - short > 2048 * 4 * 2 * config.vocab_size
    more = memory(config, windows=16) - memory(config, windows=8)
    assert more == 8 * 512 * 4 * config.hidden_size


def test_probes_count_as_the_windows_they_are(config: ModelConfig) -> None:
    probed = memory(config, windows=1, length_probes=True)
    assert probed > memory(config, windows=1, window_length=2000)


def test_an_artifact_counts_by_its_format(config: ModelConfig) -> None:
    half, quarter = memory(config, EXPORT), memory(config, EXPORT, INT4)
    weights = sum(r * c for r, *rest in config.expected_tensors().values() for c in rest)
    body = weights - config.vocab_size * config.hidden_size
    assert half - quarter == pytest.approx(2 * body * (2 - 4.5 / 8), rel=0.05)
    eight, four = (
        memory(config, ("convert-gguf", ConvertGgufParams(file_type=name)), kind="gguf",
               runtime="llama.cpp")
        for name in ("Q8_0", "Q4_0")
    )  # fmt: skip
    assert eight - four == pytest.approx(2 * body * 4 / 8, rel=0.05)
