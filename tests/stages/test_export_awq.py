"""AutoAWQ checkpoints written from overlays: read back, by the GenAI builder, and by AutoAWQ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.overlaid import OverlaidCheckpoint
from phiconv.checkpoint.overlay import Overlay
from phiconv.checkpoint.weight_source import Grid
from phiconv.errors import CheckpointError, StageError
from phiconv.kernels.matmulnbits import dequantize_rows
from phiconv.onnx.quantize import Target, quantize_graph, take_codes
from phiconv.onnx.writer import write_model
from phiconv.stages.awq import AwqParams
from phiconv.stages.export_awq import ExportAwq, ExportAwqParams
from phiconv.stages.stage import OVERLAY, Artifact, InputRef, SilentProgress, StageContext
from tests.onnx.builder_oracle import build_with_builder
from tests.onnx.models import initializers, lay_out, onnx_logits, write
from tests.overlays import random_overlay, write_codes
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.quantized_checkpoints import AWQ_ORDER
from tests.terminal import Terminal

IDS = np.arange(48, dtype=np.int64) * 7 % 340
GQA = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 256}


def overlay_folder(
    path: Path, folder: Path, grid: Grid, *, clip: bool = True, codes: bool = False
) -> Path:
    """An overlay of random scales and limits, by request with codes."""
    folder.mkdir()
    checkpoint = Checkpoint(path)
    overlay = random_overlay(checkpoint, grid, clip=clip)
    if codes:
        overlay = replace(overlay, rounding="gptq")
        write_codes(folder, checkpoint, overlay)
    overlay.write(folder)
    return folder


def export(path: Path, overlay: Path, out: Path, threads: int = 2, **params: Any) -> Path:
    out.mkdir()
    inputs = [Artifact("awq", OVERLAY, "0" * 64, overlay)]
    context = StageContext(out, inputs, Checkpoint(path), threads=threads)
    facts = ExportAwq().run(ExportAwqParams(**params), context)
    assert facts["bytes"] == sum(
        info.nbytes for name in out.glob("*.safetensors") for info in headers(name)
    )
    return out


def headers(file: Path) -> list[np.ndarray]:
    return list(load_file(file).values())


def decoder_weights(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the quantized weights of an ONNX artifact stand for, float32 [N, K]."""
    weights = {}
    for name, packed in found.items():
        if not name.endswith("_Q4") or name.startswith("lm_head"):
            continue
        n, blocks, size = packed.shape
        stem = name.removesuffix("_Q4")
        zeros = found.get(f"{stem}_zero_points")
        weights[stem] = dequantize_rows(
            packed,
            found[f"{stem}_scales"].reshape(n, blocks),
            None if zeros is None else zeros.reshape(n, -1),
            bits=4,
            block_size=2 * size,
            K=2 * blocks * size,
            symmetric=zeros is None,
        )
    return weights


CASES = {
    "asymmetric": (Grid(4, 32, symmetric=False), {}),
    "symmetric": (Grid(4, 32, symmetric=True), {}),
    "128, grouped queries": (Grid(4, 128, symmetric=False), GQA),
    "gptq": (Grid(4, 32, symmetric=False), {}),
    "gptq, symmetric": (Grid(4, 32, symmetric=True), GQA),
}


@pytest.mark.parametrize("case", CASES)
def test_it_holds_what_an_onnx_artifact_with_the_same_overlay_holds(
    tmp_path: Path, case: str
) -> None:
    grid, config = CASES[case]
    path = write_phi3_checkpoint(tmp_path / "float", **config)
    codes = case.startswith("gptq")
    folder = overlay_folder(path, tmp_path / "overlay", grid, codes=codes)

    out = export(path, folder, tmp_path / "awq")
    made = Checkpoint(out)
    graph = lay_out(out, tmp_path, "cuda", "fp16")
    assert take_codes(graph, made) == 10
    write(graph, out, tmp_path / "from-awq")

    source = OverlaidCheckpoint(Checkpoint(path), Overlay.load(folder), clip=False)
    target = Target(4, grid.group_size, grid.symmetric, "none", 0)
    graph = lay_out(path, tmp_path / "direct", "cuda", "fp16")
    rounded = source.rounded.tensors if source.rounded is not None else {}
    quantize_graph(graph, lambda weight: target if weight.role == "body" else None, rounded)
    (tmp_path / "onnx").mkdir()
    write_model(graph, source, tmp_path / "onnx", threads=2, progress=SilentProgress())

    ours, theirs = initializers(tmp_path / "from-awq"), initializers(tmp_path / "onnx")
    expected, found = decoder_weights(theirs), decoder_weights(ours)
    assert expected.keys() == found.keys() and len(expected) == 10
    for name, weight in expected.items():
        assert np.array_equal(weight, found[name]), name
        assert np.array_equal(ours[f"{name}_Q4"], theirs[f"{name}_Q4"])
    floats = [name for name, value in theirs.items() if value.dtype == np.float16]
    for name in floats:
        assert np.array_equal(theirs[name], ours[name]), name


def test_the_genai_builder_reads_it(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "float", **GQA)
    folder = overlay_folder(path, tmp_path / "overlay", Grid(4, 32, symmetric=False))
    out = export(path, folder, tmp_path / "awq")
    exclude = "nodes_to_exclude=/lm_head/MatMul"
    theirs = build_with_builder(out, tmp_path / "theirs", "int4", "cuda", exclude)
    graph = lay_out(out, tmp_path, "cuda", "fp16")
    take_codes(graph, Checkpoint(out))
    write(graph, out, tmp_path / "ours")
    expected, found = initializers(theirs), initializers(tmp_path / "ours")
    ours = decoder_weights(found)
    packed = {name for name in expected if name.endswith(("_Q4", ".qweight"))}
    assert len(packed) >= len(ours) == 10
    difference = onnx_logits(theirs, IDS) - onnx_logits(tmp_path / "ours", IDS)
    assert np.abs(difference).max() < 0.02  # fp16, products of fused weights summed alike


def test_the_files_are_autoawqs(tmp_path: Path) -> None:
    """Layout and config, read by the format's definition, without phiconv's own packing."""
    path = write_phi3_checkpoint(tmp_path / "float", hidden_size=256)
    folder = overlay_folder(path, tmp_path / "overlay", Grid(4, 128, symmetric=True))
    out = export(path, folder, tmp_path / "awq")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    assert config["torch_dtype"] == "float16"
    assert {file.name for file in path.iterdir()} == {file.name for file in out.iterdir()}
    assert (out / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    stored, made = load_file(out / "model.safetensors"), Checkpoint(out)
    assert {values.dtype for values in stored.values()} == {np.dtype("f2"), np.dtype("i4")}
    module = "model.layers.1.mlp.gate_up_proj"
    qweight, scales = stored[f"{module}.qweight"], stored[f"{module}.scales"]
    assert qweight.shape == (256, 512 // 8) and scales.shape == (2, 512)
    # eight zero points of 8 to an item
    assert (stored[f"{module}.qzeros"].view(np.uint32) == 0x88888888).all()
    weight = np.empty((512, 256), np.float32)
    for place, offset in enumerate(AWQ_ORDER):
        nibbles = qweight.view(np.uint32) >> np.uint32(4 * place) & np.uint32(15)
        steps = np.repeat(scales[:, offset::8].astype(np.float32), 128, axis=0)
        weight[offset::8] = ((nibbles.astype(np.float32) - 8) * steps).T
    assert np.array_equal(made.read(f"{module}.weight"), weight)


def test_shards_and_threads_change_no_weight(tmp_path: Path) -> None:
    path = write_phi3_checkpoint(tmp_path / "float", shards=2, hidden_size=512, vocab_size=2000)
    folder = overlay_folder(path, tmp_path / "overlay", Grid(4, 64, symmetric=False))
    one = export(path, folder, tmp_path / "one", threads=1)
    four = export(path, folder, tmp_path / "four", threads=4)
    for file in one.iterdir():
        assert file.read_bytes() == (four / file.name).read_bytes(), file.name
    parts = export(path, folder, tmp_path / "parts", max_shard_size="1MB")
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert {name for file in files for name in load_file(parts / file)} == set(index["weight_map"])
    whole, split = Checkpoint(one), Checkpoint(parts)
    assert whole.tensors.keys() == split.tensors.keys()
    for name in whole.tensors:
        assert np.array_equal(whole.read(name), split.read(name))


def edit(path: Path, name: str, value: float) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name].flat[5] = value
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("model.layers.0.mlp.down_proj.weight", np.nan, CheckpointError, "NaN or Inf in .*down"),
        ("model.embed_tokens.weight", np.inf, CheckpointError, "NaN or Inf in .*embed"),
        ("model.norm.weight", 1e5, StageError, "range of fp16, ±65504: model.norm"),
        ("model.layers.1.self_attn.o_proj.weight", 1e6, StageError, "range of fp16.*o_proj"),
    ],
)
def test_weights_that_fp16_cannot_hold_are_named(
    tmp_path: Path, name: str, value: float, error: type[Exception], message: str
) -> None:
    path = write_phi3_checkpoint(tmp_path / "float")
    edit(path, name, value)
    folder = overlay_folder(path, tmp_path / "overlay", Grid(4, 32, symmetric=False), clip=False)
    with pytest.raises(error, match=message):
        export(path, folder, tmp_path / "awq")


def test_what_the_format_cannot_hold_is_found_when_planned(tmp_path: Path) -> None:
    config = Checkpoint(write_phi3_checkpoint(tmp_path / "float")).config
    assert ExportAwq().check(ExportAwqParams(), config) == []
    odd = replace(config, intermediate_size=252)
    (error,) = ExportAwq().check(ExportAwqParams(), odd)
    assert "intermediate_size (252) is not a multiple of 8" in error.message
    made_by = (("awq", AwqParams(bits=8)),)
    ref = InputRef("awq", OVERLAY, "", tmp_path, made_by)
    (error,) = ExportAwq().check_fit(ExportAwqParams(), config, [ref])
    assert "has 4 bits, the overlay is made for 8" in error.message


def test_a_recipe_calibrates_and_exports_and_the_result_converts(
    phiconv: Terminal, tmp_path: Path
) -> None:
    recipe = tmp_path / "export.yaml"
    recipe.write_text(
        "schema: 1\nname: export\nmodel: {source: x}\nstages:\n"
        "  - id: awq\n    uses: awq\n"
        "    with: {group_size: 32, calibration: {windows: 2, window_length: 64}}\n"
        "  - {id: checkpoint, uses: export-awq}\n"
    )
    made = tmp_path / "made"
    model = str(write_phi3_checkpoint(tmp_path / "float"))
    done = phiconv("build", str(recipe), "--model", model, "--out", str(made))
    assert done.code == 0, done.err
    recipe = tmp_path / "convert.yaml"
    recipe.write_text(
        "schema: 1\nname: convert\nmodel: {source: x}\nstages:\n"
        "  - {id: onnx, uses: export-onnx, with: {provider: cuda}}\n"
        "  - id: check\n    uses: validate\n"
        "    with: {windows: 2, window_length: 64, layer_errors: false,"
        " gates: {kl_divergence.mean: {max: 1.0e-4}}}\n"
    )
    checkpoint, out = str(made / "artifact"), str(tmp_path / "out")
    done = phiconv("build", str(recipe), "--model", checkpoint, "--out", out)
    assert done.code == 0, done.err
