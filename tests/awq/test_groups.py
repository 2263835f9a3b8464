from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phiconv.awq.groups import GROUPS, query_key_rows
from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.overlaid import OverlaidCheckpoint
from phiconv.checkpoint.overlay import Overlay
from phiconv.checkpoint.weight_source import Grid
from phiconv.runtimes.reference import LanguageModelHead, final_hidden_states
from tests.outlier_checkpoints import inject_outliers
from tests.phi3_checkpoints import write_phi3_checkpoint

WINDOWS = np.random.default_rng(1).integers(8, 300, (2, 24))
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {"num_key_value_heads": 2},
    "one value head, partial rotary": {
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "tied": {"tie_word_embeddings": True},
}


def logits(checkpoint: Any) -> np.ndarray:
    hidden = final_hidden_states(checkpoint, WINDOWS)
    return LanguageModelHead(checkpoint).logits(hidden.reshape(-1, hidden.shape[-1]))


def random_scales(checkpoint: Checkpoint, seed: int = 0) -> Overlay:
    """An overlay that scales every input of every group, by factors up to 50 and down to 1/50."""
    random = np.random.default_rng(seed)
    config = checkpoint.config
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    for layer in range(config.num_hidden_layers):
        for group in GROUPS:
            name, source = group.weight(layer), group.source_weight(layer)
            width = checkpoint.tensors[name].shape[1]
            factors = group.tie(np.exp(random.uniform(-3.9, 3.9, width)), config)
            columns[name] = factors.astype(np.float32)
            rows.setdefault(source, np.ones(checkpoint.tensors[source].shape[0], np.float32))
            rows[source][group.source_rows(config)] = group.rows(columns[name], config)
    return Overlay(checkpoint.digest, Grid(4, 32, False), columns=columns, rows=rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_folding_leaves_the_logits_as_they_were(shape: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_phi3_checkpoint(tmp_path, dtype="f32", **SHAPES[shape]))
    overlay = random_scales(checkpoint)
    assert set(overlay.columns) == {g.weight(layer) for g in GROUPS for layer in range(2)}
    overlaid = OverlaidCheckpoint(checkpoint, overlay, clip=False)
    expected = logits(checkpoint)
    assert np.abs(logits(overlaid) - expected).max() <= 2e-5 * np.abs(expected).max()


def test_half_of_a_folding_is_another_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_phi3_checkpoint(tmp_path, dtype="f32"))
    whole = random_scales(checkpoint)
    expected = logits(checkpoint)
    for group in GROUPS:
        columns = {group.weight(0): whole.columns[group.weight(0)]}
        half = Overlay(checkpoint.digest, whole.grid, columns=columns)
        changed = logits(OverlaidCheckpoint(checkpoint, half, clip=False))
        assert np.abs(changed - expected).max() > 0.01 * np.abs(expected).max(), group.name


@pytest.mark.parametrize("shape", ["mha", "gqa"])
def test_injected_outliers_leave_the_logits_as_they_were(shape: str, tmp_path: Path) -> None:
    source = write_phi3_checkpoint(tmp_path / "a", **SHAPES[shape])
    with_outliers = inject_outliers(source, tmp_path / "b")
    expected = logits(Checkpoint(source))
    difference = logits(Checkpoint(with_outliers)) - expected
    assert np.abs(difference).max() <= 2e-5 * np.abs(expected).max()


def test_scales_are_tied_over_the_query_heads_of_a_value_head(tmp_path: Path) -> None:
    config = Checkpoint(write_phi3_checkpoint(tmp_path, num_key_value_heads=2)).config
    group = next(group for group in GROUPS if group.over_heads)
    tied = group.tie(np.arange(128.0), config).reshape(2, 2, 32)
    assert np.array_equal(tied[:, 0], tied[:, 1])
    assert tied[0, 0, 0] == 16.0
    assert np.array_equal(
        group.rows(tied.reshape(-1).astype(np.float32), config),
        1 / tied[:, 0].ravel().astype(np.float32),
    )
    assert (group.source_rows(config).start, group.source_rows(config).stop) == (192, 256)
    assert query_key_rows(config) == 192
