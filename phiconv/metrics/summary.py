"""The metrics: one pure function each, from per-position statistics to a number.

Standard errors want the statistics by window: see `phiconv.metrics.standard_error`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phiconv.metrics.positions import TOP_K, PositionStatistics
from phiconv.metrics.standard_error import metric_error


def kl_mean(positions: PositionStatistics) -> float:
    """Mean KL(reference || candidate) over positions, nats."""
    return float(positions.kl_divergence.mean())


def kl_standard_error(positions: PositionStatistics) -> float:
    """Standard error of the mean KL divergence, each window one draw, nats."""
    return metric_error(positions.values, "kl_divergence.mean")


def kl_median(positions: PositionStatistics) -> float:
    """Median KL divergence, nats."""
    return float(np.median(positions.kl_divergence))


def kl_p90(positions: PositionStatistics) -> float:
    """90th percentile of the KL divergence (linear interpolation), nats."""
    return float(np.percentile(positions.kl_divergence, 90))


def kl_p99(positions: PositionStatistics) -> float:
    """99th percentile of the KL divergence (linear interpolation), nats."""
    return float(np.percentile(positions.kl_divergence, 99))


def kl_max(positions: PositionStatistics) -> float:
    """Greatest KL divergence, nats."""
    return float(positions.kl_divergence.max())


def top1_agreement(positions: PositionStatistics) -> float:
    """Share of positions at which both models rank the same token first."""
    return float(positions.top1_equal.mean())


def top1_standard_error(positions: PositionStatistics) -> float:
    """Standard error of the top-1 agreement, each window one draw."""
    return metric_error(positions.values, "top1_agreement")


def top5_agreement(positions: PositionStatistics) -> float:
    """Mean share of the reference's five first tokens that the candidate's five first hold too."""
    return float(positions.top5_shared.mean() / TOP_K)


def reference_perplexity(positions: PositionStatistics) -> float:
    """Exp of the reference's mean negative log-likelihood of the next token."""
    return _exp(-_known(positions.reference_log_probability).mean())


def candidate_perplexity(positions: PositionStatistics) -> float:
    """Exp of the candidate's mean negative log-likelihood of the next token."""
    return _exp(-_known(positions.candidate_log_probability).mean())


def perplexity_ratio(positions: PositionStatistics) -> float:
    """Perplexity of the candidate / that of the reference, on the same tokens."""
    log_ratio = positions.reference_log_probability - positions.candidate_log_probability
    return _exp(_known(log_ratio).mean())


def perplexity_ratio_standard_error(positions: PositionStatistics) -> float:
    """Standard error of the ratio, each window one draw: the ratio x that of the mean log ratio."""
    return metric_error(positions.values, "perplexity.ratio")


def rms_delta_p(positions: PositionStatistics) -> float:
    """Root mean square of the change in the next token's probability."""
    reference = np.exp(_known(positions.reference_log_probability))
    candidate = np.exp(_known(positions.candidate_log_probability))
    return float(np.sqrt(np.mean((candidate - reference) ** 2)))


def logit_error_max(positions: PositionStatistics) -> float:
    """Greatest absolute difference of a logit."""
    return float(positions.max_logit_error.max())


def logit_error_rms(positions: PositionStatistics) -> float:
    """Root mean square difference of the logits over positions and vocabulary."""
    return float(np.sqrt(positions.mean_squared_logit_error.mean()))


def cosine_mean(positions: PositionStatistics) -> float:
    """Mean cosine of the two logit vectors."""
    return float(positions.cosine.mean())


def cosine_min(positions: PositionStatistics) -> float:
    """Least cosine of the two logit vectors."""
    return float(positions.cosine.min())


def decode_error(prefill: NDArray[np.float32], decode: NDArray[np.float32]) -> float:
    """Greatest difference of a logit, prefill against token-by-token decoding.

    Args:
        prefill: Logits of one pass over the window, [n, V].
        decode: Logits of the same positions, each from one decode step on the KV cache, [n, V].
    """
    return float(np.abs(prefill.astype(np.float64) - decode).max())


def greedy_agreement(generated: NDArray[np.int64], reference: NDArray[np.int64]) -> float:
    """Share of generated tokens that the reference ranks first after the same prefix.

    1.0 exactly when the runtime's greedy generation equals the reference's: up to the first
    difference both have the same prefix.

    Args:
        generated: Tokens the runtime generated greedily, [n].
        reference: argmax of the reference's logits at the positions that precede them, [n].
    """
    return float((generated == reference).mean())


def _known(log_probability: NDArray[np.float64]) -> NDArray[np.float64]:
    return log_probability[~np.isnan(log_probability)]


def _exp(value: float) -> float:
    """Exp that overflows to infinity, as a report's figure may, instead of raising."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))
