from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax, softmax

from phiconv.errors import StageError
from phiconv.metrics import (
    METRICS,
    NO_TARGET,
    PositionStatistics,
    compare_logits,
    compare_windows,
    summarise,
)
from phiconv.metrics.summary import decode_error, greedy_agreement

RNG = np.random.default_rng(0)
REFERENCE = (RNG.standard_normal((3, 20, 101)) * 3).astype(np.float32)
CANDIDATE = (REFERENCE + RNG.standard_normal(REFERENCE.shape)).astype(np.float32)
WINDOWS = RNG.integers(0, 101, (3, 20))


@pytest.fixture(scope="module")
def metrics() -> dict[str, float]:
    return summarise(positions())


def positions() -> PositionStatistics:
    return compare_windows(WINDOWS, CANDIDATE, lambda w, start, stop: REFERENCE[w, start:stop])


def negative_log_likelihood(logits: np.ndarray) -> np.ndarray:
    """By torch's cross entropy, the next token of every position but each window's last."""
    return (
        torch.nn.functional.cross_entropy(
            torch.from_numpy(logits[:, :-1]).double().flatten(0, 1),
            torch.from_numpy(WINDOWS[:, 1:]).flatten(),
            reduction="none",
        )
        .numpy()
        .astype(np.float64)
    )


def test_kl_statistics(metrics: dict[str, float]) -> None:
    p = softmax(REFERENCE.astype(np.float64), axis=-1)
    log_ratio = log_softmax(REFERENCE.astype(np.float64), -1) - log_softmax(
        CANDIDATE.astype(np.float64), -1
    )
    kl = (p * log_ratio).sum(-1).ravel()
    assert metrics["kl_divergence.mean"] == pytest.approx(kl.mean(), rel=1e-12)
    assert metrics["kl_divergence.standard_error"] == pytest.approx(stats.sem(kl), rel=1e-12)
    assert metrics["kl_divergence.median"] == pytest.approx(np.median(kl), rel=1e-12)
    for q in (90, 99):
        expected = stats.scoreatpercentile(kl, q)
        assert metrics[f"kl_divergence.p{q}"] == pytest.approx(expected, rel=1e-12)
    assert metrics["kl_divergence.max"] == pytest.approx(kl.max(), rel=1e-12)


def test_agreement(metrics: dict[str, float]) -> None:
    top_r, top_c = (torch.from_numpy(x).topk(5, dim=-1).indices for x in (REFERENCE, CANDIDATE))
    assert metrics["top1_agreement"] == (top_r[..., 0] == top_c[..., 0]).double().mean().item()
    shared = (top_r[..., :, None] == top_c[..., None, :]).any(-1).double().mean().item()
    assert metrics["top5_agreement"] == pytest.approx(shared, rel=1e-12)
    assert 0.3 < metrics["top1_agreement"] < 1


def test_perplexities_and_their_ratio(metrics: dict[str, float]) -> None:
    reference, candidate = map(negative_log_likelihood, (REFERENCE, CANDIDATE))
    assert metrics["perplexity.reference"] == pytest.approx(math.exp(reference.mean()), rel=1e-12)
    assert metrics["perplexity.candidate"] == pytest.approx(math.exp(candidate.mean()), rel=1e-12)
    ratio = metrics["perplexity.candidate"] / metrics["perplexity.reference"]
    assert metrics["perplexity.ratio"] == pytest.approx(ratio, rel=1e-12)
    error = ratio * stats.sem(candidate - reference)
    assert metrics["perplexity.ratio_standard_error"] == pytest.approx(error, rel=1e-9)


def test_probability_change_and_logit_errors(metrics: dict[str, float]) -> None:
    delta = np.exp(-negative_log_likelihood(CANDIDATE)) - np.exp(
        -negative_log_likelihood(REFERENCE)
    )
    assert metrics["rms_delta_p"] == pytest.approx(math.sqrt((delta**2).mean()), rel=1e-9)
    difference = CANDIDATE.astype(np.float64) - REFERENCE
    assert metrics["logit_error.max"] == np.abs(difference).max()
    assert metrics["logit_error.rms"] == pytest.approx(math.sqrt((difference**2).mean()))
    cosine = torch.nn.functional.cosine_similarity(
        torch.from_numpy(REFERENCE).double(), torch.from_numpy(CANDIDATE).double(), dim=-1
    )
    assert metrics["cosine_similarity.mean"] == pytest.approx(cosine.mean().item(), rel=1e-12)
    assert metrics["cosine_similarity.min"] == pytest.approx(cosine.min().item(), rel=1e-12)


def test_every_metric_is_documented_and_summarised_generated_or_counted() -> None:
    summarised = set(summarise(positions()))
    assert summarised == {name for name, metric in METRICS.items() if metric.source == "logits"}
    for metric in METRICS.values():
        assert (metric.function is not None) == (metric.source in ("logits", "generation"))
        assert metric.description != metric.title, "the function has a docstring"


def test_an_overflowing_perplexity_is_infinite_not_an_error() -> None:
    row = np.zeros((1, 8), dtype=np.float32)
    lost = np.full((1, 8), 5000, dtype=np.float32)
    lost[0, 3] = -5000
    metrics = summarise(compare_logits(row, lost, np.array([3])))
    assert metrics["perplexity.candidate"] == math.inf
    assert math.isnan(metrics["kl_divergence.standard_error"]), "one position has no spread"
    assert math.isnan(metrics["top1_agreement.standard_error"])


def test_comparing_in_chunks_is_comparing_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = np.append(WINDOWS[1, 1:], NO_TARGET)
    whole = compare_logits(REFERENCE[1], CANDIDATE[1], targets).by_window(20)
    monkeypatch.setattr("phiconv.metrics.comparison.CHUNK_POSITIONS", 7)
    asked = []

    def reference(window: int, start: int, stop: int) -> np.ndarray:
        asked.append(stop - start)
        return REFERENCE[1, start:stop]

    found = compare_windows(WINDOWS[1:2], CANDIDATE[1:2], reference)
    assert asked == [7, 7, 6]
    np.testing.assert_array_equal(found.kl_divergence, whole.kl_divergence)
    np.testing.assert_array_equal(found.reference_log_probability, whole.reference_log_probability)


def test_a_nan_names_its_window_and_position() -> None:
    broken = CANDIDATE.copy()
    broken[2, 13, 5] = np.nan
    with pytest.raises(StageError, match="window 2, position 13"):
        compare_windows(WINDOWS, broken, lambda w, start, stop: REFERENCE[w, start:stop])


def test_another_vocabulary_is_an_error_not_a_broadcast() -> None:
    with pytest.raises(StageError, match="vocabulary is 100, the checkpoint's is 101"):
        compare_windows(WINDOWS, CANDIDATE[..., :100], lambda w, a, b: REFERENCE[w, a:b])


def test_progress_is_told_of_every_window() -> None:
    told: list[tuple[int, str]] = []
    compare_windows(
        WINDOWS,
        CANDIDATE,
        lambda w, a, b: REFERENCE[w, a:b],
        lambda n, what: told.append((n, what)),
    )
    assert told == [(20, "window 0"), (20, "window 1"), (20, "window 2")]


def test_generation_metrics() -> None:
    prefill, decode = REFERENCE[0, :4], REFERENCE[0, :4].copy()
    assert decode_error(prefill, decode) == 0
    decode[2, 9] += 0.5
    assert decode_error(prefill, decode) == pytest.approx(0.5, rel=1e-6)
    assert greedy_agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 9, 4])) == 0.75


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_reference_that_is_not_finite_is_not_blamed_on_the_artifact(value: float) -> None:
    broken = REFERENCE.copy()
    broken[1, 4, 7] = value
    with pytest.raises(StageError, match=r"the reference.s .*: window 1, position 4") as found:
        compare_windows(WINDOWS, CANDIDATE, lambda w, start, stop: broken[w, start:stop])
    assert "head" in str(found.value.where)
