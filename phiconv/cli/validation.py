"""`phiconv validate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from phiconv.cli.options import quiet_option, rebuild_option, threads_option, verbose_option
from phiconv.cli.outcomes import print_outcomes
from phiconv.cli.subject import subject_options


@click.command()
@subject_options(when_missing=("require", "fallback-cpu", "skip"), windows=8, window_length=512)
@click.option(
    "--runtime",
    type=click.Choice(["onnxruntime", "onnxruntime-genai", "llama.cpp"]),
    help="What runs the artifact [default: onnxruntime, or llama.cpp for a GGUF file]; all but "
    "onnxruntime also decode token by token and generate.",
)
@click.option(
    "--generate-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens of the greedy generation, with a runtime that generates.",
)
@click.option(
    "--length-probes",
    is_flag=True,
    help="Also compare on both sides of the sliding window and of LongRoPE's switch.",
)
@click.option(
    "--reference-device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the fp32 reference is computed.",
)
@click.option(
    "--gates",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="YAML file that maps metrics to min and max, instead of the default gates "
    "(docs/validation.md).",
)
@click.option(
    "--set-gate",
    "settings",
    multiple=True,
    metavar="METRIC.BOUND=V",
    help="Set one limit, such as kl_divergence.mean.max=0.02. Repeatable.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the reports [default: dist/<artifact>-validation].",
)
@threads_option
@rebuild_option
@quiet_option
@verbose_option
def validate(
    artifact: Path,
    reference: str,
    revision: str | None,
    gates: Path | None,
    settings: tuple[str, ...],
    out: Path | None,
    threads: int | None,
    rebuild: bool,
    quiet: bool,
    **measured: Any,
) -> int:
    """Measure any artifact against its checkpoint.

    ARTIFACT is a folder with a decoder as ONNX Runtime GenAI runs it, or a GGUF file, made by
    phiconv or not. The reference and the measurement are kept in the workspace, so that judging by
    other gates runs no model again.
    """
    from phiconv import machine
    from phiconv.errors import GateError
    from phiconv.gates import DEFAULT, DEFAULT_GENERATION
    from phiconv.progress import make_display
    from phiconv.recipe.gates_file import read_gates, with_settings
    from phiconv.stages.validate import ValidateParams
    from phiconv.validation import Subject, default_runtime, validate_artifact
    from phiconv.workspace import Workspace

    measured["runtime"] = measured["runtime"] or default_runtime(artifact)
    generates = ValidateParams(**measured).generates
    default = {**DEFAULT, **DEFAULT_GENERATION} if generates else DEFAULT
    base = default if gates is None else read_gates(gates, generates=generates).limits
    params = ValidateParams(gates=with_settings(base, settings), **measured)
    display = make_display(sys.stderr, quiet=quiet)
    try:
        outcome = validate_artifact(
            Subject(artifact, reference, revision, params),
            Workspace.default(),
            display,
            out=out,
            threads=threads or machine.threads(),
            rebuild=rebuild,
        )
    finally:
        display.close()
    print_outcomes([outcome], quiet)
    if outcome.exit_code == GateError.exit_code and not quiet:
        click.echo("  where it comes from: phiconv diagnose, with the same --reference")
    return outcome.exit_code
