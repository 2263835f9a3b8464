"""Overlays: written and read back, refused when damaged, applied while a checkpoint is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.overlaid import OverlaidCheckpoint
from phiconv.checkpoint.overlay import (
    CalibrationTokens,
    GroupRecord,
    Overlay,
)
from phiconv.checkpoint.rounded import RoundedWriter
from phiconv.checkpoint.weight_source import Grid
from phiconv.errors import StageError
from phiconv.stages.awq import Awq, AwqParams
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.quantized_checkpoints import write_quantized

NORM = "model.layers.0.input_layernorm.weight"
QKV = "model.layers.0.self_attn.qkv_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
GRID = Grid(bits=4, group_size=32, symmetric=False)


@pytest.fixture(scope="module", params=["bf16", "f16", "f32"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    return Checkpoint(write_phi3_checkpoint(folder, dtype=request.param))


@pytest.fixture
def overlay(checkpoint: Checkpoint) -> Overlay:
    rng = np.random.default_rng(1)
    scales = np.exp(rng.standard_normal(128) / 4).astype(np.float32)
    return Overlay(
        checkpoint=checkpoint.digest,
        grid=GRID,
        columns={QKV: scales},
        rows={NORM: 1 / scales},
        clips={QKV: rng.integers(0, 11, (256, 4), np.uint8)},
        groups=(GroupRecord(0, "qkv", (QKV,), loss_rtn=0.5, loss_scaled=0.25, scaled=True),),
        tokens=CalibrationTokens("default", "sha256:0", 4, 64, 256),
    )


def test_reads_what_was_written(overlay: Overlay, tmp_path: Path) -> None:
    overlay.write(tmp_path)
    found = Overlay.load(tmp_path)
    assert replace(found, columns={}, rows={}, clips={}) == replace(
        overlay, columns={}, rows={}, clips={}
    )
    for kind in ("columns", "rows", "clips"):
        arrays, expected = getattr(found, kind), getattr(overlay, kind)
        assert arrays.keys() == expected.keys()
        for name in arrays:
            np.testing.assert_array_equal(arrays[name], expected[name])
    assert load_file(tmp_path / "overlay.safetensors").keys() == {
        f"columns:{QKV}",
        f"rows:{NORM}",
        f"clip:{QKV}",
    }


def test_equal_overlays_give_equal_bytes(overlay: Overlay, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    other = replace(overlay, columns={O_PROJ: np.ones(128, np.float32), **overlay.columns})
    again = replace(overlay, columns={**overlay.columns, O_PROJ: np.ones(128, np.float32)})
    other.write(tmp_path / "a")
    again.write(tmp_path / "b")
    for name in ("overlay.json", "overlay.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("clip", [True, False])
def test_scales_and_clips_rows_as_they_are_read(
    checkpoint: Checkpoint, overlay: Overlay, clip: bool
) -> None:
    overlaid = OverlaidCheckpoint(checkpoint, overlay, clip=clip)
    expected = checkpoint.read(QKV).astype(np.float32) * overlay.columns[QKV]
    if clip:
        groups = expected.reshape(256, 4, 32)
        share = (np.float32(20) - overlay.clips[QKV].astype(np.float32)) / np.float32(20)
        limits = (np.abs(groups).max(2) * share)[..., None]
        expected = np.clip(groups, -limits, limits).reshape(256, 128)
    found = overlaid.read(QKV)
    assert overlaid.tensors[QKV].dtype == "f32"
    assert overlaid.tensors[QKV].row_nbytes == 128 * 4
    np.testing.assert_array_equal(found, expected)
    out = np.empty((30, 128), np.float32)
    assert overlaid.read_rows(QKV, 20, 50, out) is out
    np.testing.assert_array_equal(out, expected[20:50])


def test_scales_norms_and_passes_the_rest_through(checkpoint: Checkpoint, overlay: Overlay) -> None:
    overlaid = OverlaidCheckpoint(checkpoint, overlay, clip=True)
    norm = checkpoint.read(NORM).astype(np.float32)
    np.testing.assert_array_equal(overlaid.read(NORM), norm * overlay.rows[NORM])
    np.testing.assert_array_equal(overlaid.read_rows(NORM, 5, 9), (norm * overlay.rows[NORM])[5:9])
    assert overlaid.tensors[O_PROJ] == checkpoint.tensors[O_PROJ]
    assert overlaid.read(O_PROJ).tobytes() == checkpoint.read(O_PROJ).tobytes()


def test_scales_rows_of_a_matrix(checkpoint: Checkpoint) -> None:
    rows = np.linspace(0.5, 2, 256, dtype=np.float32)
    overlay = Overlay(checkpoint.digest, GRID, rows={QKV: rows})
    found = OverlaidCheckpoint(checkpoint, overlay, clip=True).read_rows(QKV, 100, 256)
    np.testing.assert_array_equal(
        found, checkpoint.read(QKV).astype(np.float32)[100:] * rows[100:, None]
    )


def test_another_checkpoints_overlay_is_refused(checkpoint: Checkpoint, overlay: Overlay) -> None:
    with pytest.raises(StageError, match="belongs to the checkpoint 000000000000"):
        OverlaidCheckpoint(checkpoint, replace(overlay, checkpoint="0" * 64), clip=True)


@pytest.mark.parametrize(
    "change",
    [
        {"columns": {QKV: np.ones(64, np.float32)}},
        {"rows": {NORM: np.ones(64, np.float32)}},
        {"columns": {NORM: np.ones(128, np.float32)}},
        {"clips": {QKV: np.zeros((256, 2), np.uint8)}},
        {"columns": {"model.layers.7.self_attn.o_proj.weight": np.ones(128, np.float32)}},
    ],
)
def test_wrong_shapes_are_refused(
    checkpoint: Checkpoint, overlay: Overlay, change: dict[str, dict[str, np.ndarray]]
) -> None:
    with pytest.raises(StageError, match="no tensors of such shapes: 'model"):
        OverlaidCheckpoint(checkpoint, replace(overlay, **change), clip=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "values", "fault"),
    [
        (f"columns:{QKV}", np.array([1, np.inf], np.float32), "not finite and positive"),
        (f"columns:{QKV}", np.array([1, 0], np.float32), "not finite and positive"),
        (f"rows:{NORM}", np.array([1, -1], np.float32), "not finite and positive"),
        (f"rows:{NORM}", np.array([1, np.nan], np.float32), "not finite and positive"),
        (f"rows:{NORM}", np.ones((2, 2), np.float32), "f32 of shape"),
        (f"columns:{QKV}", np.ones(2, np.float16), "f16 of shape"),
        (f"clip:{QKV}", np.full((2, 2), 11, np.uint8), "greater than 10"),
        ("scales", np.ones(2, np.float32), "no part of an overlay: 'scales'"),
    ],
)
def test_values_that_make_no_sense_are_refused(
    overlay: Overlay, tmp_path: Path, entry: str, values: np.ndarray, fault: str
) -> None:
    overlay.write(tmp_path)
    save_file({entry: values}, tmp_path / "overlay.safetensors")
    with pytest.raises(StageError, match=fault):
        Overlay.load(tmp_path)


def test_damaged_files_are_refused(overlay: Overlay, tmp_path: Path) -> None:
    overlay.write(tmp_path)
    document = json.loads((tmp_path / "overlay.json").read_text())

    def refused(fault: str, **changes: object) -> None:
        (tmp_path / "overlay.json").write_text(json.dumps({**document, **changes}))
        with pytest.raises(StageError, match=fault):
            Overlay.load(tmp_path)

    refused("an overlay of version 2, not 1", version=2)
    refused("not an overlay", grid={"bits": 3, "group_size": 32, "symmetric": True})
    refused("not an overlay", grid={"bits": 4})
    refused("not an overlay", rounding="up")
    refused("not an overlay", groups=[{"layer": 0}])
    refused("cannot be read", rounding="gptq")
    (tmp_path / "overlay.json").write_text("{")
    with pytest.raises(StageError, match="not valid JSON"):
        Overlay.load(tmp_path)
    overlay.write(tmp_path)
    factors = tmp_path / "overlay.safetensors"
    factors.write_bytes(factors.read_bytes()[:-1])
    with pytest.raises(StageError, match="truncated"):
        Overlay.load(tmp_path)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_read_back_by_rows(
    checkpoint: Checkpoint, overlay: Overlay, tmp_path: Path, symmetric: bool
) -> None:
    rng = np.random.default_rng(0)
    grid = GRID._replace(symmetric=symmetric)
    codes = rng.integers(0, 256, (128, 4, 16), np.uint8)
    scales = rng.standard_normal((128, 4)).astype(np.float16)
    zero_points = None if symmetric else rng.integers(0, 256, (128, 2), np.uint8)
    replace(overlay, grid=grid, rounding="gptq").write(tmp_path)
    with RoundedWriter(tmp_path, grid, {O_PROJ: (128, 128)}) as writer:
        writer.write(O_PROJ, codes, scales, zero_points)
    found = Overlay.load(tmp_path)
    rounded = OverlaidCheckpoint(checkpoint, found, clip=True).rounded
    assert rounded is not None and rounded.tensors == {O_PROJ: grid}
    for dtype in (np.float16, np.float32):
        packed, out = np.empty((20, 4, 16), np.uint8), np.empty((20, 4), dtype)
        zeros = None if symmetric else np.empty((20, 2), np.uint8)
        rounded.read_rows(O_PROJ, 7, packed=packed, scales=out, zero_points=zeros)
        np.testing.assert_array_equal(packed, codes[7:27])
        np.testing.assert_array_equal(out, scales[7:27].astype(dtype))
        if zeros is not None and zero_points is not None:
            np.testing.assert_array_equal(zeros, zero_points[7:27])


def test_damaged_codes_are_refused(overlay: Overlay, tmp_path: Path) -> None:
    replace(overlay, rounding="gptq").write(tmp_path)
    file = tmp_path / "rounded.safetensors"
    parts: dict[str, np.ndarray] = {
        f"{O_PROJ}:codes": np.zeros((128, 4, 16), np.uint8),
        f"{O_PROJ}:scales": np.zeros((128, 4), np.float16),
        f"{O_PROJ}:zero_points": np.zeros((128, 2), np.uint8),
    }
    save_file(dict(list(parts.items())[:2]), file)
    with pytest.raises(StageError, match="zero_points"):
        Overlay.load(tmp_path)
    save_file({**parts, f"{O_PROJ}:scales": np.zeros((128, 3), np.float16)}, file)
    with pytest.raises(StageError, match=":scales"):
        Overlay.load(tmp_path)
    save_file({**parts, f"{O_PROJ}:scales": np.full((128, 4), np.inf, np.float16)}, file)
    rounded = Overlay.load(tmp_path).rounded
    assert rounded is not None
    with pytest.raises(StageError, match="NaN or Inf"):
        rounded.read_rows(
            O_PROJ,
            0,
            packed=np.empty((1, 4, 16), np.uint8),
            scales=np.empty((1, 4), np.float16),
            zero_points=np.empty((1, 2), np.uint8),
        )


def test_a_weight_that_was_never_written_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="never written"),
        RoundedWriter(tmp_path, GRID, {O_PROJ: (128, 128)}),
    ):
        pass


def test_a_quantized_checkpoint_takes_no_overlay(tmp_path: Path) -> None:
    original = write_phi3_checkpoint(tmp_path / "float")
    quantized = Checkpoint(write_quantized(original, tmp_path / "int", method="awq").path)
    with pytest.raises(StageError, match="but the checkpoint's are integers"):
        OverlaidCheckpoint(quantized, Overlay(quantized.digest, GRID), clip=False)
    (error,) = Awq().check(AwqParams(group_size=32), quantized.config)
    assert error.message == "the checkpoint's weights are integers already"
