"""Standard errors of the difference of a metric between two measurements of the same tokens.

Both measurements share the difficulty of every position, so what is looked at is the difference at
each position, which varies far less than either side. A metric is a smooth function of means, hence
its difference is, but for terms of higher order, the mean of one number a position, the difference
of both sides' influence values (the delta method).

Positions of one window hang together, so a window counts as one draw: the error follows from the
sums of the influence values over each window (the cluster-robust variance of Liang and Zeger 1986,
with the factor G / (G - 1) for G windows). With equal windows and a plain mean that is the standard
error of a paired t-test on the means of the windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEWEST_WINDOWS = 4
"""With fewer windows their spread says next to nothing: positions count as independent."""

_NORMAL_95 = 1.959963984540054  # a normal variable is within this many deviations in 95 % of cases


@dataclass(frozen=True)
class PositionValues:
    """What one measurement found at every position; every array is [windows, positions].

    Attributes:
        kl_divergence: KL(reference || candidate), nats, float64.
        top1_equal: Whether both rank the same token first, bool.
        reference_log_probability: log p of the token that follows under the reference, nats,
            float64; NaN at the last position of a window.
        candidate_log_probability: The same under the candidate.
    """

    kl_divergence: NDArray[np.float64]
    top1_equal: NDArray[np.bool_]
    reference_log_probability: NDArray[np.float64]
    candidate_log_probability: NDArray[np.float64]


def paired_errors(baseline: PositionValues, candidate: PositionValues) -> dict[str, float]:
    """Standard errors of candidate minus baseline, by metric; those that are not finite left out.

    Args:
        baseline: One measurement.
        candidate: Another, of the same windows.

    Raises:
        ValueError: The windows are not of one shape.
    """
    shapes = (baseline.kl_divergence.shape, candidate.kl_divergence.shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"windows of shape {shapes[0]} against {shapes[1]}")
    with np.errstate(all="ignore"):
        found = {
            name: standard_error(influence(candidate) - influence(baseline))
            for name, influence in _INFLUENCES.items()
        }
    return {name: error for name, error in found.items() if math.isfinite(error)}


def standard_error(influence: NDArray[np.float64]) -> float:
    """Standard error of the mean of influence values [windows, positions], NaN where unknown.

    Clustered by window where there are `FEWEST_WINDOWS`, else as if positions were independent;
    NaN with fewer than two positions.
    """
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
    return np.asarray(np.exp(np.nanmean(exponents)) * exponents)


def _rms_delta_p(values: PositionValues) -> NDArray[np.float64]:
    """sqrt(mean of (q - p)^2): each square / (2 x the root)."""
    change = np.exp(values.candidate_log_probability) - np.exp(values.reference_log_probability)
    root = np.sqrt(np.nanmean(np.square(change)))
    return np.asarray(np.square(change) / (2 * root) if root else np.zeros_like(change))


_INFLUENCES: Mapping[str, Callable[[PositionValues], NDArray[np.float64]]] = {
    "kl_divergence.mean": _kl,
    "top1_agreement": _top1,
    "perplexity.candidate": _candidate_perplexity,
    "perplexity.ratio": _perplexity_ratio,
    "rms_delta_p": _rms_delta_p,
}
"""Metric -> its influence values but for a constant, which cancels: their mean is taken off."""
