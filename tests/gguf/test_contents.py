from __future__ import annotations

import json
from pathlib import Path

import pytest

from phiconv.errors import StageError
from phiconv.gguf.contents import GgufSummary
from phiconv.inspect import inspect_folder, tensor_kinds
from phiconv.summary import inspection_text
from tests.gguf.conversions import convert
from tests.phi3_checkpoints import write_phi3_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scaling = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    source = write_phi3_checkpoint(tmp_path / "model", hidden_size=256, rope_scaling=scaling)
    facts = convert(source, tmp_path / "out", "Q4_K_M")
    (tmp_path / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    return tmp_path / "out"


def test_what_a_file_holds(folder: Path) -> None:
    found = inspect_folder(folder)
    assert isinstance(found, GgufSummary)
    assert found == inspect_folder(folder / "model.gguf")
    assert found.metadata["phi3.block_count"] == 2
    assert found.metadata["tokenizer.ggml.tokens"] == "352 values"
    assert len(found.metadata["tokenizer.chat_template"]) == 81
    assert found.dtypes["F32"][0] == 7
    formats = {(record.kind, record.format) for record in found.weights}
    assert {("lm_head", "Q6_K"), ("embedding", "Q4_K"), ("rotary", "F32")} <= formats
    bits = {(r.kind, r.format): r.bits for r in found.weights}
    assert bits["embedding", "Q4_K"] == 4.5
    assert 4.5 < found.bits_per_weight < 6.5625
    text = inspection_text(found)
    assert "GGUF file model.gguf" in text
    assert "bits a weight" in text


def test_the_stage_says_the_same_of_the_weights(folder: Path, tmp_path: Path) -> None:
    facts = json.loads((tmp_path / "facts.json").read_text("utf-8"))
    kinds = [(r.kind, r.format, r.parameters, r.size_bytes) for r in tensor_kinds(folder)]
    said = [tuple(record.values()) for record in facts["tensor_kinds"]]
    assert said == [record for record in kinds if record[0] != "rotary"]


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no")
    with pytest.raises(StageError, match="not a GGUF file"):
        inspect_folder(tmp_path)
