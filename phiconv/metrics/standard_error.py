"""Standard errors, by one definition: of a metric, and of its difference between two measurements.

A metric is a smooth function of means over positions; hence it is, but for terms of higher order,
the mean of one number a position, its influence value (the delta method). The difference of two
measurements of the same tokens is the mean of the differences of theirs.

Positions of one window hang together, since some texts are harder than others, so a window counts
as one draw: the error follows from the sums of the influence values over each window (the
cluster-robust variance of Liang and Zeger 1986, with the factor G / (G - 1) for G windows). With
equal windows and a plain mean that is the standard error of the mean of the windows' means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from phiconv.metrics.positions import PositionValues

FEWEST_WINDOWS = 4
"""With fewer windows their spread says next to nothing: positions count as independent."""

_NORMAL_95 = 1.959963984540054  # a normal variable is within this many deviations in 95 % of cases


def metric_error(values: PositionValues, metric: str) -> float:
    """Standard error of one of `INFLUENCES` as measured; NaN or infinite where it is unknown."""
    with np.errstate(all="ignore"):
        return standard_error(INFLUENCES[metric](values))


def standard_error(influence: NDArray[np.float64]) -> float:
    """Standard error of the mean of influence values, NaN where unknown.

    Clustered by window where there are `FEWEST_WINDOWS`, else as if positions were independent;
    NaN with fewer than two positions.

    Args:
        influence: [windows, positions], or [positions] of one window; NaN where there is none.
    """
    influence = np.atleast_2d(influence)
    known = ~np.isnan(influence)
    count = int(known.sum())
    if count < 2:
        return math.nan
    centred = np.where(known, influence - influence[known].mean(), 0.0)
    windows = len(influence)
    if windows < FEWEST_WINDOWS:
        return float(np.sqrt(np.square(centred).sum() / (count - 1) / count))
    sums = centred.sum(axis=1)
    return float(np.sqrt(windows / (windows - 1) * np.square(sums).sum()) / count)


def noise_factor(windows: int) -> float:
    """How many standard errors noise alone stays within in 95 % of cases.

    Student's t with windows - 1 degrees of freedom, by its expansion about the normal deviate
    (Abramowitz and Stegun 26.7.5; within 0.2 % from three degrees on); for fewer than
    `FEWEST_WINDOWS`, whose positions count one by one, the normal deviate itself.
    """
    z = _NORMAL_95
    if windows < FEWEST_WINDOWS:
        return z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / (windows - 1.0) ** power for power, term in enumerate(terms))


def _kl(values: PositionValues) -> NDArray[np.float64]:
    return values.kl_divergence


def _top1(values: PositionValues) -> NDArray[np.float64]:
    return values.top1_equal.astype(np.float64)


def _candidate_perplexity(values: PositionValues) -> NDArray[np.float64]:
    """exp(mean of -log q): the perplexity x -log q at each position."""
    return _of_exponential(-values.candidate_log_probability)


def _perplexity_ratio(values: PositionValues) -> NDArray[np.float64]:
    """exp(mean of log p - log q)."""
    return _of_exponential(values.reference_log_probability - values.candidate_log_probability)


def _of_exponential(exponents: NDArray[np.float64]) -> NDArray[np.float64]:
    """Influence values of exp(mean of exponents)."""
    return np.asarray(np.exp(_mean(exponents)) * exponents)


def _rms_delta_p(values: PositionValues) -> NDArray[np.float64]:
    """sqrt(mean of (q - p)^2): each square / (2 x the root)."""
    change = np.exp(values.candidate_log_probability) - np.exp(values.reference_log_probability)
    root = np.sqrt(_mean(np.square(change)))
    return np.asarray(np.square(change) / (2 * root) if root else np.zeros_like(change))


def _mean(values: NDArray[np.float64]) -> np.float64:
    """The mean of what is not NaN; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return np.float64(known.mean() if known.size else math.nan)


INFLUENCES: Mapping[str, Callable[[PositionValues], NDArray[np.float64]]] = {
    "kl_divergence.mean": _kl,
    "top1_agreement": _top1,
    "perplexity.candidate": _candidate_perplexity,
    "perplexity.ratio": _perplexity_ratio,
    "rms_delta_p": _rms_delta_p,
}
"""Metric -> its influence values but for a constant, which cancels: their mean is taken off."""
