"""The command line: the only place that prints and exits.

At the top these modules import only click, so that `phiconv --help` answers at once. A command is
a function in the module of its topic and a name in `COMMANDS`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from phiconv import __version__
from phiconv.cli.artifact import inspect
from phiconv.cli.boundary import Settings, boundary, reader_watched, spell_out_on_stdout
from phiconv.cli.diagnosis import diagnose
from phiconv.cli.environment import doctor, schema
from phiconv.cli.options import verbose_option
from phiconv.cli.push import push
from phiconv.cli.recipes import build, lock, plan
from phiconv.cli.release import release, verify
from phiconv.cli.report import compare, index
from phiconv.cli.validation import validate
from phiconv.cli.workspace import cache

COMMANDS = (
    build,
    plan,
    lock,
    validate,
    diagnose,
    compare,
    index,
    inspect,
    release,
    verify,
    push,
    schema,
    doctor,
    cache,
)

_EXIT_CODES = """\b
Exit codes:
  0  done, and every gate passed
  2  the command line or a recipe is wrong
  3  a stage failed
  4  a gate failed: accuracy, provider, tokenizer, regression
  5  the environment lacks something: provider, disk, memory, model
"""


class _CommandLine(click.Group):
    """Tells of a reader that left, where click would exit with 1 as after a failure."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with reader_watched():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with reader_watched():
            return super().invoke(ctx)


@click.group(
    cls=_CommandLine, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EXIT_CODES
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@verbose_option
def cli() -> None:
    """Turn a Hugging Face Phi checkpoint into a validated ONNX or GGUF artifact."""


for _command in COMMANDS:
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its documented code."""
    settings = Settings()
    spell_out_on_stdout()
    with boundary(settings):
        code = cli.main(args=arguments, prog_name="phiconv", standalone_mode=False, obj=settings)
        sys.exit(code if isinstance(code, int) else 0)
