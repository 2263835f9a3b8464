"""What phiconv relies on in the GenAI model builder, checked against the builder itself."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from phiconv import machine
from phiconv.errors import EnvironmentLacksError, ExportError
from phiconv.onnx.builder import LazyWeight
from phiconv.onnx.weights import Dense, Rows
from tests.onnx.models import hugging_face_logits, initializers, lay_out, onnx_logits, write
from tests.phi3_checkpoints import write_phi3_checkpoint

IDS = np.random.default_rng(0).integers(10, 300, 48)


def build_with_builder(path: Path, out: Path, precision: str, provider: str, *options: str) -> Path:
    """The peer's own export, through its documented entry points."""
    import onnxruntime_genai.models  # noqa: F401
    from builder import create_model, parse_extra_options

    cache = str(out.parent / "cache")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        arguments = ("", str(path), str(out), precision, provider, cache)
        parsed = parse_extra_options(*arguments, list(options))
        create_model(*arguments, **parsed)
    return out


def operators(folder: Path) -> list[tuple[str, str]]:
    return [(node.domain, node.op_type) for node in ir.load(folder / "model.onnx").graph]


@pytest.mark.parametrize(
    ("provider", "precision"), [("cpu", "fp32"), ("cuda", "fp16"), ("dml", "fp16")]
)
def test_same_graph_weights_and_genai_files_as_the_builder(
    tmp_path: Path, provider: str, precision: str
) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    graph = lay_out(path, tmp_path, provider, precision)  # type: ignore[arg-type]
    write(graph, path, tmp_path / "ours")
    theirs = build_with_builder(path, tmp_path / "theirs", precision, provider)

    assert operators(tmp_path / "ours") == operators(theirs)
    ours, expected = initializers(tmp_path / "ours"), initializers(theirs)
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert ours[name].dtype == array.dtype, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    genai = graph.genai
    assert genai is not None
    names = sorted(file.name for file in genai.iterdir())
    assert "genai_config.json" in names
    assert names == sorted(f.name for f in theirs.iterdir() if "model.onnx" not in f.name)
    for name in names:
        assert (genai / name).read_text() == (theirs / name).read_text(), name


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {"sliding_window": 16},
        {"partial_rotary_factor": 0.5},
        {"partial_rotary_factor": 0.75},
    ],
    ids=lambda overrides: next(iter(overrides), "gqa"),
)
def test_fp32_logits_equal_hugging_face(tmp_path: Path, overrides: dict[str, object]) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="f32", **overrides)
    graph = lay_out(path, tmp_path)
    write(graph, path, tmp_path / "onnx")
    difference = onnx_logits(tmp_path / "onnx", IDS) - hugging_face_logits(path, IDS)
    assert np.abs(difference).max() <= 1e-4


def test_the_builder_itself_leaves_the_sliding_window_out(tmp_path: Path) -> None:
    """Why phiconv sets it; when this fails, the builder has learned it."""
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="f32", sliding_window=16)
    theirs = build_with_builder(path, tmp_path / "theirs", "fp32", "cpu")
    difference = np.abs(onnx_logits(theirs, IDS) - hugging_face_logits(path, IDS)).max(axis=1)
    assert difference[:16].max() <= 1e-4
    assert difference[16:].min() > 1e-3


def test_gate_up_as_wide_as_the_vocabulary_is_not_the_head(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="f32", intermediate_size=176)
    config = json.loads((path / "config.json").read_text())
    assert 2 * config["intermediate_size"] == config["vocab_size"]
    graph = lay_out(path, tmp_path)
    write(graph, path, tmp_path / "onnx")
    expected = hugging_face_logits(path, IDS)
    assert np.abs(onnx_logits(tmp_path / "onnx", IDS) - expected).max() <= 1e-4
    assert graph.weights["lm_head.MatMul.weight"] == Dense(
        (Rows("lm_head.weight", 0, config["vocab_size"]),), transposed=True
    )


def test_rotary_width_that_the_fused_operator_cannot_run_is_exported_unfused(
    tmp_path: Path,
) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", partial_rotary_factor=0.75)
    unfused = lay_out(path, tmp_path / "a")
    assert any(node.op_type == "RotaryEmbedding" for node in unfused.model.graph)
    path = write_phi3_checkpoint(tmp_path / "fits", partial_rotary_factor=0.5)
    fused = lay_out(path, tmp_path / "b")
    assert not any(node.op_type == "RotaryEmbedding" for node in fused.model.graph)


def test_an_untraced_operation_on_a_weight_is_an_error() -> None:
    weight = LazyWeight((4, 2), (Rows("w", 0, 4),))
    with pytest.raises(ExportError, match="applies stack"):
        torch.stack([weight, weight])  # type: ignore[list-item]
    with pytest.raises(ExportError, match="adds 1"):
        weight + 1
    with pytest.raises(ExportError, match="reshapes"):
        weight.reshape(2, 4)


def test_concatenated_rows_of_one_tensor_are_one_range() -> None:
    parts = [LazyWeight((2, 3), (Rows("w", 2 * i, 2 * i + 2),)) for i in range(3)]
    joined = torch.cat(parts, dim=0)  # type: ignore[call-overload]
    assert joined == LazyWeight((6, 3), (Rows("w", 0, 6),))
    assert joined.T.shape == (3, 6)


def test_another_series_of_the_builder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(machine, "version", lambda name: "0.14.1")
    with pytest.raises(EnvironmentLacksError, match=r"needs the model builder .* 0\.18"):
        lay_out(path, tmp_path)
