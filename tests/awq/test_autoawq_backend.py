"""`backend: autoawq`: what is refused, and where the package is installed, a real run of it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiconv.awq.autoawq_backend import _clip_indices
from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.overlaid import OverlaidCheckpoint
from phiconv.checkpoint.overlay import Overlay
from phiconv.errors import RecipeError
from phiconv.runtimes.reference import LanguageModelHead, final_hidden_states
from phiconv.stages.awq import Awq, AwqParams
from phiconv.stages.stage import SilentProgress, StageContext
from tests.outlier_checkpoints import inject_outliers
from tests.overlays import quantized
from tests.phi3_checkpoints import write_phi3_checkpoint
from tests.terminal import Terminal

SHORT = {"windows": 4, "window_length": 32}
NEEDED = ("awq", "accelerate", "datasets", "zstandard")

needs_autoawq = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="autoawq 0.2.9 is not installed",
)


def params(**changes: Any) -> AwqParams:
    calibration = SHORT | changes.pop("calibration", {})
    document = {"backend": "autoawq", "group_size": 32, **changes, "calibration": calibration}
    return AwqParams.model_validate(document)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers without grouped queries, with outlier channels."""
    folder = tmp_path_factory.mktemp("autoawq")
    plain = write_phi3_checkpoint(folder / "plain", dtype="f32", num_key_value_heads=4)
    return inject_outliers(plain, folder / "model")


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"bits": 8}, "awq: bits"),
        ({"rounding": "gptq"}, "awq: rounding"),
        ({"search": "mse"}, "awq: search"),
        ({"scale": False}, "awq: scale"),
        ({"calibration": {"compute": "bf16"}}, "awq: calibration.compute"),
    ],
)
def test_what_autoawq_cannot_do_is_refused_when_planned(
    checkpoint: Path, changes: dict[str, Any], where: str
) -> None:
    config = Checkpoint(checkpoint).config
    assert Awq().check(params(), config) == []
    (error,) = Awq().check(params(**changes), config)
    assert isinstance(error, RecipeError) and error.where == where


def test_grouped_queries_are_refused_with_the_reason(checkpoint: Path) -> None:
    config = replace(Checkpoint(checkpoint).config, num_key_value_heads=2)
    (error,) = Awq().check(params(), config)
    assert "corrupts models with grouped queries" in error.message
    assert Awq().check(params(backend="phiconv"), config) == []


def test_without_autoawq_the_build_ends_with_5(
    phiconv: Terminal, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "awq" else found(name)
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema: 1\nname: other\nmodel: {source: x}\nstages:\n"
        "  - {id: awq, uses: awq, with: {backend: autoawq, group_size: 32}}\n"
        "  - {id: checkpoint, uses: export-awq}\n"
    )
    out = str(tmp_path / "out")
    done = phiconv("build", str(recipe), "--model", str(checkpoint), "--out", out)
    assert done.code == 5
    assert "pip install --no-deps autoawq==0.2.9" in done.err


def test_limits_become_places_on_autoawqs_grid() -> None:
    import torch

    weight = torch.randn(6, 64)
    weight[2, :32] = 0
    indices = np.random.default_rng(0).integers(0, 10, (6, 2))
    top = weight.view(6, 2, 32).abs().amax(dim=2, keepdim=True)
    largest = top * torch.tensor(1 - indices / 20, dtype=torch.float32)[:, :, None]
    found = _clip_indices(weight, largest)
    assert found.dtype == np.uint8
    indices[2, 0] = 0
    assert np.array_equal(found, indices)


def logits(source: Any, checkpoint: Checkpoint, windows: np.ndarray) -> np.ndarray:
    hidden = final_hidden_states(source, windows, threads=2)
    return LanguageModelHead(checkpoint, threads=2).logits(hidden.reshape(-1, hidden.shape[-1]))


class Rounded:
    """A checkpoint whose decoder matrices are rounded to a grid as they are read."""

    def __init__(self, source: Any, overlay: Overlay):
        self._source = source.for_grid(overlay.grid)
        self._grid = overlay.grid
        self.tensors, self.config, self.path = source.tensors, source.config, source.path
        self.read_rows = source.read_rows

    def read(self, name: str) -> np.ndarray:
        from phiconv.kernels.matmulnbits import dequantize_rows

        values = self._source.read(name)
        if values.ndim != 2 or not name.startswith("model.layers."):
            return values
        packed, scales, zeros = quantized(values, self._grid, np.float32)
        return dequantize_rows(
            packed, scales, zeros, bits=4, block_size=self._grid.group_size, K=values.shape[1],
            symmetric=self._grid.symmetric,
        )  # fmt: skip


@needs_autoawq
@pytest.mark.filterwarnings("default")
def test_the_package_runs_and_its_result_is_an_overlay(checkpoint: Path, tmp_path: Path) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    source = Checkpoint(checkpoint)
    facts = Awq().run(params(), StageContext(tmp_path, (), source, 2, SilentProgress()))
    assert facts["scaled_groups"] == 8 and facts["tokens"] == 4 * 32
    assert (checkpoint / "model.safetensors").read_bytes() == before
    overlay = Overlay.load(tmp_path)
    assert overlay.tokens is not None and overlay.tokens.windows == 4
    assert len(overlay.columns) == 8 and len(overlay.clips) > 0
    windows = np.random.default_rng(0).integers(8, 350, (2, 32))
    expected = logits(source, source, windows)
    scaled = OverlaidCheckpoint(source, overlay, clip=False)
    # the scales cancel out
    np.testing.assert_allclose(logits(scaled, source, windows), expected, atol=2e-3)
    plain = Rounded(source, overlay)
    error = np.square(logits(Rounded(scaled, overlay), source, windows) - expected).mean()
    rounded = np.square(logits(plain, source, windows) - expected).mean()
    assert error < 0.7 * rounded  # with its bug it is far above
