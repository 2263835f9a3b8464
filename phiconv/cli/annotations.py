"""Errors as GitHub Actions shows them: beside the recipe's line, and on the run's page.

A line `::error file=…,line=…,title=…::message` in a log does that; nothing is printed elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from phiconv.errors import PhiconvError

_PLACE = re.compile(r"(?P<file>[^:\s]+\.(?:ya?ml|json))(?::(?P<line>[0-9]+))?(?:$|[\s(:])")
_ESCAPES = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_IN_PROPERTIES = {**_ESCAPES, ":": "%3A", ",": "%2C"}


def annotate(error: PhiconvError) -> None:
    """One annotation for an error, or for each of several."""
    for part in getattr(error, "errors", None) or [error]:
        message = f"{part.message}\nremedy: {part.remedy}" if part.remedy else part.message
        _print("phiconv", message, part.where)


def annotate_failures(title: str, failures: Iterable[str]) -> None:
    """One annotation for each gate that failed."""
    for failure in failures:
        _print(title, failure, None)


def _print(title: str, message: str, where: str | None) -> None:
    if os.environ.get("GITHUB_ACTIONS") != "true":
        return
    properties = {"title": title}
    place = _PLACE.search(where or "")
    if place is not None:
        properties |= {name: text for name, text in place.groupdict().items() if text}
    head = ",".join(f"{name}={_escaped(text, _IN_PROPERTIES)}" for name, text in properties.items())
    click.echo(f"::error {head}::{_escaped(message, _ESCAPES)}", err=True)


def _escaped(text: str, escapes: dict[str, str]) -> str:
    return "".join(escapes.get(character, character) for character in text)
