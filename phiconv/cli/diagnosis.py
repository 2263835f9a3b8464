"""`phiconv diagnose`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phiconv.cli.options import json_option, print_json, threads_option, verbose_option
from phiconv.cli.subject import subject_options

if TYPE_CHECKING:
    from phiconv.diagnosis import Diagnosis
    from phiconv.diagnosis.tables import Table


@click.command()
@subject_options(when_missing=("require", "fallback-cpu"), windows=4, window_length=256)
@threads_option
@click.option("-q", "--quiet", is_flag=True, help="Show the verdict alone.")
@json_option
@verbose_option
def diagnose(
    artifact: Path,
    reference: str,
    revision: str | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
    **measured: Any,
) -> None:
    """Find where the error of an artifact comes from, of an ONNX model or a GGUF file.

    Names the stage of the conversion, the layer and the weight or step at which it enters; see
    docs/diagnosis.md. ARTIFACT is a folder as `phiconv validate` takes it.
    """
    from phiconv import machine
    from phiconv.progress import make_display
    from phiconv.stages.validate import ValidateParams
    from phiconv.validation import Subject, diagnose_artifact
    from phiconv.workspace import Workspace

    subject = Subject(artifact, reference, revision, ValidateParams(**measured))
    display = make_display(sys.stderr, quiet=quiet)
    try:
        found = diagnose_artifact(
            subject, Workspace.default(), display, threads=threads or machine.threads()
        )
    finally:
        display.close()
    if as_json:
        print_json(found.to_json())
    else:
        _print(found, quiet)


def _print(found: Diagnosis, quiet: bool) -> None:
    from phiconv.cli.outcomes import coloured
    from phiconv.diagnosis.tables import tables

    click.echo(coloured(found.verdict, "red" if found.faults else "green"))
    if quiet:
        return
    click.echo(f"  {found.artifact} against {found.checkpoint}")
    click.echo(f"  {found.provenance.where}, tokens {found.tokens}")
    for table in tables(found):
        if sys.stdout.isatty():
            _print_rich(table)
        else:
            click.echo("\n".join(_plain_lines(table)))


def _plain_lines(table: Table) -> list[str]:
    """A table as aligned lines, columns of figures to the right."""
    heads = [name.removesuffix(" >") for name in table.columns]
    cells = [tuple(heads), *table.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["", table.title]
    for row in cells:
        aligned = [
            cell.rjust(width) if name.endswith(" >") else cell.ljust(width)
            for cell, width, name in zip(row, widths, table.columns, strict=True)
        ]
        lines.append(f"  {'  '.join(aligned)}".rstrip())
    return lines + ([f"  {table.note}"] if table.note else [])


def _print_rich(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption=Text(table.note) if table.note else None,
        caption_justify="left",
    )
    for name in table.columns:
        right = name.endswith(" >")
        shown.add_column(
            Text(name.removesuffix(" >")), justify="right" if right else "left", no_wrap=right
        )
    for row in table.rows:
        shown.add_row(*map(Text, row))
    Console(highlight=False).print(shown)
