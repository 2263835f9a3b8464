"""Measures an artifact on both sides of the lengths at which its model computes something else.

By prefill and by decoding across, against the reference's logits there. A quantized artifact has
an error everywhere, so what counts is whether it is of another order beyond the boundary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from phiconv.report.results import Check, KnownLimit, LengthProbe
from phiconv.runtimes import GeneratingRuntime, Runtime
from phiconv.stages.checks import Checked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import ModelConfig
    from phiconv.metrics import PositionStatistics
    from phiconv.runtimes.length_reference import BoundaryReference
    from phiconv.runtimes.reference import LanguageModelHead

METRIC = "length_probes.unexplained"

# Medians of 32 positions of one text differ by a factor of 3 or so by chance; a wrong rotation or
# a missing window, where it shows at all, by hundreds. Below the floor both are rounding: it is
# about a logit error of 0.005.
_ANOTHER_ORDER = 16.0
_FLOOR = 1e-5


def measure(
    runtime: Runtime,
    references: Sequence[BoundaryReference],
    head: LanguageModelHead,
    limits: Sequence[KnownLimit],
) -> tuple[LengthProbe, ...]:
    """Compares an opened artifact with the reference around each boundary.

    Args:
        runtime: The artifact; one that decodes is also made to decode across.
        references: Around each boundary.
        head: The checkpoint's head.
        limits: What the runtime is known to do otherwise.

    Raises:
        StageError: The artifact cannot be run on this many tokens.
    """
    return tuple(
        probe
        for reference in references
        for probe in _probes(runtime, reference, head.logits(reference.hidden), limits)
    )


def _probes(
    runtime: Runtime,
    reference: BoundaryReference,
    expected: NDArray[np.float32],
    limits: Sequence[KnownLimit],
) -> Iterator[LengthProbe]:
    prefill = _compared(_prefilled(runtime, reference), expected)
    probe = _probe(reference, "prefill", prefill)
    before = probe.kl_below or 0.0
    yield _judged(probe, before, limits)
    if isinstance(runtime, GeneratingRuntime):
        decoded = _compared(runtime.decode_logits(reference.tokens, reference.start), expected)
        yield _judged(_probe(reference, "decoding", decoded), before, limits)


def _prefilled(runtime: Runtime, reference: BoundaryReference) -> NDArray[np.float32]:
    """Logits of the compared positions: those before the boundary of a text that ends there."""
    import numpy as np

    position, start = reference.boundary.position, reference.start
    parts = []
    for length, first in ((position, start), (len(reference.tokens), position)):
        logits = next(iter(runtime.logits(reference.tokens[None, :length])))
        parts.append(logits[first:length].copy())
        del logits  # a second prefill's worth of logits can be gigabytes
    return np.concatenate(parts)


def _compared(found: NDArray[np.float32], expected: NDArray[np.float32]) -> PositionStatistics:
    import numpy as np

    from phiconv.metrics import NO_TARGET, compare_logits

    return compare_logits(expected, found, np.full(len(expected), NO_TARGET))


def _probe(
    reference: BoundaryReference,
    reached: Literal["prefill", "decoding"],
    found: PositionStatistics,
) -> LengthProbe:
    import numpy as np

    below = reference.below
    kl, error = found.kl_divergence, found.max_logit_error
    return LengthProbe(
        boundary=reference.boundary.kind,
        position=reference.boundary.position,
        reached=reached,
        positions=len(kl) - below,
        kl_below=float(np.median(kl[:below])),
        kl_above=float(np.median(kl[below:])),
        logit_error_below=float(error[:below].max()),
        logit_error_above=float(error[below:].max()),
        departs=False,
    )


def _judged(probe: LengthProbe, before: float, limits: Sequence[KnownLimit]) -> LengthProbe:
    """The probe with its verdict; `before` is the median KL of a text that ends at the boundary."""
    import math

    most = _ANOTHER_ORDER * before + _FLOOR
    sides = ((probe.kl_below, 0), (probe.kl_above, probe.position))
    # not <=, which is false for NaN
    departing = [first for kl, first in sides if kl is None or not kl <= most or math.isnan(kl)]
    if not departing:
        return probe
    explaining = [limit for limit in limits if limit.from_position <= departing[0]]
    statement = explaining[0].statement if explaining else ""
    return replace(probe, departs=True, limit=statement)


def checked(probes: Sequence[LengthProbe], config: ModelConfig) -> Checked:
    """The check of a report, and the count that the built-in gate judges."""
    from phiconv.runtimes.length_limits import boundaries

    departing = [probe for probe in probes if probe.departs]
    unexplained = [probe for probe in departing if not probe.limit]
    counts = {METRIC: float(len(unexplained))}
    if not probes:
        far = ", ".join(f"{found.kind} at {found.position:,}" for found in boundaries(config))
        summary = f"{far}: too far to be probed" if far else "no window, no switch of factors"
        return Checked((Check("length probes", "clean", summary, (), (METRIC,)),), counts)
    summary = f"{len(probes)} compared, " + (
        f"{len(departing)} leave the reference: {len(departing) - len(unexplained)} by known "
        f"limits, {len(unexplained)} otherwise"
        if departing
        else "none leaves the reference"
    )
    state: Literal["errors", "warnings", "clean"] = (
        "errors" if unexplained else "warnings" if departing else "clean"
    )
    lines = tuple(_line(probe) for probe in sorted(probes, key=_gravity))
    return Checked((Check("length probes", state, summary, lines, (METRIC,)),), counts)


def _gravity(probe: LengthProbe) -> tuple[bool, bool]:
    return (not (probe.departs and not probe.limit), not probe.departs)


def _line(probe: LengthProbe) -> str:
    from phiconv.report.text import number

    line = (
        f"{probe.boundary} at {probe.position:,} by {probe.reached}: median KL divergence "
        f"{number(probe.kl_below)} before, {number(probe.kl_above)} from there on"
    )
    if not probe.departs:
        return line
    return f"{line}; known: {probe.limit}" if probe.limit else f"{line}; not known why"
