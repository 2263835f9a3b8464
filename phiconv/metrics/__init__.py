"""Metrics of an artifact; `METRICS` names every one of them.

Most compare the candidate's logits with the reference's. The others count what a check of the
artifact found, so that gates can judge it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    "STANDARD_ERRORS",
    "TOP_K",
    "Metric",
    "PositionStatistics",
    "compare_logits",
    "compare_windows",
    "known_error",
    "summarise",
]


Source = Literal[
    "logits", "generation", "placement", "kernels", "graph", "weights", "parity", "length"
]


@dataclass(frozen=True)
class Metric:
    """One number of a measurement.

    Attributes:
        title: What a report calls it.
        better: Which way is better, for comparisons.
        unit: `nats`, `share` (of 1), the things that are counted, or empty.
        source: What it follows from: the `logits` of every position; the `generation` of a runtime
            that decodes (`onnxruntime-genai`); the `placement` of the nodes; the static check of
            the `kernels` or of the `graph`; the `parity` of tokenizer, template and
            genai_config.json; the probes of `length`.
        function: How it is computed from logits or generation; None for counts.
        about: What a count counts.
        error: The metric that is its standard error; empty where none is measured.
    """

    title: str
    better: Literal["lower", "higher", "neither"]
    unit: str
    source: Source = "logits"
    function: Callable[..., float] | None = None
    about: str = ""
    error: str = ""

    @property
    def description(self) -> str:
        """One sentence: what is counted, or the first line of the function's docstring."""
        return (
            self.about or ((self.function and self.function.__doc__) or self.title).splitlines()[0]
        )


def _logits(
    title: str,
    better: Literal["lower", "higher", "neither"],
    unit: str,
    function: Callable[[PositionStatistics], float],
    error: str = "",
) -> Metric:
    return Metric(title, better, unit, "logits", function, error=error)


def _count(title: str, unit: str, source: Source, about: str) -> Metric:
    return Metric(title, "lower", unit, source, None, about)


METRICS: dict[str, Metric] = {
    "kl_divergence.mean": _logits(
        "Mean KL divergence", "lower", "nats", summary.kl_mean, "kl_divergence.standard_error"
    ),
    "kl_divergence.standard_error": _logits(
        "Standard error of the mean KL divergence", "neither", "nats", summary.kl_standard_error
    ),
    "kl_divergence.median": _logits("Median KL divergence", "lower", "nats", summary.kl_median),
    "kl_divergence.p90": _logits("KL divergence, 90th percentile", "lower", "nats", summary.kl_p90),
    "kl_divergence.p99": _logits("KL divergence, 99th percentile", "lower", "nats", summary.kl_p99),
    "kl_divergence.max": _logits("Greatest KL divergence", "lower", "nats", summary.kl_max),
    "top1_agreement": _logits(
        "Top-1 agreement",
        "higher",
        "share",
        summary.top1_agreement,
        "top1_agreement.standard_error",
    ),
    "top1_agreement.standard_error": _logits(
        "Standard error of the top-1 agreement", "neither", "share", summary.top1_standard_error
    ),
    "top5_agreement": _logits("Top-5 agreement", "higher", "share", summary.top5_agreement),
    "perplexity.reference": _logits(
        "Perplexity of the reference", "neither", "", summary.reference_perplexity
    ),
    "perplexity.candidate": _logits(
        "Perplexity of the artifact", "lower", "", summary.candidate_perplexity
    ),
    "perplexity.ratio": _logits(
        "Perplexity ratio",
        "lower",
        "",
        summary.perplexity_ratio,
        "perplexity.ratio_standard_error",
    ),
    "perplexity.ratio_standard_error": _logits(
        "Standard error of the perplexity ratio",
        "neither",
        "",
        summary.perplexity_ratio_standard_error,
    ),
    "rms_delta_p": _logits(
        "RMS change of the next token's probability", "lower", "share", summary.rms_delta_p
    ),
    "logit_error.max": _logits("Greatest logit error", "lower", "", summary.logit_error_max),
    "logit_error.rms": _logits("RMS logit error", "lower", "", summary.logit_error_rms),
    "cosine_similarity.mean": _logits("Mean cosine of logits", "higher", "", summary.cosine_mean),
    "cosine_similarity.min": _logits("Least cosine of logits", "higher", "", summary.cosine_min),
    "decode_error.max": Metric(
        "Greatest logit error, decoding against prefill",
        "lower",
        "",
        "generation",
        summary.decode_error,
    ),
    "greedy_agreement": Metric(
        "Greedy generation agreement", "higher", "share", "generation", summary.greedy_agreement
    ),
    "placement.fallback": _count(
        "Work off the provider",
        "nodes",
        "placement",
        "MatMul and attention nodes that ran elsewhere than on the provider in use.",
    ),
    "kernels.unserved": _count(
        "Nodes the target does not serve",
        "nodes",
        "kernels",
        "Nodes that the target provider cannot run, and MatMul and attention nodes that it leaves "
        "to the CPU, by the static check of its kernels.",
    ),
    "graph.faults": _count(
        "Faults of the graph",
        "faults",
        "graph",
        "Attributes, constants and connections of the graph, or metadata of a GGUF file, that "
        "contradict config.json.",
    ),
    "weights.faults": _count(
        "Faulty weights",
        "weights",
        "weights",
        "Weights that are not the checkpoint's, or further from them than their format explains.",
    ),
    "parity.tokenizer": _count(
        "Tokenizer differences",
        "texts",
        "parity",
        "Golden texts and vocabulary entries on which the runtime's tokenizer differs from Hugging "
        "Face's, known limitations of the runtime left out.",
    ),
    "parity.template": _count(
        "Chat template differences",
        "texts",
        "parity",
        "Conversations that the runtime renders or tokenizes otherwise than Hugging Face.",
    ),
    "parity.genai_config": _count(
        "Faults of genai_config.json",
        "faults",
        "parity",
        "Faults of genai_config.json and of the tokenizer's files beside it.",
    ),
    "parity.runtime_limitations": _count(
        "Golden texts the runtime cannot take right",
        "texts",
        "parity",
        "Golden texts that differ by known limitations of the runtime.",
    ),
    "length_probes.unexplained": _count(
        "Departures beyond a window or a switch",
        "probes",
        "length",
        "Length probes whose error is of another order than before the sliding window or the "
        "LongRoPE switch, known limits of the runtime left out.",
    ),
}


STANDARD_ERRORS = frozenset(metric.error for metric in METRICS.values() if metric.error)
"""The metrics that are standard errors of others."""

# Measured since standard errors count windows; before, those there were counted positions.
_SINCE_WINDOWS = "top1_agreement.standard_error"


def known_error(metrics: Mapping[str, float | None], name: str) -> float | None:
    """The standard error of one metric of a measurement; None where it is not known.

    That of a measurement of an older phiconv is not: it took positions for independent, and is
    several times too small.
    """
    metric = METRICS.get(name)
    if metric is None or not metric.error or _SINCE_WINDOWS not in metrics:
        return None
    return metrics.get(metric.error)


def summarise(positions: PositionStatistics) -> dict[str, float]:
    """Every metric that follows from the statistics [windows, positions], by name."""
    return {
        name: metric.function(positions)
        for name, metric in METRICS.items()
        if metric.source == "logits" and metric.function is not None
    }
