from __future__ import annotations

import itertools

import numpy as np
import pytest

from phiconv.report.distribution import kl_by_position, kl_histogram
from tests.report.results import kl_values


def test_the_histogram_is_numpys() -> None:
    kl = kl_values()
    found = kl_histogram(kl)
    expected, _ = np.histogram(np.log10(kl), bins=found.edges)
    assert found.counts == tuple(expected)
    assert sum(found.counts) == kl.size
    assert len(found.counts) == len(found.edges) - 1


def test_zeros_and_values_beyond_the_edges_are_counted() -> None:
    found = kl_histogram(np.array([[0.0, 1e-30, 1e9, 1.5]]))
    assert found.counts[0] == 2
    assert found.counts[-1] == 1
    assert sum(found.counts) == 4


@pytest.mark.parametrize("length", [1, 31, 32, 33, 512, 1000])
def test_every_position_is_in_one_bin(length: int) -> None:
    kl = np.random.default_rng(1).random((3, length))
    found = kl_by_position(kl)
    assert len(found.starts) <= 32
    edges = [*found.starts, length]
    for index, (start, stop) in enumerate(itertools.pairwise(edges)):
        assert found.mean[index] == pytest.approx(kl[:, start:stop].mean())
        assert found.p90[index] == pytest.approx(np.percentile(kl[:, start:stop], 90))
    assert found.starts[0] == 0
