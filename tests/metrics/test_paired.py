"""Paired errors against scipy's t-test and the jackknife."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from phiconv.metrics import PositionStatistics, summarise
from phiconv.metrics.paired import paired_errors
from phiconv.metrics.positions import PositionValues

SHAPE = (12, 64)


def values(seed: int, noise: float = 0.05, windows: int = SHAPE[0]) -> PositionValues:
    """A measurement; all share the tokens' difficulty and differ by noise of their own."""
    shape = (windows, SHAPE[1])
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    difficulty = common.lognormal(-4, 1, shape) * common.lognormal(0, 0.5, (windows, 1))
    reference = -common.exponential(2.5, shape)
    candidate = reference - difficulty + noise * own.normal(size=shape)
    reference[:, -1] = candidate[:, -1] = np.nan
    return PositionValues(
        kl_divergence=difficulty * own.lognormal(0, noise, shape),
        top1_equal=own.random(shape) < 0.9,
        reference_log_probability=reference,
        candidate_log_probability=candidate,
    )


def metrics(found: PositionValues) -> dict[str, float]:
    """The metrics by the functions that measure them."""
    nothing = np.zeros(found.kl_divergence.size)
    return summarise(
        PositionStatistics(
            kl_divergence=found.kl_divergence.ravel(),
            top1_equal=found.top1_equal.ravel(),
            top5_shared=nothing.astype(np.int8),
            max_logit_error=nothing,
            mean_squared_logit_error=nothing,
            cosine=nothing,
            reference_log_probability=found.reference_log_probability.ravel(),
            candidate_log_probability=found.candidate_log_probability.ravel(),
        )
    )


def without_window(found: PositionValues, window: int) -> PositionValues:
    return PositionValues(*(np.delete(array, window, axis=0) for array in vars(found).values()))


@pytest.mark.parametrize(
    ("metric", "field"), [("kl_divergence.mean", "kl_divergence"), ("top1_agreement", "top1_equal")]
)
def test_a_mean_has_the_error_of_a_paired_t_test_on_its_windows(metric: str, field: str) -> None:
    old, new = values(1), values(2)
    means = [getattr(side, field).mean(axis=1) for side in (new, old)]
    difference = metrics(new)[metric] - metrics(old)[metric]
    statistic = stats.ttest_rel(*means).statistic
    assert difference / paired_errors(old, new)[metric] == pytest.approx(statistic, rel=1e-9)


def test_with_few_windows_positions_are_the_pairs_of_the_t_test() -> None:
    old, new = values(1, windows=3), values(2, windows=3)
    difference = new.kl_divergence.mean() - old.kl_divergence.mean()
    statistic = stats.ttest_rel(new.kl_divergence.ravel(), old.kl_divergence.ravel()).statistic
    found = paired_errors(old, new)["kl_divergence.mean"]
    assert difference / found == pytest.approx(statistic, rel=1e-9)


@pytest.mark.parametrize(
    "metric",
    ["kl_divergence.mean", "top1_agreement", "perplexity.candidate", "perplexity.ratio",
     "rms_delta_p"],
)  # fmt: skip
def test_every_error_is_about_the_jackknifes(metric: str) -> None:
    """Leaving out a window at a time needs no derivative; both agree to a term of 1 / windows."""
    old, new = values(1, windows=40), values(2, windows=40)
    left = [
        metrics(without_window(new, window))[metric] - metrics(without_window(old, window))[metric]
        for window in range(40)
    ]
    assert paired_errors(old, new)[metric] == pytest.approx(jackknife(left), rel=0.02)


def jackknife(left: list[float]) -> float:
    """The error of a statistic that has these values with one of the windows left out."""
    return float(np.sqrt((len(left) - 1) / len(left) * np.sum((left - np.mean(left)) ** 2)))


def test_only_changed_probabilities_make_the_error_of_their_root_mean_square() -> None:
    """Where most of the probability lies both models agree."""

    def agreeing(found: PositionValues) -> PositionValues:
        likely = np.arange(SHAPE[1]) % 2 == 0
        reference = np.where(likely, 0.02, 1) * found.reference_log_probability
        candidate = np.where(likely, reference, found.candidate_log_probability)
        return replace(
            found, reference_log_probability=reference, candidate_log_probability=candidate
        )

    old, new = agreeing(values(1, windows=40)), agreeing(values(2, windows=40))
    left = [
        metrics(without_window(new, window))["rms_delta_p"]
        - metrics(without_window(old, window))["rms_delta_p"]
        for window in range(40)
    ]
    found = paired_errors(old, new)["rms_delta_p"]
    assert found == pytest.approx(jackknife(left), rel=0.05)


def test_pairing_takes_away_what_both_share() -> None:
    old, new = values(1), values(2)
    unpaired = np.hypot(*(stats.sem(side.kl_divergence.mean(axis=1)) for side in (old, new)))
    assert paired_errors(old, new)["kl_divergence.mean"] < unpaired / 10


def test_equal_measurements_have_no_error() -> None:
    same = values(1)
    assert set(paired_errors(same, same).values()) == {0.0}
    perfect = replace(same, candidate_log_probability=same.reference_log_probability)
    assert paired_errors(perfect, perfect)["rms_delta_p"] == 0


def test_what_is_not_finite_has_no_error() -> None:
    old, new = values(1), values(2)
    broken = new.kl_divergence.copy()
    broken[3, 4] = np.inf
    found = paired_errors(old, replace(new, kl_divergence=broken))
    assert "kl_divergence.mean" not in found
    assert "perplexity.ratio" in found
    nothing = replace(new, candidate_log_probability=np.full(SHAPE, -np.inf))
    assert "perplexity.ratio" not in paired_errors(old, nothing)


def test_other_windows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(12, 64\) against \(3, 64\)"):
        paired_errors(values(1), values(2, windows=3))
