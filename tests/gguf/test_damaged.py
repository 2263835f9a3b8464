"""Broken or odd checkpoints: an error that says what is wrong, or a fallback that is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.errors import CheckpointError
from phiconv.stages.convert_gguf import ConvertGguf, ConvertGgufParams
from phiconv.stages.stage import StageContext
from tests.gguf.conversions import convert, tensors
from tests.phi3_checkpoints import write_phi3_checkpoint


def test_a_truncated_shard(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model", shards=2)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "out")
    assert shard.name in str(caught.value)


def test_a_shard_truncated_after_it_was_opened(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model", shards=2)
    checkpoint = Checkpoint(folder)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    (tmp_path / "out").mkdir()
    context = StageContext(out=tmp_path / "out", inputs=[], checkpoint=checkpoint)
    with pytest.raises(CheckpointError) as caught:
        ConvertGguf().run(ConvertGgufParams(file_type="Q4_0"), context)
    assert shard.name in str(caught.value)


def test_a_missing_merge(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model")
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    del document["model"]["merges"][3]
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(CheckpointError, match="merges are missing: none makes 'in'") as caught:
        convert(folder, tmp_path / "out")
    assert caught.value.where == str(folder / "tokenizer.json")
    assert caught.value.remedy


def test_a_vocabulary_larger_than_the_embedding(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model")
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    document["added_tokens"].append({"id": 352, "content": "<|late|>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(CheckpointError, match="ids up to 352, the embedding ends at 351"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize("width", [96, 208, 100])
def test_rows_that_fit_no_block(width: int, tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model", intermediate_size=width)
    facts = convert(folder, tmp_path / "out", "Q4_K_M")
    kind, _, _ = tensors(tmp_path / "out")["blk.0.ffn_down.weight"]
    assert kind == ("Q5_0" if width % 32 == 0 else "F16")
    assert f"blk.0.ffn_down.weight: {kind} instead of" in facts["fallbacks"]


def test_heads_that_llama_cpp_does_not_lay_out(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model", head_dim=16)
    (error,) = ConvertGguf().check(ConvertGgufParams(file_type="F16"), Checkpoint(folder).config)
    assert "4 heads of 16 are not 128 wide" in error.message


def test_another_activation(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model", hidden_act="gelu")
    (error,) = ConvertGguf().check(ConvertGgufParams(file_type="F16"), Checkpoint(folder).config)
    assert "gelu" in error.message


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write_phi3_checkpoint(tmp_path / "model")
    context = StageContext(out=tmp_path / "missing", inputs=[], checkpoint=Checkpoint(folder))
    with pytest.raises(FileNotFoundError):
        ConvertGguf().run(ConvertGgufParams(file_type="Q4_0"), context)
