from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from phiconv.errors import CheckpointError
from phiconv.parity.genai import GenAITokenizer
from phiconv.parity.golden import golden_texts
from phiconv.parity.tokenizer import tokenizer_parity
from tests.parity.conftest import Broken
from tests.parity.tokenizers import KINDS


def test_clean_artifact_has_no_error(artifact: Path, checkpoint_path: Path) -> None:
    result = tokenizer_parity(artifact, checkpoint_path)
    assert result.failure is None
    assert result.error_count == 0
    assert result.texts == len(golden_texts())
    assert result.tokens > 100
    # a C string ends at NUL: three golden texts, and no other, have other ids
    assert result.causes["encode: nul_ends_text"] == 3
    assert result.warning_count == 3


@pytest.mark.parametrize("kind", KINDS)
def test_differences_with_published_pipelines_are_all_explained(
    kind: str, tokenizer_pairs: dict[str, tuple[Path, Path]]
) -> None:
    checkpoint, artifact = tokenizer_pairs[kind]
    result = tokenizer_parity(artifact, checkpoint)
    assert result.failure is None
    assert result.error_count == 0, [str(difference) for difference in result.differences]
    assert result.warning_count > 3


def test_removed_merge_is_the_artifacts_fault(broken: Broken, checkpoint_path: Path) -> None:
    def remove_merge(tokenizer: dict) -> None:
        tokenizer["model"]["merges"].remove(["h", "e"])

    result = tokenizer_parity(broken.edit("tokenizer.json", remove_merge), checkpoint_path)
    assert result.error_count > 10
    first = result.differences[0]
    assert (first.severity, first.cause, first.operation) == ("error", "artifact", "encode")
    assert first.name == "plain.word"
    assert first.text == "hello"
    assert first.index == 0
    assert first.expected_pieces[0] == "he"
    assert first.found_pieces[:2] == ("h", "e")
    assert "plain.word 'hello' differs from id 0 (artifact)" in str(first)


def test_ordinary_flag_of_a_control_token_is_the_artifacts_fault(
    broken: Broken, checkpoint_path: Path
) -> None:
    def make_ordinary(tokenizer: dict) -> None:
        end = next(t for t in tokenizer["added_tokens"] if t["content"] == "<|end|>")
        end["special"] = False

    result = tokenizer_parity(broken.edit("tokenizer.json", make_ordinary), checkpoint_path)
    assert {d.cause for d in result.differences if d.severity == "error"} == {"artifact"}
    printed = next(d for d in result.differences if d.name == "special_token.glued")
    assert printed.operation == "decode"
    assert "<|end|>" in printed.found
    assert "<|end|>" not in printed.expected


def test_swapped_entries_of_the_vocabulary_are_found_in_the_sweep(
    broken: Broken, checkpoint_path: Path
) -> None:
    # bytes that no golden text has next to anything that could tell them apart
    def swap(tokenizer: dict) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["Q"], vocabulary["Z"] = vocabulary["Z"], vocabulary["Q"]

    result = tokenizer_parity(broken.edit("tokenizer.json", swap), checkpoint_path)
    names = {difference.name for difference in result.differences}
    assert any(name.startswith("token.") for name in names)
    assert result.error_count > 2


def test_new_fault_of_the_runtime_is_an_error(
    artifact: Path, checkpoint_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, decode = GenAITokenizer.encode, GenAITokenizer.decode

    def encode_with_bos(self: GenAITokenizer, text: str) -> list[int]:
        ids = encode(self, text)
        return [1, *ids] if text == "hello" else ids

    def decode_without_accents(self: GenAITokenizer, ids: Sequence[int]) -> str:
        return decode(self, ids).replace("\u00e9", "e")

    monkeypatch.setattr(GenAITokenizer, "encode", encode_with_bos)
    monkeypatch.setattr(GenAITokenizer, "decode", decode_without_accents)
    result = tokenizer_parity(artifact, checkpoint_path)
    assert result.causes["encode: unexplained"] == 1
    assert result.causes["decode: unexplained"] > 3
    hello = next(d for d in result.differences if d.name == "plain.word")
    assert hello.found[0] == 1
    assert hello.severity == "error"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "genai_config.json"])
def test_tokenizer_that_does_not_load_is_a_failure(
    name: str, broken: Broken, checkpoint_path: Path
) -> None:
    (broken.path / name).unlink()
    result = tokenizer_parity(broken.path, checkpoint_path)
    assert result.failure is not None
    assert name in result.failure
    assert result.texts == 0


def test_weights_are_not_needed(broken: Broken, checkpoint_path: Path) -> None:
    for file in broken.path.glob("model.onnx*"):
        file.unlink()
    assert tokenizer_parity(broken.path, checkpoint_path).error_count == 0


def test_folder_may_have_any_name(artifact: Path, checkpoint_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "caf\u00e9 \u65e5\u672c"
    shutil.copytree(artifact, folder)
    assert tokenizer_parity(folder, checkpoint_path).error_count == 0


def test_checkpoint_without_tokenizer_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        tokenizer_parity(artifact, tmp_path)
