from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from phiconv.errors import CheckpointError, ExportError, StageError
from phiconv.onnx.cast import cast_graph
from phiconv.onnx.graph import OnnxGraph
from phiconv.onnx.quantize import Target, quantize_graph
from phiconv.onnx.weights import Dense
from tests.onnx.builder_oracle import build_with_builder
from tests.onnx.models import (
    assert_same_initializers,
    initializers,
    lay_out,
    onnx_logits,
    write,
)
from tests.onnx.test_builder_contract import IDS, operators
from tests.phi3_checkpoints import write_phi3_checkpoint


def target(**changes: object) -> Target:
    defaults = {
        "bits": 4,
        "block_size": 32,
        "symmetric": True,
        "search": "none",
        "accuracy_level": 0,
    }
    return Target(**(defaults | changes))  # type: ignore[arg-type]


def quantize_all(graph: OnnxGraph, wanted: Target) -> None:
    quantize_graph(graph, lambda weight: None if weight.role == "embedding" else wanted)


@pytest.mark.parametrize(
    ("provider", "precision", "symmetric", "block_size"),
    [
        ("cpu", "fp32", True, 32),
        ("cpu", "fp32", False, 64),
        ("cuda", "fp16", True, 32),
        ("dml", "fp16", False, 128),
    ],
)
def test_int4_bytes_equal_the_builders(
    tmp_path: Path, provider: str, precision: str, symmetric: bool, block_size: int
) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    graph = lay_out(path, tmp_path, provider, precision)  # type: ignore[arg-type]
    quantize_all(graph, target(symmetric=symmetric, block_size=block_size, accuracy_level=4))
    write(graph, path, tmp_path / "ours")
    theirs = build_with_builder(
        path,
        tmp_path / "theirs",
        "int4",
        provider,
        f"is_symmetric={str(symmetric).lower()}",
        f"block_size={block_size}",
        "accuracy_level=4",
    )
    assert_same_initializers(initializers(tmp_path / "ours"), initializers(theirs))
    assert sorted(operators(tmp_path / "ours")) == sorted(operators(theirs))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 256])
def test_quantized_model_runs_and_stays_close(
    tmp_path: Path, bits: int, symmetric: bool, block_size: int
) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    graph = lay_out(path, tmp_path)
    write(graph, path, tmp_path / "float")
    graph = lay_out(path, tmp_path / "again")
    quantize_all(graph, target(bits=bits, symmetric=symmetric, block_size=block_size))
    write(graph, path, tmp_path / "int")
    exact, rounded = onnx_logits(tmp_path / "float", IDS), onnx_logits(tmp_path / "int", IDS)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < error < (0.02 if bits == 8 else 0.35)


def test_embedding_becomes_a_block_quantized_gather(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    graph = lay_out(path, tmp_path)
    write(graph, path, tmp_path / "float")
    graph = lay_out(path, tmp_path / "again")
    done = quantize_graph(
        graph, lambda weight: target(bits=8) if weight.role == "embedding" else None
    )
    assert list(done) == ["model.embed_tokens.weight"]
    write(graph, path, tmp_path / "int")
    assert ("com.microsoft", "GatherBlockQuantized") in operators(tmp_path / "int")
    exact, rounded = onnx_logits(tmp_path / "float", IDS), onnx_logits(tmp_path / "int", IDS)
    assert 0 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.02


def test_weights_that_cannot_be_quantized_are_named(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    name = "model.layers.0.mlp.down_proj.MatMul.weight"

    graph = lay_out(path, tmp_path)
    (node,) = (node for node in graph.model.graph if name in [i.name for i in node.inputs if i])
    graph.model.graph.append(ir.Node("", "MatMul", node.inputs, name="again"))
    with pytest.raises(ExportError, match=f"{name} is shared by several nodes"):
        quantize_all(graph, target())

    graph = lay_out(path, tmp_path / "other")
    expr = graph.weights[name]
    assert isinstance(expr, Dense)
    graph.weights[name] = replace(expr, transposed=False)
    with pytest.raises(ExportError, match=rf"{name} is not stored as \[N, K\]"):
        quantize_all(graph, target())

    graph = lay_out(path, tmp_path / "another")
    with pytest.raises(ExportError, match="width 128 is not a multiple of block_size 256"):
        quantize_graph(graph, lambda weight: target(block_size=256))


def test_a_graph_survives_saving_between_stages(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    direct = lay_out(path, tmp_path)
    saved = tmp_path / "saved"
    saved.mkdir()
    direct.save(saved)
    loaded = OnnxGraph.load(saved)
    assert loaded.weights == direct.weights
    for graph in (direct, loaded):
        quantize_all(graph, target())
    write(direct, path, tmp_path / "a")
    write(loaded, path, tmp_path / "b")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bytes_do_not_depend_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phiconv.onnx import writer

    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    written = []
    for threads, chunk, strip in ((1, 2 << 20, 64 << 20), (4, 5_000, 9_000)):
        monkeypatch.setattr(writer, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(writer, "STRIP_BYTES", strip)
        graph = lay_out(path, tmp_path / str(threads))
        quantize_graph(graph, lambda w: target(symmetric=False) if "mlp" in w.name else None)
        result = write(graph, path, tmp_path / f"onnx{threads}", threads)
        written.append((result.data_sha256, (tmp_path / f"onnx{threads}/model.onnx").read_bytes()))
    assert written[0] == written[1]


def test_cast_equals_an_fp16_export(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    cast = lay_out(path, tmp_path, "cpu", "fp32")
    assert cast_graph(cast, overflow="error") > 0
    write(cast, path, tmp_path / "cast")
    exported = lay_out(path, tmp_path, "cuda", "fp16")
    write(exported, path, tmp_path / "export")
    assert operators(tmp_path / "cast") == operators(tmp_path / "export")
    ours, expected = initializers(tmp_path / "cast"), initializers(tmp_path / "export")
    assert {n: a.tobytes() for n, a in ours.items()} == {
        n: a.tobytes() for n, a in expected.items()
    }
    np.testing.assert_array_equal(
        onnx_logits(tmp_path / "cast", IDS), onnx_logits(tmp_path / "export", IDS)
    )


def test_a_quantized_graph_is_not_cast(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    graph = lay_out(path, tmp_path)
    quantize_all(graph, target())
    with pytest.raises(ExportError, match="before the quantize stage"):
        cast_graph(graph, overflow="error")


def poison(path: Path, tensor: str, value: float) -> None:
    """Overwrite one element of a bf16 tensor in model.safetensors."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    flat = tensors[tensor].reshape(-1)
    flat[len(flat) // 2] = ml_dtypes.bfloat16(value)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    "tensor",
    ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_nan_and_inf_are_named(tmp_path: Path, value: float, quantized: bool, tensor: str) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    poison(path, tensor, value)
    graph = lay_out(path, tmp_path)
    if quantized:
        quantize_all(graph, target())
    with pytest.raises(CheckpointError, match=f"NaN or Inf in {tensor}"):
        write(graph, path, tmp_path / "onnx")


def test_weights_beyond_fp16_are_named_or_clamped(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    poison(path, "model.layers.0.self_attn.o_proj.weight", 1e5)
    poison(path, "model.norm.weight", -7e4)
    graph = lay_out(path, tmp_path, "cuda", "fp16")
    with pytest.raises(StageError, match=r"model\.layers\.0\.self_attn\.o_proj.*model\.norm"):
        write(graph, path, tmp_path / "error")
    graph = lay_out(path, tmp_path / "again", "cpu", "fp32")
    cast_graph(graph, overflow="clamp")
    write(graph, path, tmp_path / "clamped")
    arrays = initializers(tmp_path / "clamped")
    assert arrays["model.layers.0.attn.o_proj.MatMul.weight"].max() == 65504
    assert arrays["model.layers.2.final_norm_layernorm.weight"].min() == -65504
    graph = lay_out(path, tmp_path / "int4", "cuda", "fp16")
    quantize_all(graph, target())
    with pytest.raises(StageError, match=r"o_proj"):
        write(graph, path, tmp_path / "int4-error")
