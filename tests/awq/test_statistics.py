from __future__ import annotations

import numpy as np
import pytest
import torch

from phiconv.awq import statistics
from phiconv.awq.statistics import StatisticsCollector, sampled_tokens


def collected(values: np.ndarray, limit: int, batch: int) -> statistics.InputStatistics:
    with torch.inference_mode():
        collector = StatisticsCollector(sampled_tokens(len(values), limit))
        for start in range(0, len(values), batch):
            assert collector.add(torch.from_numpy(values[start : start + batch]))
        return collector.result()


@pytest.mark.parametrize(("limit", "strip"), [(100, 1024), (1000, 1024), (37, 16)])
def test_statistics_are_means(limit: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_STRIP", strip)
    monkeypatch.setattr(statistics, "_FLUSH_TOKENS", 30)
    values = np.random.default_rng(0).standard_normal((100, 50)).astype(np.float32)
    found = collected(values, limit, batch=16)
    sample = values[sampled_tokens(100, limit)].astype(np.float64)
    assert np.allclose(found.mean_abs, np.abs(values).mean(axis=0), rtol=1e-6)
    assert np.allclose(found.gram, sample.T @ sample / len(sample), atol=1e-5)
    assert torch.equal(found.gram, found.gram.T)


def test_the_sample_is_spread_evenly() -> None:
    assert sampled_tokens(10, 4).tolist() == [0, 2, 5, 7]
    assert sampled_tokens(3, 10).tolist() == [0, 1, 2]
    assert len(np.unique(sampled_tokens(65536, 16384))) == 16384


def test_threads_do_not_change_the_statistics() -> None:
    values = np.random.default_rng(0).standard_normal((3000, 512)).astype(np.float32)
    before, grams = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        grams.append(collected(values, 3000, batch=1024).gram)
    torch.set_num_threads(before)
    assert torch.equal(*grams)


def test_values_that_are_not_finite_are_told() -> None:
    for bad in (np.nan, np.inf, 1e20):  # whose square is no float32
        values = torch.zeros(4, 8)
        values[2, 3] = bad
        assert not StatisticsCollector(sampled_tokens(4, 4)).add(values)


def test_nothing_has_no_statistics() -> None:
    with pytest.raises(ValueError, match="no inputs"):
        StatisticsCollector(sampled_tokens(4, 4)).result()
