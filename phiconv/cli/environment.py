"""`phiconv schema` and `phiconv doctor`."""

from __future__ import annotations

import click

from phiconv.cli.options import json_option, print_json, verbose_option


@click.command()
@click.argument("name", type=click.Choice(["recipe", "report"]), default="recipe")
def schema(name: str) -> None:
    """Print a JSON schema: of recipes, or of report.json."""
    if name == "recipe":
        from phiconv.recipe.schema import recipe_schema

        print_json(recipe_schema())
    else:
        from phiconv.report.document import report_schema

        print_json(report_schema())


@click.command()
@json_option
@verbose_option
def doctor(as_json: bool) -> None:
    """Show what this machine can run.

    Lists processor, memory, package versions, execution providers and the workspace.
    """
    from dataclasses import asdict

    from phiconv.doctor import examine
    from phiconv.summary import findings_text
    from phiconv.workspace import Workspace

    findings = examine(Workspace.default())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        click.echo(findings_text(findings))
