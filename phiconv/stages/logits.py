"""Runs an artifact on the reference's tokens and compares its logits, for the stage `validate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phiconv.stages.generation import generation_metrics
from phiconv.stages.stage import LENGTH_REFERENCE, StageContext

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from phiconv.metrics import PositionStatistics
    from phiconv.report.results import KnownLimit, LengthProbe, Measurement
    from phiconv.runtimes import Runtime
    from phiconv.runtimes.providers import ProviderChoice
    from phiconv.runtimes.reference import LanguageModelHead
    from phiconv.runtimes.stored_reference import StoredReference
    from phiconv.stages.validate import ValidateParams


def measure(
    artifact: Path,
    params: ValidateParams,
    choice: ProviderChoice,
    reference: StoredReference,
    limits: Sequence[KnownLimit],
    ctx: StageContext,
) -> Measurement:
    """Runs the artifact and compares it; writes the per-position values to `ctx.out`.

    Args:
        artifact: The ONNX model's folder, or the GGUF file or its folder.
        params: How it is measured.
        choice: Where it runs; its provider is not None.
        reference: What it is compared with.
        limits: What the runtime is known to do otherwise, for the length probes.
        ctx: The stage's context.

    Raises:
        StageError: The artifact cannot be run.
    """
    from phiconv.metrics import compare_windows, summarise
    from phiconv.report.distribution import kl_by_position, kl_histogram
    from phiconv.report.positions import POSITIONS
    from phiconv.report.results import Measurement
    from phiconv.runtimes import RUNTIMES, ArtifactFolder, GeneratingRuntime
    from phiconv.runtimes.reference import LanguageModelHead

    folder = ArtifactFolder(artifact, ctx.checkpoint.config.head_dim, ctx.checkpoint)
    head = LanguageModelHead(ctx.checkpoint, device=params.reference_device, threads=ctx.threads)
    runtime = RUNTIMES[params.runtime](folder, choice, ctx.threads)
    positions = compare_windows(
        reference.windows,
        runtime.logits(reference.windows),
        lambda window, start, stop: head.logits(reference.hidden[window, start:stop]),
        ctx.progress.advance,
    )
    metrics: dict[str, float | None] = {**summarise(positions)}
    if isinstance(runtime, GeneratingRuntime):
        metrics |= generation_metrics(runtime, params, reference.windows, head, ctx)
    _save_positions(ctx.out / POSITIONS, positions)
    return Measurement(
        status="measured",
        tokens=reference.tokens,
        provenance=runtime.provenance(),
        metrics=metrics,
        kl_histogram=kl_histogram(positions.kl_divergence),
        kl_by_position=kl_by_position(positions.kl_divergence),
        length_probes=_probed(runtime, params, head, limits, ctx),
    )


def _probed(
    runtime: Runtime,
    params: ValidateParams,
    head: LanguageModelHead,
    limits: Sequence[KnownLimit],
    ctx: StageContext,
) -> tuple[LengthProbe, ...]:
    """The length probes, where they are asked for."""
    from phiconv.runtimes import length_reference
    from phiconv.stages import length_probes

    if not params.length_probes:
        return ()
    ctx.progress.advance(0, "length probes")
    references = length_reference.load(ctx.input(LENGTH_REFERENCE).path)
    return length_probes.measure(runtime, references, head, limits)


def _save_positions(file: Path, positions: PositionStatistics) -> None:
    """Per-position values [n, T], which a report takes over (phiconv/report/positions.py)."""
    import numpy as np

    np.savez(
        file,
        kl_divergence=positions.kl_divergence.astype(np.float32),
        top1_equal=positions.top1_equal,
        reference_log_probability=positions.reference_log_probability,
        candidate_log_probability=positions.candidate_log_probability,
    )
