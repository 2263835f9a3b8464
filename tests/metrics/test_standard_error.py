"""Standard errors against scipy, the sandwich formula, the jackknife and simulated texts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import signal, stats

from phiconv.metrics import METRICS, STANDARD_ERRORS, PositionStatistics, known_error, summarise
from phiconv.metrics.standard_error import noise_factor, standard_error

ERRORS = {name: metric.error for name, metric in METRICS.items() if metric.error}


def statistics(windows: int, length: int = 64, seed: int = 0) -> PositionStatistics:
    """A measurement of texts of which some are harder than others."""
    random, shape = np.random.default_rng(seed), (windows, length)
    hard = random.lognormal(0, 0.6, (windows, 1))
    kl = random.lognormal(-4, 1, shape) * hard
    reference = -random.exponential(2.5, shape) * hard
    candidate = reference - 10 * kl * random.normal(1, 1, shape)
    reference[:, -1] = candidate[:, -1] = np.nan
    nothing = np.zeros(shape)
    return PositionStatistics(
        kl_divergence=kl,
        top1_equal=random.random(shape) > 0.1 * hard,
        top5_shared=nothing.astype(np.int8),
        max_logit_error=nothing,
        mean_squared_logit_error=nothing,
        cosine=nothing,
        reference_log_probability=reference,
        candidate_log_probability=candidate,
    )


def sandwich(values: np.ndarray) -> float:
    """The textbook's cluster-robust error of a regression on a constant, windows as clusters."""
    bread, meat = 0.0, 0.0
    mean = np.nanmean(values)
    for window in values:
        known = window[~np.isnan(window)]
        design = np.ones((len(known), 1))
        score = design.T @ (known - mean)
        meat += float(score @ score)
        bread += float((design.T @ design)[0, 0])
    clusters = len(values)
    return float(np.sqrt(clusters / (clusters - 1) * meat / bread**2))


@pytest.mark.parametrize("windows", [4, 9])
@pytest.mark.parametrize(
    ("metric", "field"), [("kl_divergence.mean", "kl_divergence"), ("top1_agreement", "top1_equal")]
)
def test_the_error_of_a_mean_is_that_of_its_windows_means(
    metric: str, field: str, windows: int
) -> None:
    found = statistics(windows)
    values = getattr(found, field).astype(float)
    error = summarise(found)[ERRORS[metric]]
    assert error == pytest.approx(stats.sem(values.mean(axis=1)), rel=1e-12)
    assert error == pytest.approx(sandwich(values), rel=1e-12)


def test_the_error_of_the_ratio_is_the_sandwich_of_its_logarithm() -> None:
    found = statistics(9)
    metrics = summarise(found)
    log_ratio = found.reference_log_probability - found.candidate_log_probability
    expected = metrics["perplexity.ratio"] * sandwich(log_ratio)
    assert metrics["perplexity.ratio_standard_error"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("metric", list(ERRORS))
def test_every_error_is_about_the_jackknifes(metric: str) -> None:
    """Leaving out a window at a time needs no derivative; both agree to a term of 1 / windows."""
    found, windows = statistics(60), 60
    left = [
        summarise(PositionStatistics(*(np.delete(v, i, axis=0) for v in vars(found).values())))
        for i in range(windows)
    ]
    values = np.array([metrics[metric] for metrics in left])
    jackknife = np.sqrt((windows - 1) / windows * np.sum((values - values.mean()) ** 2))
    assert summarise(found)[ERRORS[metric]] == pytest.approx(jackknife, rel=0.02)


def test_windows_of_unequal_length_weigh_by_their_positions() -> None:
    values = np.random.default_rng(1).normal(size=(6, 40))
    values[2, 10:] = values[4, 33:] = np.nan
    assert standard_error(values) == pytest.approx(sandwich(values), rel=1e-12)


@pytest.mark.parametrize("windows", [1, 3])
def test_positions_of_few_windows_count_one_by_one(windows: int) -> None:
    found = statistics(windows)
    expected = stats.sem(found.kl_divergence.ravel())
    assert summarise(found)["kl_divergence.standard_error"] == pytest.approx(expected, rel=1e-12)


def texts(trials: int, windows: int, length: int, seed: int) -> np.ndarray:
    """Divergences of mean 1: skewed, alike next to each other, larger throughout a hard text."""
    random = np.random.default_rng(seed)
    steps = random.normal(size=(trials, windows, length + 50))
    near = signal.lfilter([np.sqrt(1 - 0.8**2)], [1, -0.8], steps)[..., 50:]
    logarithm = near + 0.3 * random.normal(size=(trials, windows, 1))
    return np.asarray(np.exp(logarithm - (1 + 0.3**2) / 2))


@pytest.mark.parametrize("windows", [8, 32])
def test_of_texts_that_hang_together_the_stated_interval_covers_what_it_says(windows: int) -> None:
    """500 measurements: 95 % should hold the truth; taking positions for independent, half do."""
    found = texts(500, windows, 200, seed=windows)
    means = found.mean(axis=(1, 2))
    errors = np.array([standard_error(trial) for trial in found])
    covered = np.mean(np.abs(means - 1) <= noise_factor(windows) * errors)
    assert 0.90 < covered < 0.975
    assert errors.mean() == pytest.approx(means.std(), rel=0.12), "it is the spread that it states"
    by_position = stats.sem(found.reshape(500, -1), axis=1)
    assert np.mean(np.abs(means - 1) <= 1.96 * by_position) < 0.55
    assert by_position.mean() < means.std() / 2


def test_positions_that_are_independent_are_not_made_uncertain() -> None:
    found = np.random.default_rng(5).exponential(size=(500, 8, 64))
    errors = np.array([standard_error(trial) for trial in found])
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(1 / np.sqrt(8 * 64), rel=0.05)


@pytest.mark.parametrize(
    ("windows", "rel"), [(4, 2e-3), (5, 4e-4), (8, 3e-5), (16, 1e-6), (64, 1e-9), (1000, 1e-12)]
)
def test_the_noise_is_students_t(windows: int, rel: float) -> None:
    expected = stats.t.ppf(0.975, windows - 1)
    assert noise_factor(windows) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_the_noise_of_few_windows_is_normal(windows: int) -> None:
    assert noise_factor(windows) == pytest.approx(stats.norm.ppf(0.975))


def test_what_says_nothing_has_no_error() -> None:
    assert np.isnan(standard_error(np.array([1.0])))
    assert standard_error(np.array([1.0, 4.0])) == pytest.approx(stats.sem([1.0, 4.0]))
    assert np.isnan(standard_error(np.full((8, 4), np.nan)))
    lost = statistics(8)
    lost = replace(lost, candidate_log_probability=lost.candidate_log_probability - 1e6)
    metrics = summarise(lost)
    assert np.isinf(metrics["perplexity.ratio"])
    assert not np.isfinite(metrics["perplexity.ratio_standard_error"])


def test_errors_are_known_where_windows_were_counted() -> None:
    metrics = summarise(statistics(8))
    assert set(ERRORS.values()) == STANDARD_ERRORS <= set(metrics)
    for name, error in ERRORS.items():
        assert known_error(metrics, name) == metrics[error] > 0
    assert known_error(metrics, "kl_divergence.p99") is None
    assert known_error(metrics, "no metric") is None
    older = {name: value for name, value in metrics.items() if not name.startswith("top1")}
    assert known_error(older, "kl_divergence.mean") is None, "it counted positions"
