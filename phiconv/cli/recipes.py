"""`phiconv build` and `phiconv plan`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from phiconv.cli.options import (
    json_option,
    overrides,
    print_json,
    quiet_option,
    recipe_options,
    threads_option,
    verbose_option,
)
from phiconv.cli.outcomes import print_outcomes


@click.command()
@recipe_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Output folder [default: dist/<recipe name>]; with several recipes, of their folders.",
)
@threads_option
@click.option(
    "--skip-validation",
    is_flag=True,
    help="Leave out the stages that measure; the artifact is then not validated.",
)
@quiet_option
@verbose_option
def build(
    recipes: tuple[Path, ...],
    model: str | None,
    revision: str | None,
    settings: tuple[str, ...],
    rebuild: bool,
    out: Path | None,
    threads: int | None,
    skip_validation: bool,
    quiet: bool,
) -> int:
    """Build artifacts from recipes.

    Runs the recipe's stages, validates the artifact and publishes it: the output folder holds
    artifact/ (exactly what ships), report/ and manifest.json.
    """
    from phiconv import machine
    from phiconv.batch import build_all, index_page, load_recipes, worst
    from phiconv.progress import make_display
    from phiconv.workspace import Workspace

    changes = overrides(model, revision, settings, skip_validation=skip_validation)
    loaded = load_recipes(recipes, changes)
    display = make_display(sys.stderr, quiet=quiet)
    try:
        outcomes = build_all(
            loaded,
            Workspace.default(),
            display,
            out=out,
            threads=threads or machine.threads(),
            rebuild=rebuild,
        )
    finally:
        display.close()
    print_outcomes(outcomes, quiet)
    page = index_page(loaded, out)
    if page is not None and not quiet and any(outcome.built for outcome in outcomes):
        click.echo(f"index: {page}")
    return worst([outcome.exit_code for outcome in outcomes])


@click.command()
@recipe_options
@json_option
@verbose_option
def plan(
    recipes: tuple[Path, ...],
    model: str | None,
    revision: str | None,
    settings: tuple[str, ...],
    rebuild: bool,
    as_json: bool,
) -> None:
    """Show what a build would do.

    Lists the steps, which of them are cached, the disk and memory they need, and what this
    machine lacks.
    """
    from phiconv.batch import load_recipes, make_plans
    from phiconv.plan import as_json as plan_json
    from phiconv.progress import QuietDisplay
    from phiconv.summary import plan_text
    from phiconv.workspace import Workspace

    loaded = load_recipes(recipes, overrides(model, revision, settings))
    plans = make_plans(loaded, Workspace.default(), QuietDisplay(), rebuild=rebuild)
    if as_json:
        print_json([plan_json(item) for item in plans])
    else:
        click.echo("\n\n".join(plan_text(item) for item in plans))
