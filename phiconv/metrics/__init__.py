"""Metrics of a candidate's logits against the reference's; `METRICS` names every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from phiconv.metrics import summary
from phiconv.metrics.comparison import compare_windows
from phiconv.metrics.positions import (
    NO_TARGET,
    TOP_K,
    PositionStatistics,
    compare_logits,
)

__all__ = [
    "METRICS",
    "NO_TARGET",
    "TOP_K",
    "Metric",
    "PositionStatistics",
    "compare_logits",
    "compare_windows",
    "summarise",
]


@dataclass(frozen=True)
class Metric:
    """One number of a measurement.

    Attributes:
        title: What a report calls it.
        better: Which way is better, for comparisons.
        unit: `nats`, `share` (of 1), or empty.
        function: How it is computed; takes `PositionStatistics` unless `needs_generation`.
        needs_generation: Whether only a runtime that generates (`onnxruntime-genai`) measures it.
    """

    title: str
    better: Literal["lower", "higher", "neither"]
    unit: str
    function: Callable[..., float]
    needs_generation: bool = False

    @property
    def description(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or self.title).splitlines()[0]


METRICS: dict[str, Metric] = {
    "kl_divergence.mean": Metric("Mean KL divergence", "lower", "nats", summary.kl_mean),
    "kl_divergence.standard_error": Metric(
        "Standard error of the mean KL divergence", "neither", "nats", summary.kl_standard_error
    ),
    "kl_divergence.median": Metric("Median KL divergence", "lower", "nats", summary.kl_median),
    "kl_divergence.p90": Metric("KL divergence, 90th percentile", "lower", "nats", summary.kl_p90),
    "kl_divergence.p99": Metric("KL divergence, 99th percentile", "lower", "nats", summary.kl_p99),
    "kl_divergence.max": Metric("Greatest KL divergence", "lower", "nats", summary.kl_max),
    "top1_agreement": Metric("Top-1 agreement", "higher", "share", summary.top1_agreement),
    "top5_agreement": Metric("Top-5 agreement", "higher", "share", summary.top5_agreement),
    "perplexity.reference": Metric(
        "Perplexity of the reference", "neither", "", summary.reference_perplexity
    ),
    "perplexity.candidate": Metric(
        "Perplexity of the artifact", "lower", "", summary.candidate_perplexity
    ),
    "perplexity.ratio": Metric("Perplexity ratio", "lower", "", summary.perplexity_ratio),
    "perplexity.ratio_standard_error": Metric(
        "Standard error of the perplexity ratio",
        "neither",
        "",
        summary.perplexity_ratio_standard_error,
    ),
    "rms_delta_p": Metric(
        "RMS change of the next token's probability", "lower", "share", summary.rms_delta_p
    ),
    "logit_error.max": Metric("Greatest logit error", "lower", "", summary.logit_error_max),
    "logit_error.rms": Metric("RMS logit error", "lower", "", summary.logit_error_rms),
    "cosine_similarity.mean": Metric("Mean cosine of logits", "higher", "", summary.cosine_mean),
    "cosine_similarity.min": Metric("Least cosine of logits", "higher", "", summary.cosine_min),
    "decode_error.max": Metric(
        "Greatest logit error, decoding against prefill",
        "lower",
        "",
        summary.decode_error,
        needs_generation=True,
    ),
    "greedy_agreement": Metric(
        "Greedy generation agreement",
        "higher",
        "share",
        summary.greedy_agreement,
        needs_generation=True,
    ),
}


def summarise(positions: PositionStatistics) -> dict[str, float]:
    """Every metric that follows from the per-position statistics, by name."""
    return {
        name: metric.function(positions)
        for name, metric in METRICS.items()
        if not metric.needs_generation
    }
