"""Prints what became of builds and validations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from phiconv.batch import Outcome


def print_lines(lines: Iterable[tuple[str, str | None]], quiet: bool = False) -> None:
    """Lines on stdout, in their colours on a terminal; `quiet` leaves out those without one."""
    for text, colour in lines:
        if colour or not quiet:
            click.echo(coloured(text, colour))


def coloured(text: str, colour: str | None) -> str:
    """Text in a colour, but where NO_COLOR is set or the terminal has none."""
    from phiconv.progress import PLAIN_TERMINALS

    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in PLAIN_TERMINALS
    return text if plain or not colour else click.style(text, fg=colour)


def print_outcomes(outcomes: Sequence[Outcome], quiet: bool) -> None:
    """The summary on stdout, the errors on stderr."""
    from phiconv.cli.annotations import annotate, annotate_failures
    from phiconv.summary import error_text, outcome_lines

    for outcome in outcomes:
        print_lines(outcome_lines(outcome), quiet)
        if outcome.error is not None:
            click.echo(error_text(outcome.error), err=True)
            annotate(outcome.error)
        annotate_failures(outcome.recipe.name, _failures(outcome))


def _failures(outcome: Outcome) -> list[str]:
    """The gates that failed, and the validations that were not run."""
    validations = outcome.built.result.validations if outcome.built else ()
    failures = [str(gate) for item in validations for gate in item.gates if not gate.passed]
    return failures + [item.verdict for item in validations if item.status == "not_run"]
