"""`phiconv build`, `phiconv plan` and `phiconv lock`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from phiconv.cli.options import (
    json_option,
    locked_option,
    overrides,
    print_json,
    quiet_option,
    rebuild_option,
    recipe_options,
    threads_option,
    verbose_option,
)
from phiconv.cli.outcomes import print_outcomes

if TYPE_CHECKING:
    from phiconv.lock import Difference, Locked
    from phiconv.recipe import Overrides, Recipe


@click.command()
@recipe_options
@locked_option
@rebuild_option
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
    locked: bool,
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
    loaded, locks = _locked(load_recipes(recipes, changes), changes, locked)
    display = make_display(sys.stderr, quiet=quiet)
    try:
        outcomes = build_all(
            loaded,
            Workspace.default(),
            display,
            out=out,
            threads=threads or machine.threads(),
            rebuild=rebuild,
            locks=locks,
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
@locked_option
@rebuild_option
@json_option
@verbose_option
def plan(
    recipes: tuple[Path, ...],
    model: str | None,
    revision: str | None,
    settings: tuple[str, ...],
    locked: bool,
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

    changes = overrides(model, revision, settings)
    loaded, locks = _locked(load_recipes(recipes, changes), changes, locked)
    plans = make_plans(loaded, Workspace.default(), QuietDisplay(), rebuild=rebuild, locks=locks)
    if as_json:
        print_json([plan_json(item) for item in plans])
    else:
        click.echo("\n\n".join(plan_text(item) for item in plans))


@click.command()
@recipe_options
@quiet_option
@verbose_option
def lock(
    recipes: tuple[Path, ...],
    model: str | None,
    revision: str | None,
    settings: tuple[str, ...],
    quiet: bool,
) -> None:
    """Write down what builds are made of.

    Writes RECIPE.lock.json beside each recipe: the model's commit and the digests of its files, the
    digests of texts and files that stages take, the versions of phiconv, stages and tools, and the
    cache keys that follow. `phiconv build --locked` then refuses to build anything else. A model of
    the Hub is downloaded.
    """
    from phiconv.batch import load_recipes, make_plans
    from phiconv.lock import write_lock
    from phiconv.progress import make_display
    from phiconv.workspace import Workspace

    loaded = load_recipes(recipes, overrides(model, revision, settings))
    display = make_display(sys.stderr, quiet=quiet)
    try:
        plans = make_plans(loaded, Workspace.default(), display, download=True)
    finally:
        display.close()
    for item in plans:
        file, found = write_lock(item)
        _print_lock(file, found, quiet)


def _print_lock(file: Path, found: Sequence[Difference] | None, quiet: bool) -> None:
    state = "written" if found is None else "changed" if found else "as it was"
    click.echo(f"{file}: {state}")
    for difference in () if quiet else found or ():
        before, now = difference.sides()
        click.echo(f"  {difference.name}: {before} -> {now}")


def _locked(
    recipes: list[Recipe], changes: Overrides, locked: bool
) -> tuple[list[Recipe], dict[str, Locked] | None]:
    """The recipes and their locks, when they are asked for."""
    if not locked:
        return recipes, None
    from phiconv.lock import open_locks

    return open_locks(recipes, changes)
