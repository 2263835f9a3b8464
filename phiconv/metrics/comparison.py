"""Compares a candidate with the reference window by window, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from phiconv.errors import StageError
from phiconv.metrics.positions import NO_TARGET, PositionStatistics, compare_logits

CHUNK_POSITIONS = 512
"""Positions whose reference logits are in memory at once."""


def compare_windows(
    windows: NDArray[np.int64],
    candidate: Iterable[NDArray[np.float32]],
    reference: Callable[[int, int, int], NDArray[np.float32]],
    advance: Callable[[int, str], None] | None = None,
) -> PositionStatistics:
    """Compares all positions of all windows.

    In memory at once are one window of the candidate's logits and `CHUNK_POSITIONS` positions of
    the reference's.

    Args:
        windows: Token ids, int64 [n, T]; the target of a position is the token after it.
        candidate: The candidate's logits of each window in order, float32 [T, V].
        reference: Gives the reference's logits [stop - start, V] for (window, start, stop).
        advance: Called after each window with its number of tokens and its name.

    Returns:
        The statistics [n, T].

    Raises:
        StageError: A logit of either is NaN or infinite, naming whose, window and position; or
            the candidate's vocabulary is not the reference's.
    """
    parts = []
    found = iter(candidate)
    for index, window in enumerate(windows):
        logits = next(found)
        targets = np.append(window[1:], NO_TARGET)
        for start in range(0, len(window), CHUNK_POSITIONS):
            stop = min(start + CHUNK_POSITIONS, len(window))
            expected = reference(index, start, stop)
            if expected.shape[1] != logits.shape[1]:
                raise StageError(
                    f"the artifact's vocabulary is {logits.shape[1]}, the checkpoint's is "
                    f"{expected.shape[1]}",
                    where="the logits' last axis",
                    remedy="validate the artifact against the checkpoint it was made from",
                )
            part = compare_logits(expected, logits[start:stop], targets[start:stop])
            bad = part.first_non_finite()
            if bad is not None:
                finite = bool(np.isfinite(expected[bad]).all())
                raise _not_finite(f"window {index}, position {start + bad}", reference=not finite)
            parts.append(part)
            del expected
        # gone before the next are computed: each may be hundreds of megabytes
        del logits
        if advance is not None:
            advance(len(window), f"window {index}")
    return PositionStatistics.concatenate(parts).by_window(windows.shape[1])


def _not_finite(where: str, *, reference: bool) -> StageError:
    """The error of a logit that is NaN or infinite; the reference's is no fault of the artifact."""
    if reference:
        return StageError(
            f"the reference's logits are not finite (NaN or infinity): {where}",
            where="the checkpoint's head",
            remedy="its weights hold NaN or infinity, or overflow fp32: compare the checkpoint's "
            "files with those of its source",
        )
    return StageError(
        f"the artifact's logits are not finite (NaN or infinity): {where}",
        where="the artifact's output",
        remedy="in fp16 this is mostly an overflow: `phiconv diagnose` names the step where it "
        "begins",
    )
