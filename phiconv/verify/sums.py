"""SHA256SUMS: written as `sha256sum` writes it, and read so strictly that every byte counts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from phiconv.checkpoint.folder import is_relative_name

SUMS = "SHA256SUMS"

FEW_DIGITS = 16
"""Digests of different content never agree in three quarters of their digits: where they differ in
so few, it is the digest that was damaged."""

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\\]")  # sha256sum escapes these


def render_sums(digests: Mapping[str, str]) -> str:
    """The file's text, sorted by path.

    Args:
        digests: sha256 in hexadecimal, by path with forward slashes.
    """
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def parse_sums(data: bytes) -> tuple[dict[str, str], list[str]]:
    """Reads the file as `render_sums` writes it, and nothing else.

    Returns:
        sha256 by path of the lines that are right, and what is wrong with the others.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", "replace")
        problems = [f"byte {error.start} is no UTF-8 text"]
    else:
        problems = []
    if text and not text.endswith("\n"):
        problems.append("its last line has no end")
    found: dict[str, str] = {}
    before = ""
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        match = _LINE.fullmatch(line)
        if match is None or not is_portable(match[2]):
            problems.append(f"line {number} is not '<64 hexadecimal digits>  <path>'")
            continue
        if match[2] <= before:
            problems.append(f"line {number}, {match[2]}, is not sorted")
        found[match[2]], before = match[1], match[2]
    return found, problems


def is_portable(name: str) -> bool:
    """Whether a path stays below its folder everywhere and is written in the one usual way."""
    usual = name == PurePosixPath(name).as_posix() and not _UNPRINTABLE.search(name)
    return usual and is_relative_name(name)


def differing_digits(one: str, other: str) -> int:
    """In how many places two digests differ: about 60 of 64 when the content does."""
    return sum(a != b for a, b in zip(one, other, strict=True))
