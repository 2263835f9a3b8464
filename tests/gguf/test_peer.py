"""Files against those of llama.cpp's own converter and quantizer, recorded in peer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phiconv.gguf.file_types import FILE_TYPES
from tests.gguf.conversions import convert, metadata, tensors
from tests.gguf.peer_cases import (
    CASES,
    CHECKPOINTS,
    FILE,
    WEIGHTED,
    condensed,
    importance,
    summary,
    write_checkpoint,
)

RECORDED: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))

# Written here and not by the converter; docs/gguf.md says why.
ADDED = {
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.eot_token_id": 6,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: write_checkpoint(name, folder / name) for name in CHECKPOINTS}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_the_peers(case: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name, params = CASES[case]
    convert(checkpoints[name], tmp_path / "out", **params)
    found, expected = summary(tensors(tmp_path / "out")), RECORDED["tensors"][case]
    assert found["types"].split() == expected["types"].split()
    assert found["sha256"] == expected["sha256"]


@pytest.mark.parametrize("case", WEIGHTED)
def test_every_tensor_is_the_peers_with_an_importance_matrix(
    case: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    name, file_type = WEIGHTED[case]
    importance(checkpoints[name]).save(tmp_path / "imatrix.gguf")
    settings = {"file": str(tmp_path / "imatrix.gguf")}
    convert(checkpoints[name], tmp_path / "out", file_type, importance=settings)
    assert summary(tensors(tmp_path / "out")) == RECORDED["tensors"][case]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_metadata_is_the_peers_but_for_what_is_argued(
    name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    convert(checkpoints[name], tmp_path / "out", "Q4_K_M")
    found, expected = condensed(metadata(tmp_path / "out")), RECORDED["metadata"][name]
    assert {key: found.pop(key) for key in ADDED} == ADDED
    assert found.pop("general.file_type") == FILE_TYPES["Q4_K_M"].number
    assert expected.pop("general.file_type") == FILE_TYPES["F32"].number
    # this vocabulary strips nothing after special tokens, so the name must not say Phi-3
    assert (found.pop("general.name"), expected.pop("general.name")) == ("Phi", "Phi3")
    assert found == expected
