"""Metadata planted in the GGUF files of the example checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiconv.checkpoint import Checkpoint
from phiconv.diagnosis.gguf_lint import lint_gguf
from phiconv.errors import StageError
from phiconv.stages.checks import check_metadata
from tests.gguf.conversions import convert
from tests.gguf.rewriting import rewrite
from tests.phi3_checkpoints import write_phi3_checkpoint

FACTORS = {
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 512,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1 + i / 10 for i in range(32)],
        "long_factor": [2.0 + i for i in range(32)],
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LongRoPE and a head as wide as hidden_size / num_attention_heads."""
    folder = tmp_path_factory.mktemp("longrope") / "checkpoint"
    return write_phi3_checkpoint(folder, hidden_size=256, **FACTORS)


@pytest.fixture(scope="module")
def clean(checkpoint: Path) -> Path:
    convert(checkpoint, checkpoint.parent / "gguf", "Q8_0")
    (file,) = (checkpoint.parent / "gguf").glob("*.gguf")
    return file


def test_a_clean_file(checkpoint: Path, clean: Path) -> None:
    assert lint_gguf(clean, Checkpoint(checkpoint)) == []


def test_what_is_missing_takes_llama_cpps_default(
    checkpoint: Path, clean: Path, tmp_path: Path
) -> None:
    """Both are what the checkpoint has, too."""
    left_out = {"phi3.rope.freq_base": None, "phi3.rope.dimension_count": None}
    file = rewrite(clean, tmp_path / "x.gguf", metadata=left_out)
    assert lint_gguf(file, Checkpoint(checkpoint)) == []


@pytest.mark.parametrize(
    ("metadata", "component", "message"),
    [
        (
            {"phi3.rope.freq_base": 500.0},
            "self_attn.rotary",
            "rope.freq_base 500, the checkpoint has 10000",
        ),
        (
            {"phi3.rope.dimension_count": 16},
            "self_attn.rotary",
            "rope.dimension_count 16, the checkpoint has 64",
        ),
        (
            {"phi3.rope.scaling.attn_factor": None},
            "self_attn.rotary",
            "rope.scaling.attn_factor 1, the checkpoint has 1.105542",
        ),
        (
            {"phi3.rope.scaling.original_context_length": 2048},
            "self_attn.rotary",
            "rope.scaling.original_context_length 2048, the checkpoint has 512",
        ),
        (
            {"phi3.rope.scaling.type": "yarn"},
            "self_attn.rotary",
            "rope.scaling.type yarn, the checkpoint has none",
        ),
        (
            {"phi3.rope.scaling.factor": 2.0},
            "self_attn.rotary",
            "rope.scaling.factor 2, the checkpoint has none",
        ),
        (
            {"phi3.attention.layer_norm_rms_epsilon": 1e-6},
            "norms",
            "attention.layer_norm_rms_epsilon 1e-06, the checkpoint has 1e-05",
        ),
        (
            {"phi3.attention.head_count_kv": None},
            "self_attn.attention",
            "attention.head_count_kv 4, the checkpoint has 2",
        ),
        (
            {"phi3.attention.key_length": 32},
            "self_attn.attention",
            "attention.key_length 32, the checkpoint has 64",
        ),
        ({"phi3.feed_forward_length": 64}, "mlp", "feed_forward_length 64, the checkpoint has 256"),
        (
            {"phi3.embedding_length": None},
            "model",
            "embedding_length missing, the checkpoint has 256",
        ),
        (
            {"phi3.context_length": 65536},
            "model",
            "context_length 65536, the checkpoint has 2048",
        ),
        (
            {"tokenizer.ggml.padding_token_id": 7},
            "tokenizer",
            "tokenizer.ggml.padding_token_id 7, the checkpoint has 3",
        ),
        (
            {"tokenizer.ggml.eot_token_id": 7},
            "tokenizer",
            "tokenizer.ggml.eot_token_id 7, the checkpoint has 3 or 6",
        ),
        (
            {"tokenizer.ggml.eos_token_id": 7},
            "tokenizer",
            "tokenizer.ggml.eos_token_id 7, the checkpoint has 3 or 6",
        ),
        (
            {"tokenizer.ggml.bos_token_id": None},
            "tokenizer",
            "tokenizer.ggml.bos_token_id missing, the checkpoint has 1",
        ),
        (
            {"tokenizer.ggml.add_bos_token": True},
            "tokenizer",
            "tokenizer.ggml.add_bos_token true, the checkpoint has false",
        ),
        (
            {"general.architecture": "llama"},
            "model",
            "the architecture is llama, the checkpoint's is phi3",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_changes_the_result(
    checkpoint: Path,
    clean: Path,
    tmp_path: Path,
    metadata: dict[str, Any],
    component: str,
    message: str,
) -> None:
    if metadata.get("general.architecture"):
        metadata = {"llama.block_count": 2, **metadata}
    file = rewrite(clean, tmp_path / "x.gguf", metadata=metadata)
    (finding,) = lint_gguf(file, Checkpoint(checkpoint))
    assert (finding.severity, finding.component, finding.message) == ("error", component, message)
    assert finding.layers == ((0, 1) if component.startswith(("self_attn", "mlp")) else ())
    checked = check_metadata(file, Checkpoint(checkpoint))
    assert checked.counts == {"graph.faults": 1}
    assert message in checked.checks[0].findings[0]


@pytest.mark.parametrize("key", ["context_length", "attention.sliding_window"])
def test_what_changes_nothing_in_llama_cpp_is_a_warning(
    checkpoint: Path, clean: Path, tmp_path: Path, key: str
) -> None:
    file = rewrite(clean, tmp_path / "x.gguf", metadata={f"phi3.{key}": 77})
    (finding,) = lint_gguf(file, Checkpoint(checkpoint))
    assert finding.severity == "warning"
    assert check_metadata(file, Checkpoint(checkpoint)).counts == {"graph.faults": 0}


def test_longropes_factors(checkpoint: Path, clean: Path, tmp_path: Path) -> None:
    long = np.array(FACTORS["rope_scaling"]["long_factor"], np.float32)  # type: ignore[index]
    cases: dict[str, dict[str, np.ndarray | None]] = {
        "rope_factors_long.weight: factor 3 is 9, the checkpoint has 5": {
            "rope_factors_long.weight": np.where(np.arange(32) == 3, np.float32(9), long)
        },
        "rope_factors_short.weight: 8 factors, the checkpoint has 32": {
            "rope_factors_short.weight": long[:8]
        },
        "LongRoPE's factors rope_factors_short.weight are missing": {
            "rope_factors_short.weight": None
        },
    }
    for number, (message, tensors) in enumerate(cases.items()):
        file = rewrite(clean, tmp_path / f"{number}.gguf", tensors=tensors)
        (finding,) = lint_gguf(file, Checkpoint(checkpoint))
        assert (finding.severity, finding.message) == ("error", message)
        assert finding.component == "self_attn.rotary"


def test_a_bias_that_should_not_be(checkpoint: Path, clean: Path, tmp_path: Path) -> None:
    bias = {"blk.0.attn_output.bias": np.ones(256, np.float32)}
    file = rewrite(clean, tmp_path / "x.gguf", tensors=bias)
    (finding,) = lint_gguf(file, Checkpoint(checkpoint))
    assert finding.message == "the checkpoint has nothing like blk.0.attn_output.bias"


def test_a_file_that_is_cut_off(checkpoint: Path, clean: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(clean.read_bytes()[:-1000])
    with pytest.raises(StageError, match="not a sound GGUF file"):
        lint_gguf(file, Checkpoint(checkpoint))
    assert check_metadata(file, Checkpoint(checkpoint)).checks[0].state == "not_checked"
