"""ONNX graphs whose weights are read through an overlay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiconv.checkpoint.overlaid import OverlaidCheckpoint
from phiconv.checkpoint.overlay import Overlay
from phiconv.checkpoint.weight_source import Grid
from phiconv.errors import ExportError, StageError
from phiconv.onnx.graph import OnnxGraph
from phiconv.onnx.quantize import Target, quantize_graph
from phiconv.onnx.writer import write_model
from phiconv.stages.stage import SilentProgress
from tests.onnx.models import initializers, lay_out, onnx_logits, open_checkpoint, write
from tests.onnx.test_builder_contract import IDS
from tests.overlays import quantized, random_overlay, write_codes
from tests.phi3_checkpoints import write_phi3_checkpoint

GRID = Grid(bits=4, group_size=32, symmetric=False)
QKV = "model.layers.0.self_attn.qkv_proj.weight"
GATE_UP = "model.layers.1.mlp.gate_up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def write_overlaid(
    graph: OnnxGraph, path: Path, overlay: Overlay, folder: Path, threads: int = 2
) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    source = OverlaidCheckpoint(open_checkpoint(path), overlay, clip=False)
    write_model(graph, source, folder, threads=threads, progress=SilentProgress())
    return initializers(folder)


def quantize_body(graph: OnnxGraph, grid: Grid, rounded: Any = None, other: str = "-") -> None:
    target = Target(grid.bits, grid.group_size, grid.symmetric, "none", 0)
    coarse = replace(target, block_size=64)

    def choose(weight: Any) -> Target | None:
        if weight.role != "body":
            return None
        return coarse if other in weight.name else target

    quantize_graph(graph, choose, rounded)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": True},
        {"partial_rotary_factor": 0.5, "hidden_size": 256},
    ],
    ids=["gqa", "mha", "tied", "partial-rotary"],
)
@pytest.mark.parametrize("provider", ["cpu", "dml"])
def test_scales_alone_change_no_logit(
    tmp_path: Path, config: dict[str, Any], provider: str
) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="f32", **config)
    overlay = random_overlay(open_checkpoint(path), GRID)
    precision = "fp32" if provider == "cpu" else "fp16"
    plain = lay_out(path, tmp_path, provider, precision)  # type: ignore[arg-type]
    write(plain, path, tmp_path / "plain")
    scaled = lay_out(path, tmp_path / "again", provider, precision)  # type: ignore[arg-type]
    arrays = write_overlaid(scaled, path, overlay, tmp_path / "scaled")
    before = initializers(tmp_path / "plain")
    changed = {name for name in before if before[name].tobytes() != arrays[name].tobytes()}
    assert len(changed) >= 2 * 6  # per layer 2 norms, and at least 4 matrices
    exact = onnx_logits(tmp_path / "plain", IDS)
    found = onnx_logits(tmp_path / "scaled", IDS)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < (2e-6 if provider == "cpu" else 4e-3)


def test_weights_are_clipped_on_the_overlays_grid_only(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    checkpoint = open_checkpoint(path)
    overlay = random_overlay(checkpoint, GRID)
    graph = lay_out(path, tmp_path)
    quantize_body(graph, GRID, other="down_proj")
    arrays = write_overlaid(graph, path, overlay, tmp_path / "onnx")
    clipped = OverlaidCheckpoint(checkpoint, overlay, clip=True)
    scaled = OverlaidCheckpoint(checkpoint, overlay, clip=False)

    name = "model.layers.0.attn.qkv_proj.MatMul.weight"
    packed, scales, zero_points = quantized(clipped.read(QKV), GRID, np.float32)
    assert zero_points is not None
    np.testing.assert_array_equal(arrays[f"{name}_Q4"], packed)
    np.testing.assert_array_equal(arrays[f"{name}_scales"], scales.reshape(-1))
    np.testing.assert_array_equal(arrays[f"{name}_zero_points"], zero_points.reshape(-1))

    name = "model.layers.1.mlp.down_proj.MatMul.weight"
    other = quantized(scaled.read(DOWN), GRID._replace(group_size=64), np.float32)
    np.testing.assert_array_equal(arrays[f"{name}_Q4"], other[0])
    norm = "model.layers.0.input_layernorm.weight"
    np.testing.assert_array_equal(arrays[norm], scaled.read(norm))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("provider", "dtype"), [("cpu", np.float32), ("dml", np.float16)])
def test_codes_are_copied(tmp_path: Path, provider: str, dtype: type, symmetric: bool) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    checkpoint = open_checkpoint(path)
    grid = GRID._replace(symmetric=symmetric)
    overlay = replace(random_overlay(checkpoint, grid, clip=False), rounding="gptq")
    write_codes(tmp_path, checkpoint, overlay)
    overlay.write(tmp_path)
    overlay = Overlay.load(tmp_path)
    graph = lay_out(path, tmp_path, provider, "fp32" if provider == "cpu" else "fp16")  # type: ignore[arg-type]
    assert overlay.rounded is not None
    quantize_body(graph, grid, overlay.rounded.tensors, other="down_proj")
    assert graph.count_copied() == 2 * (4 if provider == "cpu" else 6)
    arrays = write_overlaid(graph, path, overlay, tmp_path / "onnx")
    source = OverlaidCheckpoint(checkpoint, overlay, clip=False)

    def stored(tensor: str, start: int, stop: int) -> list[np.ndarray]:
        codes, scales, zero_points = quantized(source.read(tensor), grid, np.float16)
        scales *= np.float16(1.01)
        parts = [codes, scales.astype(dtype), *([] if zero_points is None else [zero_points])]
        return [part[start:stop] for part in parts]

    expected = {"mlp.gate_proj": (GATE_UP, 0, 256), "mlp.up_proj": (GATE_UP, 256, 512)}
    if provider == "dml":
        expected["attn.k_proj"] = (GATE_UP.replace("mlp.gate_up", "self_attn.qkv"), 128, 192)
    for place, (tensor, start, stop) in expected.items():
        name = f"model.layers.1.{place}.MatMul.weight"
        for suffix, part in zip(
            ("Q4", "scales", "zero_points"), stored(tensor, start, stop), strict=False
        ):
            found = arrays[f"{name}_{suffix}"]
            assert found.dtype == part.dtype
            np.testing.assert_array_equal(found.reshape(-1), part.reshape(-1))
    # another format by override: the scaled weight, quantized
    name = "model.layers.1.mlp.down_proj.MatMul.weight_Q4"
    other = quantized(source.read(DOWN), grid._replace(group_size=64), dtype)
    np.testing.assert_array_equal(arrays[name], other[0])


def test_codes_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    graph = lay_out(path, tmp_path)
    quantize_body(graph, GRID, {QKV: GRID})
    assert graph.count_copied() == 1
    with pytest.raises(ExportError, match=f"codes of {QKV}, of which there are none"):
        write(graph, path, tmp_path / "onnx")


def test_bytes_depend_on_neither_threads_nor_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phiconv.onnx import writer

    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    checkpoint = open_checkpoint(path)
    overlay = random_overlay(checkpoint, GRID)
    folder = tmp_path / "overlay"
    folder.mkdir()
    replace(overlay, rounding="gptq").write(folder)
    write_codes(folder, checkpoint, overlay)
    loaded = Overlay.load(folder)
    found = []
    for threads, chunk, strip in ((1, 2 << 20, 96 << 20), (4, 5_000, 9_000)):
        monkeypatch.setattr(writer, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(writer, "STRIP_BYTES", strip)
        graph = lay_out(path, tmp_path / str(threads))
        quantize_body(graph, GRID, {GATE_UP: GRID}, other="o_proj")
        write_overlaid(graph, path, loaded, tmp_path / f"onnx{threads}", threads)
        found.append((tmp_path / f"onnx{threads}" / "model.onnx.data").read_bytes())
    assert found[0] == found[1]


def test_what_the_scales_take_beyond_fp16_is_named(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    checkpoint = open_checkpoint(path)
    overlay = random_overlay(checkpoint, GRID)
    large = np.full_like(overlay.columns[DOWN], 1e6)
    overlay = replace(overlay, columns={**overlay.columns, DOWN: large})
    for index, quantize in enumerate((True, False)):
        graph = lay_out(path, tmp_path / str(index), "cuda", "fp16")
        if quantize:
            quantize_body(graph, GRID)
        with pytest.raises(StageError, match=rf"range of fp16.*{DOWN} \(\|w\| up to"):
            write_overlaid(graph, path, overlay, tmp_path / f"onnx{index}")


def test_a_graph_remembers_its_overlay(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "checkpoint", dtype="bf16")
    graph = lay_out(path, tmp_path)
    graph.overlay = "12" * 32
    quantize_body(graph, GRID, {GATE_UP: GRID})
    (tmp_path / "saved").mkdir()
    graph.save(tmp_path / "saved")
    loaded = OnnxGraph.load(tmp_path / "saved")
    assert loaded.overlay == "12" * 32
    assert loaded.weights == graph.weights
    assert loaded.count_copied() == 2
