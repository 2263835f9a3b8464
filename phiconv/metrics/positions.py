"""Per-position statistics of a candidate's logits against a reference's.

A comparison of T x V logits is reduced at once to a few numbers a position; every metric is a
function of those (`phiconv.metrics.summary`), so memory grows with tokens, never with tokens x
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

NO_TARGET = -1
"""Target id of a position that has no next token: the last one of a window."""

TOP_K = 5

# Work buffers hold this many logits, so that the five float64 ones stay in a core's caches.
_BLOCK_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class PositionValues:
    """What a report keeps of every position; every array is [windows, positions].

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


@dataclass(frozen=True)
class PositionStatistics:
    """What is kept of each position: [n] of a block of them, [windows, positions] of windows.

    Attributes:
        kl_divergence: KL(reference || candidate) of the next-token distributions, nats, float64.
        top1_equal: Whether both have their greatest logit at the same id, bool.
        top5_shared: How many of the five greatest ids are common, int8.
        max_logit_error: max |reference - candidate| over the vocabulary, float64.
        mean_squared_logit_error: mean (reference - candidate)^2 over the vocabulary, float64.
        cosine: Cosine of the two logit vectors, float64; 0 where one of them is all zeros.
        reference_log_probability: log p of the target id under the reference, nats, float64; NaN
            where there is no target.
        candidate_log_probability: The same under the candidate.
    """

    kl_divergence: NDArray[np.float64]
    top1_equal: NDArray[np.bool_]
    top5_shared: NDArray[np.int8]
    max_logit_error: NDArray[np.float64]
    mean_squared_logit_error: NDArray[np.float64]
    cosine: NDArray[np.float64]
    reference_log_probability: NDArray[np.float64]
    candidate_log_probability: NDArray[np.float64]

    @classmethod
    def concatenate(cls, parts: Sequence[PositionStatistics]) -> PositionStatistics:
        """Joins parts in order."""
        return cls(
            *(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls))
        )

    @property
    def values(self) -> PositionValues:
        """The part from which standard errors follow."""
        return PositionValues(*(getattr(self, f.name) for f in fields(PositionValues)))

    def by_window(self, length: int) -> PositionStatistics:
        """The same [windows, length]: what stood one window after the other is cut up again."""
        return PositionStatistics(
            *(getattr(self, f.name).reshape(-1, length) for f in fields(self))
        )

    @classmethod
    def empty(cls, positions: int) -> PositionStatistics:
        """Statistics of `positions` positions, to be filled in."""
        wide = [np.empty(positions) for _ in range(6)]
        return cls(
            wide[0],
            np.empty(positions, dtype=np.bool_),
            np.empty(positions, dtype=np.int8),
            *wide[1:],
        )

    def first_non_finite(self) -> int | None:
        """The first position where a logit was NaN or infinite, or None."""
        bad = np.flatnonzero(~np.isfinite(self.max_logit_error))
        return int(bad[0]) if bad.size else None


def compare_logits(
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    targets: NDArray[np.int64],
) -> PositionStatistics:
    """Compares two blocks of logits position by position.

    Everything is summed in float64 from the float32 logits as they are. A KL divergence is exact to
    about 1e-14 nats: one of 1e-12 is still a measurement. The arguments are not changed.

    Args:
        reference: Logits of the reference, [n, V] float32.
        candidate: Logits of the candidate, [n, V] float32.
        targets: The token that follows each position, [n] int64, or `NO_TARGET`.

    Returns:
        The statistics of the n positions. A position with a NaN or infinite logit has a
        `max_logit_error` that is not finite, and so are its other figures: see
        `PositionStatistics.first_non_finite`.

    Raises:
        ValueError: The shapes do not fit, V < 5, or a target is outside the vocabulary.
    """
    if reference.ndim != 2 or reference.shape != candidate.shape:
        raise ValueError(f"logits of shape {reference.shape} against {candidate.shape}")
    positions, vocabulary = reference.shape
    if vocabulary < TOP_K:
        raise ValueError(f"a vocabulary of {vocabulary} has no {TOP_K} greatest ids")
    if targets.shape != (positions,):
        raise ValueError(f"targets of shape {targets.shape} for {positions} positions")
    if np.any((targets >= vocabulary) | ((targets < 0) & (targets != NO_TARGET))):
        raise ValueError(f"a target id is outside the vocabulary of {vocabulary}")
    statistics = PositionStatistics.empty(positions)
    rows = max(1, _BLOCK_ELEMENTS // vocabulary)
    work = _Buffers(min(rows, positions), vocabulary)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, positions, rows):
            block = slice(start, min(start + rows, positions))
            _compare_block(
                reference[block], candidate[block], targets[block], work, statistics, block
            )
    return statistics


class _Buffers:
    """Scratch arrays of one comparison, reused by every block."""

    def __init__(self, rows: int, vocabulary: int):
        shape = (rows, vocabulary)
        self.reference, self.candidate, self.difference, self.exponential = (
            np.empty(shape) for _ in range(4)
        )
        self.selection = np.empty(shape, dtype=np.float32)

    def take(self, rows: int) -> tuple[NDArray[np.float64], ...]:
        return (
            self.reference[:rows],
            self.candidate[:rows],
            self.difference[:rows],
            self.exponential[:rows],
        )


def _compare_block(
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    targets: NDArray[np.int64],
    work: _Buffers,
    out: PositionStatistics,
    block: slice,
) -> None:
    rows, vocabulary = reference.shape
    ref, cand, difference, exponential = work.take(rows)
    ref[...] = reference
    cand[...] = candidate
    np.subtract(ref, cand, out=difference)
    every_row = np.arange(rows)

    top_ref = _top_ids(reference, work.selection[:rows])
    top_cand = _top_ids(candidate, work.selection[:rows])
    out.top1_equal[block] = top_ref[:, 0] == top_cand[:, 0]
    out.top5_shared[block] = (top_ref[:, :, None] == top_cand[:, None, :]).sum(axis=(1, 2))

    out.max_logit_error[block] = np.maximum(difference.max(axis=1), -difference.min(axis=1))
    out.mean_squared_logit_error[block] = _dot(difference, difference) / vocabulary
    # one root of the product: of equal rows it is their square sum, so that their cosine is 1
    norms = np.sqrt(_dot(ref, ref) * _dot(cand, cand))
    out.cosine[block] = _dot(ref, cand) / np.where(norms == 0, 1, norms)

    target = np.where(targets == NO_TARGET, 0, targets)
    ref_target, cand_target = ref[every_row, target], cand[every_row, target]

    ref_max, cand_max = ref[every_row, top_ref[:, 0]], cand[every_row, top_cand[:, 0]]
    cand_sum = _exponential_sum(cand, cand_max, exponential)
    ref_sum = _exponential_sum(ref, ref_max, exponential)
    # exponential now holds exp(ref - max); KL = sum p (ref - cand) - (lse(ref) - lse(cand)), where
    # the maxima are taken from each other first: logits are large, their differences are not
    mean_difference = _dot(exponential, difference) / ref_sum
    divergence = mean_difference - (ref_max - cand_max) - (np.log(ref_sum) - np.log(cand_sum))
    # one below the rounding of its terms may come out a hair under zero
    out.kl_divergence[block] = np.maximum(divergence, 0)

    known = targets != NO_TARGET
    ref_log_p = ref_target - ref_max - np.log(ref_sum)
    cand_log_p = cand_target - cand_max - np.log(cand_sum)
    out.reference_log_probability[block] = np.where(known, ref_log_p, np.nan)
    out.candidate_log_probability[block] = np.where(known, cand_log_p, np.nan)


def _dot(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Dot product of each pair of rows.

    Not np.vecdot: BLAS splits long rows over its threads, which makes the sum depend on their
    number and stalls on a busy machine.
    """
    return np.asarray(np.einsum("ij,ij->i", left, right))


def _exponential_sum(
    logits: NDArray[np.float64], maximum: NDArray[np.float64], exponential: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Sum of exp(logits - maximum) of each row, which is left in `exponential`."""
    np.subtract(logits, maximum[:, None], out=exponential)
    np.exp(exponential, out=exponential)
    return np.asarray(exponential.sum(axis=1))


def _top_ids(logits: NDArray[np.float32], selection: NDArray[np.float32]) -> NDArray[np.intp]:
    """The ids of each row's greatest logits, [rows, TOP_K]; the lower id wins a tie.

    Repeated argmax is several times faster than a partition for five of 32,064, and unlike a
    partition it is deterministic for equal logits.
    """
    rows = len(logits)
    every_row = np.arange(rows)
    selection[...] = logits
    top = np.empty((rows, TOP_K), dtype=np.intp)
    for rank in range(TOP_K):
        top[:, rank] = selection.argmax(axis=1)
        selection[every_row, top[:, rank]] = -np.inf
    return top
