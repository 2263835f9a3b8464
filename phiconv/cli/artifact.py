"""Commands that look at an artifact: `phiconv inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from phiconv.cli.options import json_option, print_json, verbose_option


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@json_option
@verbose_option
def inspect(artifact: Path, as_json: bool) -> None:
    """Show what an artifact holds.

    ARTIFACT is a folder with an ONNX model or a GGUF file, such as dist/NAME/artifact, or a
    checkpoint folder.
    """
    from dataclasses import asdict

    from phiconv.inspect import inspect_folder
    from phiconv.summary import inspection_text

    found = inspect_folder(artifact)
    if as_json:
        print_json(asdict(found))
    else:
        click.echo(inspection_text(found))
