"""The arguments that `validate` and `diagnose` share: artifact, checkpoint, provider, tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from phiconv.cli.options import Function


def subject_options(
    *, when_missing: tuple[str, ...], windows: int, window_length: int
) -> Callable[[Function], Function]:
    """Adds them to a command.

    Args:
        when_missing: The choices for a machine without the provider, the default first.
        windows: Default number of windows.
        window_length: Default tokens a window.
    """
    options = [
        click.argument("artifact", type=click.Path(path_type=Path)),
        click.option(
            "--reference",
            required=True,
            metavar="PATH|ID",
            help="The checkpoint that the artifact was made from.",
        ),
        click.option("--revision", help="The revision of a Hub model."),
        click.option(
            "--provider",
            type=click.Choice(["cpu", "cuda", "dml"]),
            default="cpu",
            show_default=True,
            help="Execution provider to run on.",
        ),
        click.option(
            "--when-missing",
            type=click.Choice(when_missing),
            default=when_missing[0],
            show_default=True,
            help="What happens on a machine without the provider.",
        ),
        click.option(
            "--tokens",
            default="default",
            show_default=True,
            metavar="FILE",
            help="Text, .jsonl or .json file to measure on, or hub:ORG/NAME@COMMIT/FILE of a "
            "dataset; default means phiconv's held-out texts.",
        ),
        click.option(
            "--windows",
            type=click.IntRange(min=1),
            default=windows,
            show_default=True,
            metavar="N",
            help="How many windows, spread evenly over the texts.",
        ),
        click.option(
            "--window-length",
            type=click.IntRange(min=2),
            default=window_length,
            show_default=True,
            metavar="N",
            help="Tokens a window.",
        ),
    ]

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
