"""Options that several commands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from phiconv.cli.boundary import DEBUG_VARIABLE, Settings

if TYPE_CHECKING:
    from phiconv.recipe import Overrides

Function = TypeVar("Function", bound=Callable[..., Any])


def _set_verbose(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value and isinstance(context.obj, Settings):
        context.obj.verbose = True


verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=_set_verbose,
    help=f"Show tracebacks of errors (also: {DEBUG_VARIABLE}=1).",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads a stage may use [default: all cores]; never changes the artifact.",
)

quiet_option = click.option(
    "-q", "--quiet", is_flag=True, help="Show only verdicts, failures and errors."
)

locked_option = click.option(
    "--locked",
    is_flag=True,
    help="Refuse when anything is not as `phiconv lock` found it: recipe, model, texts, tools.",
)

rebuild_option = click.option(
    "--rebuild", is_flag=True, help="Run every stage, whatever the cache has."
)


def recipe_options(function: Function) -> Function:
    """What `build`, `plan` and `lock` share."""
    for option in reversed(
        [
            click.argument(
                "recipes",
                nargs=-1,
                required=True,
                metavar="RECIPE...",
                type=click.Path(path_type=Path),
            ),
            click.option("--model", metavar="PATH|ID", help="Replace the recipe's model."),
            click.option("--revision", help="Replace the revision of a Hub model."),
            click.option(
                "--set",
                "settings",
                multiple=True,
                metavar="STAGE.KEY=VALUE",
                help="Replace a parameter of a stage; nested keys are joined with dots. "
                "Repeatable.",
            ),
        ]
    ):
        function = option(function)
    return function


def overrides(
    model: str | None,
    revision: str | None,
    settings: tuple[str, ...],
    *,
    skip_validation: bool = False,
) -> Overrides:
    """What `recipe_options` say."""
    from phiconv.recipe import Overrides

    return Overrides(model, revision, settings, skip_validation)


def print_json(document: Any) -> None:
    """Prints a document on stdout; in ASCII where stdout is not UTF-8, as on Windows in a pipe."""
    readable = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(document, indent=2, ensure_ascii=not readable))
