"""The golden set: strings and conversations on which tokenizers are known to part ways.

Written for phiconv, in phiconv/data/golden_texts.json: category -> name -> text, with everything
that is not ASCII escaped, so that invisible characters can be read. docs/parity.md lists the
categories.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

Message = Mapping[str, str]
"""One turn: `role` and `content`."""


@dataclass(frozen=True)
class GoldenText:
    """One string; `name` is `<category>.<name in it>`."""

    name: str
    text: str

    @property
    def category(self) -> str:
        """What the string tests, for example `accent` or `special_token`."""
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Conversation:
    """Turns of a chat, in order."""

    name: str
    messages: tuple[Message, ...]


def golden_texts() -> tuple[GoldenText, ...]:
    """Every string of the golden set, in the order of the file."""
    return tuple(
        GoldenText(f"{category}.{name}", text)
        for category, texts in _document()["texts"].items()
        for name, text in texts.items()
    )


def conversations() -> tuple[Conversation, ...]:
    """Every conversation of the golden set."""
    return tuple(
        Conversation(name, tuple(messages))
        for name, messages in _document()["conversations"].items()
    )


@cache
def _document() -> dict[str, Any]:
    file = resources.files("phiconv") / "data" / "golden_texts.json"
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return document
