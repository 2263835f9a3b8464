"""`phiconv release` and `phiconv verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from phiconv.cli.options import (
    json_option,
    print_json,
    quiet_option,
    threads_option,
    verbose_option,
)

if TYPE_CHECKING:
    from phiconv.release import Released
    from phiconv.verify import Verification

DAMAGED_CODE = 3


@click.command()
@click.argument(
    "places",
    nargs=-1,
    required=True,
    metavar="DIST...",
    type=click.Path(path_type=Path, exists=True),
)
@click.option(
    "--to",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the release; one that stands there is replaced as a whole.",
)
@click.option("--name", help="Title of the model card [default: after the source model].")
@click.option(
    "--base-model",
    metavar="ORG/NAME",
    help="Hub id of the source model, where it was built from a local folder.",
)
@click.option(
    "--allow",
    multiple=True,
    metavar="not-run:PROVIDER",
    help="Release artifacts whose gates were not run on PROVIDER (cpu, cuda, dml or llama.cpp); "
    "the model card then says so. Repeatable.",
)
@click.option(
    "--builder-id",
    metavar="URI",
    default="urn:phiconv:local",
    show_default=True,
    help="Who builds, for the provenance statement.",
)
@threads_option
@quiet_option
@verbose_option
def release(
    places: tuple[Path, ...],
    to: Path,
    name: str | None,
    base_model: str | None,
    allow: tuple[str, ...],
    builder_id: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """Put several builds into a folder that can be published.

    DIST are output folders of `phiconv build`, or folders of such. The release holds the artifacts
    where their recipes say, a model card, the model's licence, the reports, SHA256SUMS, a bill of
    materials and a provenance statement. Every gate must have passed on its target.
    """
    from phiconv import machine
    from phiconv.progress import make_display
    from phiconv.release import ReleaseOptions, assemble, plan_release
    from phiconv.workspace import Workspace

    plan = plan_release(places, ReleaseOptions(name, base_model, allow, builder_id))
    display = make_display(sys.stderr, quiet=quiet)
    try:
        progress = display.step("release", str(to), lambda: 0)
        progress.start(sum(item.size_bytes for item in plan.items))
        done = assemble(
            plan,
            to,
            Workspace.default(),
            threads=threads or machine.threads(),
            on_bytes=lambda count: progress.advance(count, "copying"),
        )
    finally:
        display.close()
    if not quiet:
        _print_release(done)


def _print_release(done: Released) -> None:
    from phiconv.cli.outcomes import print_lines
    from phiconv.units import size_text

    lines: list[tuple[str, str | None]] = []
    for item in done.plan.items:
        lines.append((f"  {item.path}  {size_text(item.size_bytes)}", None))
        lines += [
            (f"    not run on {waiver.provider}: {waiver.verdict}", "yellow")
            for waiver in item.waivers
        ]
    size = size_text(done.size_bytes)
    print_lines([(f"{done.path}: {done.plan.name}, {done.files} files, {size}", "green"), *lines])


@click.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--ignore-missing",
    is_flag=True,
    help="Do not mind files of a release that are not there, such as after the download of one "
    "artifact of several.",
)
@threads_option
@json_option
@verbose_option
def verify(path: Path, ignore_missing: bool, threads: int | None, as_json: bool) -> int:
    """Check that a release or an artifact is whole.

    DIR is a release, an output folder of `phiconv build`, the folder of an artifact, or a GGUF
    file. Checks every digest, every list against the files, external data, genai_config.json
    against the graph, and GGUF headers; needs no network and runs no model.
    """
    from phiconv import machine
    from phiconv.progress import make_display
    from phiconv.verify import verify as verify_path

    display = make_display(sys.stderr, quiet=not sys.stderr.isatty())
    try:
        progress = display.step("verify", str(path), lambda: 0)
        progress.start(None)
        found = verify_path(
            path,
            partial=ignore_missing,
            threads=threads or machine.threads(),
            on_bytes=lambda count: progress.advance(count, "hashing"),
        )
    finally:
        display.close()
    if as_json:
        from dataclasses import asdict

        print_json({**asdict(found), "path": str(found.path), "whole": not found.problems})
    else:
        _print_verification(found)
    return DAMAGED_CODE if found.problems else 0


def _print_verification(found: Verification) -> None:
    from phiconv.cli.annotations import annotate_failures
    from phiconv.cli.outcomes import coloured
    from phiconv.units import size_text

    annotate_failures(f"damaged: {found.path}", map(str, found.problems))
    for problem in found.problems:
        click.echo(f"damaged: {problem}\n  remedy: {problem.remedy}", err=True)
    for note in found.notes:
        click.echo(f"not checked: {note}")
    size = f"{found.files} file{'' if found.files == 1 else 's'}, {size_text(found.size_bytes)}"
    count = len(found.problems)
    verdict = f"{count} problem{'' if count == 1 else 's'}" if count else "whole"
    text = f"{found.path}: {found.kind} of {size}: {verdict}"
    click.echo(coloured(text, "red" if count else "green"))
