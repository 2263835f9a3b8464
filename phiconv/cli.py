"""The command line: the only place that prints and exits.

At the top only click is imported, so that `phiconv --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from phiconv import __version__
from phiconv.errors import PhiconvError

if TYPE_CHECKING:
    from phiconv.recipe import Overrides

Function = TypeVar("Function", bound=Callable[..., Any])

USAGE_CODE = 2
UNEXPECTED_CODE = 3
INTERRUPTED_CODE = 128 + signal.SIGINT
TERMINATED_CODE = 128 + signal.SIGTERM
DEBUG_VARIABLE = "PHICONV_DEBUG"


@dataclass
class Settings:
    """What holds for the whole invocation."""

    verbose: bool = field(default_factory=lambda: bool(os.environ.get(DEBUG_VARIABLE)))


class TerminatedError(BaseException):
    """SIGTERM came; not an `Exception`, so that only clean-up code sees it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its documented code."""
    settings = Settings()
    signal.signal(signal.SIGTERM, _terminate)
    with _boundary(settings):
        code = cli.main(args=arguments, prog_name="phiconv", standalone_mode=False, obj=settings)
        sys.exit(code if isinstance(code, int) else 0)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError


@contextmanager
def _boundary(settings: Settings) -> Iterator[None]:
    """Turns whatever ends a command into a message on stderr and an exit code."""
    try:
        yield
    except PhiconvError as error:
        from phiconv.summary import error_text

        if settings.verbose:
            _print_traceback()
        click.echo(error_text(error), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(USAGE_CODE)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing half-made was kept", err=True)
        sys.exit(INTERRUPTED_CODE)
    except TerminatedError:
        click.echo("terminated; nothing half-made was kept", err=True)
        sys.exit(TERMINATED_CODE)
    except BrokenPipeError:
        # The reader of our output left; say nothing more, also not when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        _unexpected(error, settings)
        sys.exit(UNEXPECTED_CODE)


def _unexpected(error: Exception, settings: Settings) -> None:
    if settings.verbose:
        _print_traceback()
    click.echo(
        f"error: unexpected {type(error).__name__}: {error}\n"
        "  remedy: this is a defect of phiconv; please report it with the output of the same "
        "command with --verbose, and of `phiconv doctor`",
        err=True,
    )


def _print_traceback() -> None:
    import traceback

    click.echo(traceback.format_exc(), err=True)


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


def _recipe_options(function: Function) -> Function:
    """What `build` and `plan` share."""
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
            click.option(
                "--rebuild", is_flag=True, help="Run every stage, whatever the cache has."
            ),
        ]
    ):
        function = option(function)
    return function


def _overrides(model: str | None, revision: str | None, settings: tuple[str, ...]) -> Overrides:
    from phiconv.recipe import Overrides

    return Overrides(model, revision, settings)


def _print_json(document: Any) -> None:
    import json

    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


_EXIT_CODES = """\b
Exit codes:
  0  done, and every gate passed
  2  the command line or a recipe is wrong
  3  a stage failed
  4  an accuracy gate failed
  5  the environment lacks something: provider, disk, memory, model
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES)
@click.version_option(__version__, message="%(prog)s %(version)s")
@verbose_option
def cli() -> None:
    """Turn a Hugging Face Phi checkpoint into a validated ONNX artifact."""


@cli.command()
@_recipe_options
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Output folder [default: dist/<recipe name>]; with several recipes, of their folders.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads a stage may use [default: all cores]; never changes the artifact.",
)
@click.option("-q", "--quiet", is_flag=True, help="Show only verdicts, failures and errors.")
@verbose_option
def build(
    recipes: tuple[Path, ...],
    model: str | None,
    revision: str | None,
    settings: tuple[str, ...],
    rebuild: bool,
    out: Path | None,
    threads: int | None,
    quiet: bool,
) -> int:
    """Build artifacts from recipes.

    Runs the recipe's stages, validates the artifact and publishes it: the output folder holds
    artifact/ (exactly what ships), report/ and manifest.json.
    """
    from phiconv import machine
    from phiconv.batch import build_all, load_recipes, worst
    from phiconv.progress import make_display
    from phiconv.workspace import Workspace

    loaded = load_recipes(recipes, _overrides(model, revision, settings))
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
    _print_outcomes(outcomes, quiet)
    return worst([outcome.exit_code for outcome in outcomes])


def _print_outcomes(outcomes: Sequence[Any], quiet: bool) -> None:
    """The summary on stdout, the errors on stderr."""
    from phiconv.summary import error_text, outcome_lines

    plain = bool(os.environ.get("NO_COLOR"))
    for outcome in outcomes:
        for text, colour in outcome_lines(outcome):
            if colour or not quiet:
                click.echo(click.style(text, fg=None if plain else colour, reset=not plain))
        if outcome.error is not None:
            click.echo(error_text(outcome.error), err=True)


@cli.command()
@_recipe_options
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

    loaded = load_recipes(recipes, _overrides(model, revision, settings))
    plans = make_plans(loaded, Workspace.default(), QuietDisplay(), rebuild=rebuild)
    if as_json:
        _print_json([plan_json(item) for item in plans])
    else:
        click.echo("\n\n".join(plan_text(item) for item in plans))


@cli.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@json_option
@verbose_option
def inspect(artifact: Path, as_json: bool) -> None:
    """Show what an artifact holds.

    ARTIFACT is a folder with an ONNX model, such as dist/NAME/artifact, or a checkpoint folder.
    """
    from dataclasses import asdict

    from phiconv.inspect import inspect_folder
    from phiconv.summary import inspection_text

    found = inspect_folder(artifact)
    if as_json:
        _print_json(asdict(found))
    else:
        click.echo(inspection_text(found))


@cli.command()
@click.argument("name", type=click.Choice(["recipe", "report"]), default="recipe")
def schema(name: str) -> None:
    """Print a JSON schema: of recipes, or of report.json."""
    if name == "recipe":
        from phiconv.recipe.schema import recipe_schema

        _print_json(recipe_schema())
    else:
        from phiconv.report.document import report_schema

        _print_json(report_schema())


@cli.command()
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
        _print_json([asdict(finding) for finding in findings])
    else:
        click.echo(findings_text(findings))


@cli.group()
def cache() -> None:
    """Look at the workspace, or make it smaller."""


@cache.command("ls")
@verbose_option
def cache_ls() -> None:
    """List the artifacts, most recently used first."""
    import time

    from phiconv.summary import entries_text
    from phiconv.workspace import Workspace

    workspace = Workspace.default()
    click.echo(f"workspace {workspace.home}")
    click.echo(entries_text(workspace.entries(), time.time()))


@cache.command("gc")
@click.option("--older-than", metavar="AGE", help="Remove what was not used for AGE, such as 30d.")
@click.option(
    "--max-size", metavar="SIZE", help="Remove the least recently used above SIZE, such as 20GB."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@verbose_option
def cache_gc(older_than: str | None, max_size: str | None, dry_run: bool) -> None:
    """Remove artifacts that are old or too many.

    What killed builds left is always removed. What a running build may be using is kept. Large
    files that dist/ shares with the workspace take their disk space until they are removed there,
    too.
    """
    import time

    from phiconv.summary import entries_text
    from phiconv.workspace import Workspace
    from phiconv.workspace.collect import collect, parse_duration, parse_size
    from phiconv.workspace.disk import size_text
    from phiconv.workspace.session import open_session

    age = parse_duration(older_than) if older_than else None
    size = parse_size(max_size) if max_size else None
    with open_session(Workspace.default()) as session:
        done = collect(session, older_than=age, max_bytes=size, dry_run=dry_run)
    if done.entries:
        click.echo(entries_text(done.entries, time.time()))
    verb = "would be removed" if dry_run else "removed"
    click.echo(f"{len(done.entries)} artifacts {verb}, {size_text(done.freed_bytes)}")
    if done.broken:
        click.echo(f"{len(done.broken)} broken ones {verb}")
    if done.in_use:
        click.echo(f"{done.in_use} kept, because a running build may use them")
    click.echo(f"{size_text(done.kept_bytes)} kept")
