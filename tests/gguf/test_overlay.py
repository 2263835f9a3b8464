"""GGUF files whose weights are read through an overlay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.overlaid import OverlaidCheckpoint
from phiconv.checkpoint.overlay import Overlay
from phiconv.checkpoint.weight_source import Grid
from phiconv.gguf.importance import ImportanceMatrix
from phiconv.gguf.plan import gguf_names
from phiconv.kernels import ggml
from phiconv.runtimes.activations import square_sums
from phiconv.stages.convert_gguf import ConvertGguf, ConvertGgufParams
from phiconv.stages.stage import Artifact, StageContext
from tests.gguf.conversions import tensors
from tests.overlays import random_overlay
from tests.phi3_checkpoints import write_phi3_checkpoint

DOWN = "model.layers.0.mlp.down_proj.weight"
WINDOWS = np.random.default_rng(0).integers(8, 290, (2, 40))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_phi3_checkpoint(tmp_path_factory.mktemp("overlaid") / "model"))


@pytest.fixture(scope="module")
def overlay(checkpoint: Checkpoint) -> Overlay:
    return random_overlay(checkpoint, Grid(4, 32, False))


@pytest.fixture(scope="module")
def artifact(overlay: Overlay, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("overlay")
    overlay.write(folder)
    return Artifact("awq", "overlay", "0" * 64, folder)


def convert(checkpoint: Checkpoint, artifact: Artifact, out: Path, **params: Any) -> None:
    out.mkdir()
    context = StageContext(out, [artifact], checkpoint, threads=2)
    ConvertGguf().run(ConvertGgufParams.model_validate(params), context)


@pytest.fixture(scope="module")
def folded(
    checkpoint: Checkpoint, overlay: Overlay, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """The checkpoint as the overlay reads it, in fp32, as one of its own."""
    folder = write_phi3_checkpoint(tmp_path_factory.mktemp("folded") / "model", dtype="f32")
    source = OverlaidCheckpoint(checkpoint, overlay, clip=False)
    arrays = {name: source.read(name).astype(np.float32) for name in source.tensors}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint(folder)


def test_floats_are_the_scaled_weights(
    checkpoint: Checkpoint, overlay: Overlay, artifact: Artifact, tmp_path: Path
) -> None:
    convert(checkpoint, artifact, tmp_path / "out", file_type="F32")
    found = tensors(tmp_path / "out")
    source = OverlaidCheckpoint(checkpoint, overlay, clip=False)
    for name, gguf_name in gguf_names(checkpoint.tensors, checkpoint.config).items():
        expected = source.read(name).astype(np.float32)
        assert found[gguf_name][2] == expected.tobytes(), name


@pytest.mark.parametrize("file_type", ["Q4_0", "Q8_0"])
def test_quantized_as_the_folded_checkpoint_would_be(
    checkpoint: Checkpoint, folded: Checkpoint, artifact: Artifact, tmp_path: Path, file_type: str
) -> None:
    convert(checkpoint, artifact, tmp_path / "overlaid", file_type=file_type)
    (tmp_path / "folded").mkdir()
    params = ConvertGgufParams.model_validate({"file_type": file_type})
    ConvertGguf().run(params, StageContext(tmp_path / "folded", (), folded))
    assert tensors(tmp_path / "overlaid") == tensors(tmp_path / "folded")


def test_importance_becomes_that_of_the_scaled_inputs(
    checkpoint: Checkpoint, overlay: Overlay, folded: Checkpoint, artifact: Artifact, tmp_path: Path
) -> None:
    measured, expected = square_sums(checkpoint, WINDOWS), square_sums(folded, WINDOWS)
    for name, one in measured.items():
        scaled = one.sums / np.square(overlay.columns[name], dtype=np.float64)
        np.testing.assert_allclose(scaled, expected[name].sums, rtol=1e-4)

    names = gguf_names(measured, checkpoint.config)
    matrix = ImportanceMatrix(
        {names[weight]: one.sums.astype(np.float32) for weight, one in measured.items()},
        {names[weight]: one.tokens for weight, one in measured.items()},
        ("texts",),
        *WINDOWS.shape,
    )
    matrix.save(tmp_path / "imatrix.gguf")
    importance = {"file": str(tmp_path / "imatrix.gguf")}
    convert(checkpoint, artifact, tmp_path / "out", file_type="Q4_0", importance=importance)
    found = tensors(tmp_path / "out")[names[DOWN]]
    weight = folded.read(DOWN)
    mean = matrix.means()[names[DOWN]] / np.square(overlay.columns[DOWN])
    out = np.empty((len(weight), ggml.row_nbytes("Q4_0", weight.shape[1])), np.uint8)
    assert ggml.quantize_rows(weight, "Q4_0", out, mean)
    assert found[2] == out.tobytes()
