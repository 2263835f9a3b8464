from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from phiconv.awq.clip import search_clips
from phiconv.awq.groups import GROUPS
from phiconv.awq.layer import LayerResult, Settings, search_layer
from phiconv.awq.rounding import Folded, Nearest
from phiconv.awq.scales import relative_magnitudes, sampled_rows, search_scales
from phiconv.awq.statistics import InputStatistics, StatisticsCollector, sampled_tokens
from phiconv.checkpoint import Checkpoint
from phiconv.checkpoint.overlaid import OverlaidCheckpoint
from phiconv.checkpoint.overlay import Overlay
from phiconv.checkpoint.weight_source import Grid
from phiconv.kernels.matmulnbits import dequantize_rows, layout, quantize_rows
from tests.outlier_checkpoints import inject_outliers
from tests.phi3_checkpoints import write_phi3_checkpoint

GRID = Grid(4, 32, False)
NAMES = [group.weight(0) for group in GROUPS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("outliers")
    return Checkpoint(inject_outliers(write_phi3_checkpoint(folder / "a"), folder / "b"))


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint) -> dict[str, InputStatistics]:
    """Of made-up inputs that are large where the weights behind them are small."""
    random = np.random.default_rng(0)
    found = {}
    for name in NAMES:
        weight = checkpoint.read(name).astype(np.float32)
        values = random.standard_normal((400, weight.shape[1])).astype(np.float32)
        values /= np.abs(weight).mean(axis=0)
        with torch.inference_mode():
            collector = StatisticsCollector(sampled_tokens(400, 400))
            collector.add(torch.from_numpy(values))
            found[name] = collector.result()
    return found


def settings(
    rounding: str = "nearest", *, scale: bool = True, clip: bool = False, threads: int = 2
) -> Settings:
    return Settings(
        GRID,
        "gptq" if rounding == "gptq" else "nearest",
        "mse",
        scale=scale,
        clip=clip,
        damping=0.01,
        threads=threads,
    )


def searched(
    checkpoint: Checkpoint, statistics: dict[str, InputStatistics], how: Settings
) -> LayerResult:
    return search_layer(
        checkpoint, 0, {name: lambda name=name: statistics[name] for name in NAMES}, how
    )


def test_errors_are_those_of_the_writers_kernels(checkpoint: Checkpoint) -> None:
    name = NAMES[0]
    stored = checkpoint.read(name)
    random = np.random.default_rng(0)
    n, size = stored.shape
    columns = np.exp(random.standard_normal(size)).astype(np.float32)
    rows = np.exp(random.standard_normal(n)).astype(np.float32)
    clip = random.integers(0, 11, (n, size // 32)).astype(np.uint8)
    overlay = Overlay(
        checkpoint.digest, GRID, columns={name: columns}, rows={name: rows}, clips={name: clip}
    )
    read = OverlaidCheckpoint(checkpoint, overlay, clip=True).read(name)
    shapes = layout(n, size, bits=4, block_size=32)
    packed, scales = np.empty(shapes.packed, np.uint8), np.empty(shapes.scales, np.float16)
    zeros = np.empty(shapes.zero_points, np.uint8)
    quantize_rows(
        read, bits=4, block_size=32, symmetric=False, search="mse",
        packed=packed, scales=scales, zero_points=zeros,
    )  # fmt: skip
    weights = dequantize_rows(packed, scales, zeros, bits=4, block_size=32, K=size, symmetric=False)
    expected = weights / columns / rows[:, None] - stored.astype(np.float32)
    found = Nearest(GRID, "mse", 2).errors(Folded(stored, columns, rows), clip)
    assert np.array_equal(found, expected)


def test_clips_are_the_best_for_each_group(
    checkpoint: Checkpoint, statistics: dict[str, InputStatistics]
) -> None:
    name = NAMES[3]
    stored = checkpoint.read(name)
    weight = Folded(stored, np.ones(256, np.float32), np.ones(len(stored), np.float32))
    nearest = Nearest(GRID, "none", 1)
    chosen = search_clips(weight, statistics[name].gram, nearest)
    gram = statistics[name].gram.numpy().astype(np.float64)
    losses = np.empty((11, *chosen.shape))
    for index in range(11):
        errors = nearest.errors(weight, np.full(chosen.shape, index, np.uint8))
        for group in range(chosen.shape[1]):
            part = slice(32 * group, 32 * group + 32)
            error = errors[:, part].astype(np.float64)
            losses[index, :, group] = np.einsum("nk,kl,nl->n", error, gram[part, part], error)
    best = losses.min(axis=0)
    taken = np.take_along_axis(losses, chosen[None].astype(np.int64), axis=0)[0]
    assert np.allclose(taken, best, rtol=1e-3)
    assert len(np.unique(chosen)) > 3


def test_outliers_are_scaled_away(
    checkpoint: Checkpoint, statistics: dict[str, InputStatistics]
) -> None:
    result = searched(checkpoint, statistics, settings(clip=True))
    assert [record.group for record in result.records] == [group.name for group in GROUPS]
    for record in result.records:
        assert record.scaled
        assert record.loss_scaled is not None
        assert record.loss_rtn is not None
        assert record.loss_scaled < 0.7 * record.loss_rtn
        assert record.loss_gptq is None
        assert record.loss_clipped is not None
        clipped = record.tensors[0] in result.clips
        assert clipped == (record.loss_clipped < record.loss_scaled)
    assert set(result.columns) == set(NAMES)
    assert 0 < len(result.clips) < len(NAMES), "clip limits are kept where they help"


def test_queries_and_keys_are_never_clipped(
    checkpoint: Checkpoint, statistics: dict[str, InputStatistics]
) -> None:
    result = searched(checkpoint, statistics, settings(scale=False, clip=True))
    assert set(result.clips) == set(NAMES)
    clips = result.clips[NAMES[0]]
    values = 128 + 64  # four heads of 32 queries, two of keys
    assert not clips[:values].any()
    assert clips[values:].any()
    plain = searched(checkpoint, statistics, settings(scale=False))
    assert not plain.clips
    assert [record.loss_clipped for record in plain.records] == [None] * len(NAMES)


def test_losses_are_shares_of_the_output(
    checkpoint: Checkpoint, statistics: dict[str, InputStatistics]
) -> None:
    result = searched(checkpoint, statistics, settings(scale=False))
    for record in result.records:
        (name,) = record.tensors
        weight, gram = checkpoint.read(name).astype(np.float32), statistics[name].gram.numpy()
        ones = Folded(weight, *(np.ones(size, np.float32) for size in reversed(weight.shape)))
        lost, whole = (
            np.einsum("nk,kl,nl->", part, gram, part, dtype=np.float64)
            for part in (Nearest(GRID, "mse", 1).errors(ones), weight)
        )
        assert record.loss_rtn == record.loss_scaled == pytest.approx(lost / whole, rel=1e-4)


def test_scales_cancel_out(checkpoint: Checkpoint, statistics: dict[str, InputStatistics]) -> None:
    result = searched(checkpoint, statistics, settings())
    for group in GROUPS:
        factors = result.rows[group.source_weight(0)][group.source_rows(checkpoint.config)]
        columns = result.columns[group.weight(0)]
        if group.over_heads:
            columns = columns.reshape(2, 2, 32)[:, 0].reshape(-1)
        assert np.allclose(factors * columns, 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [True, False])
def test_gptq_loses_less_than_nearest(
    checkpoint: Checkpoint, statistics: dict[str, InputStatistics], scale: bool
) -> None:
    result = searched(checkpoint, statistics, settings("gptq", scale=scale, clip=True))
    assert set(result.codes) == set(NAMES)
    assert not result.clips
    assert bool(result.columns) == scale
    for record in result.records:
        assert record.loss_gptq is not None
        assert record.loss_scaled is not None
        assert record.loss_gptq < record.loss_scaled


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_threads_do_not_change_the_result(
    checkpoint: Checkpoint, statistics: dict[str, InputStatistics], rounding: str
) -> None:
    one, two = (
        searched(checkpoint, statistics, settings(rounding, clip=True, threads=threads))
        for threads in (1, 2)
    )
    assert one.records == two.records
    for name in NAMES:
        assert np.array_equal(one.columns[name], two.columns[name])
    for name, codes in one.codes.items():
        assert np.array_equal(codes.codes, two.codes[name].codes)
    for name, clips in one.clips.items():
        assert np.array_equal(clips, two.clips[name])


def test_a_group_whose_loss_would_rise_is_not_scaled(checkpoint: Checkpoint) -> None:
    group = GROUPS[0]
    random = np.random.default_rng(0)
    inputs, weights = np.exp(random.standard_normal((2, 128)))
    tried: list[np.ndarray] = []

    def loss(columns: np.ndarray) -> float:
        tried.append(columns)
        return 1.0 + float(np.abs(columns - 1).sum())

    found = search_scales(group, checkpoint.config, inputs, weights, loss)
    assert found.ratio is None
    assert np.array_equal(found.columns, np.ones(128, np.float32))
    assert len(tried) == 21
    assert found.loss == 1.0


def test_candidates_are_the_papers(checkpoint: Checkpoint) -> None:
    """s = x^a / w^(1 - a), centred so that the greatest and the least are each other's inverse."""
    inputs, weights = np.exp(np.random.default_rng(0).standard_normal((2, 128)))
    tried: list[np.ndarray] = []
    search_scales(
        GROUPS[0],
        checkpoint.config,
        inputs,
        weights,
        lambda columns: float(tried.append(columns) or len(tried)),
    )
    assert np.array_equal(tried[0], np.ones(128))
    for step, found in enumerate(tried[1:]):
        ratio = step / 20
        expected = inputs**ratio / weights ** (1 - ratio)
        expected /= np.sqrt(expected.max() * expected.min())
        np.testing.assert_allclose(found, expected, rtol=2e-3)  # AutoAWQ adds 1e-4 to w^(1 - a)
        assert found.max() * found.min() == pytest.approx(1, rel=1e-5)


def test_a_gain_too_small_to_trust_is_left() -> None:
    group = GROUPS[3]
    inputs, weights = np.exp(np.random.default_rng(0).standard_normal((2, 64)))

    def loss(columns: np.ndarray) -> float:
        return 1.0 if (columns == 1).all() else 0.98

    config: Any = None  # only tied scales need the model's dimensions
    assert search_scales(group, config, inputs, weights, loss).loss == 0.98
    left = search_scales(group, config, inputs, weights, loss, least_gain=0.03)
    assert left.ratio is None
    assert left.loss == 1.0


def test_magnitudes_are_relative_to_their_group() -> None:
    weight = np.array([[1, -2, 0, 0], [4, 4, -1, 3]], np.float32)
    expected = [(0.5 + 1) / 2, (1 + 1) / 2, (0 + 1 / 3) / 2, (0 + 1) / 2]
    assert np.allclose(relative_magnitudes(weight, 2), expected)


def test_rows_are_sampled_evenly() -> None:
    assert sampled_rows(6, 3).tolist() == [0, 2, 4]
    assert sampled_rows(2, 3).tolist() == [0, 1]
