"""Texts that ship with Python itself, split by file into train, calibration and validation.

Three kinds of document, all under the PSF licence and all named by what they are in Python,
never by where Python is installed:

* ``code``: the source of a standard-library module, ``json/decoder.py``;
* ``docstrings``: the docstrings of such a module instead of its source, ``json/decoder.py#doc``;
* ``topic``: a pydoc help topic, ``topic:LAMBDAS``.

A file belongs to one split only, and a document that repeats passages of a held-out one (as a
copied licence header, a module's older twin or an overlapping help topic does) is dropped from
the later split, so that held-out text stays unseen.

    python examples/corpus.py phiconv/data

writes ``calibration.jsonl``, ``validation.jsonl`` and the README with their digests.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

Kind = Literal["code", "docstrings", "topic"]

# Not prose and not code anyone wrote by hand: character tables, generated grammars, a build's own
# settings (which also name the building machine), and test data that is broken on purpose.
EXCLUDED = (
    "__phello__",
    "config-",
    "_sysconfigdata",
    "encodings/",
    "ensurepip/",
    "idlelib/idle_test/",
    "lib2to3/tests/data/",
    "lib2to3/pgen2/",
    "pydoc_data/",
    "site-packages/",
    "sre_constants.py",
    "test/bad",
    "test/cjkencodings/",
    "test/encoded_modules/",
    "test/support/",
    "test/test_capi/",
    "this.py",
)
# Characters of each kind a held-out split receives.
QUOTAS: dict[str, dict[Kind, int]] = {
    "validation": {"code": 100_000, "docstrings": 35_000, "topic": 40_000},
    "calibration": {"code": 270_000, "docstrings": 90_000, "topic": 90_000},
}
# A held-out file has this many characters: long enough for a window, short enough that a split
# holds many files.
HELD_OUT_LENGTH: dict[Kind, tuple[int, int]] = {
    "code": (2_000, 12_000),
    "docstrings": (1_200, 9_000),
    "topic": (600, 9_000),
}
# Lines this long rarely agree by chance; more than this many of them in common is a copy.
PASSAGE_LINE = 50
PASSAGE_LINES = 4
DOCSTRING_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Document:
    """One text with the name of what it was taken from."""

    source: str
    kind: Kind
    text: str

    @property
    def file(self) -> str:
        """Name of the file that the text comes from; docstrings share their module's."""
        return self.source.removesuffix("#doc")


@dataclass(frozen=True)
class Corpus:
    """The three splits; no file is in two of them."""

    train: list[Document]
    calibration: list[Document]
    validation: list[Document]


def standard_library_files() -> Iterator[tuple[str, str]]:
    """Yields (name relative to the library, text) of its readable UTF-8 sources, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in names:
        if name.startswith(EXCLUDED) or "site-packages/" in name:
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name, text


def docstrings(source: str) -> Iterator[tuple[str, str, ast.AST]]:
    """Yields (qualified name, docstring, node) of a module's documented objects, in order.

    The module's own docstring has the empty name. A source this Python cannot parse has none.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    pending: list[tuple[str, ast.AST]] = [("", tree)]
    while pending:
        name, node = pending.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield name, text, node
            prefix = f"{name}." if name else ""
            pending[:0] = [
                (prefix + child.name, child)
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            ]


def pydoc_topics() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the help topics pydoc ships, sorted by name."""
    from pydoc_data.topics import topics

    yield from sorted(topics.items())


def passages(text: str) -> set[str]:
    """The long lines of a text, by which a copy is recognised."""
    stripped = (line.strip() for line in text.splitlines())
    return {line for line in stripped if len(line) >= PASSAGE_LINE}


def draw_order(document: Document) -> str:
    """Sort key that is random with respect to names, and the same on every machine."""
    return hashlib.sha256(document.source.encode()).hexdigest()


def is_test(name: str) -> bool:
    """Whether a file is a test, of which held-out text takes none."""
    return name.startswith("test/") or "/tests/" in name or "/test/" in name


def held_out_candidates(files: Iterable[tuple[str, str]]) -> list[Document]:
    """Documents a held-out split may draw: a module as code or as docstrings, never as both."""
    candidates = []
    for name, text in files:
        if is_test(name):
            continue
        prose = DOCSTRING_SEPARATOR.join(doc for _, doc, _ in docstrings(text))
        code = Document(name, "code", text)
        # A third of the modules, drawn by name, is prose if it has enough of it.
        as_prose = (
            int(draw_order(code)[:8], 16) % 3 == 0
            and len(prose) >= HELD_OUT_LENGTH["docstrings"][0]
        )
        candidates.append(Document(f"{name}#doc", "docstrings", prose) if as_prose else code)
    candidates += [Document(f"topic:{name}", "topic", text) for name, text in pydoc_topics()]
    return sorted(candidates, key=draw_order)


def draw(candidates: list[Document], quotas: dict[Kind, int], seen: set[str]) -> list[Document]:
    """Takes documents in order until each kind's quota of characters is reached.

    Args:
        candidates: what to take from; what is taken is removed.
        quotas: characters of each kind.
        seen: passages of earlier splits; a document that repeats them is passed over.
    """
    taken: list[Document] = []
    room = dict(quotas)
    for document in list(candidates):
        shortest, longest = HELD_OUT_LENGTH[document.kind]
        fits = shortest <= len(document.text) <= min(longest, room[document.kind])
        if fits and not repeats(document.text, seen):
            taken.append(document)
            candidates.remove(document)
            room[document.kind] -= len(document.text)
    return taken


def by_source(documents: list[Document]) -> list[Document]:
    """The documents, sorted by name."""
    return sorted(documents, key=lambda document: document.source)


def repeats(text: str, seen: set[str]) -> bool:
    """Whether a text holds a passage that was seen before."""
    return len(passages(text) & seen) > PASSAGE_LINES


def collect() -> Corpus:
    """Reads and splits the texts of the running Python."""
    files = list(standard_library_files())
    candidates = held_out_candidates(files)
    validation = draw(candidates, QUOTAS["validation"], set())
    seen = {line for document in validation for line in passages(document.text)}
    calibration = draw(candidates, QUOTAS["calibration"], seen)
    seen |= {line for document in calibration for line in passages(document.text)}
    held_out = {document.file for document in (*validation, *calibration)}
    train = [Document(name, "code", text) for name, text in files]
    train += [Document(f"topic:{name}", "topic", text) for name, text in pydoc_topics()]
    train = [d for d in train if d.file not in held_out and not repeats(d.text, seen)]
    return Corpus(train, by_source(calibration), by_source(validation))


def write_json_lines(path: Path, documents: list[Document]) -> None:
    """Writes one ``{"source", "text"}`` object a line."""
    lines = (json.dumps({"source": d.source, "text": d.text}) for d in documents)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


DATA_README = """\
# Held-out texts

Texts for calibration and for validation, disjoint from each other and from what
`examples/tiny-phi3` was trained on. One JSON object a line: `source` names the text, `text` is
the text.

| file | documents | characters | code | docstrings | help topics | sha256 |
|---|---|---|---|---|---|---|
{rows}

**Origin.** What ships with Python {version} itself. `json/tool.py` is the source of that
standard-library module, `queue.py#doc` the docstrings of another instead of its source,
`topic:global` a help topic of pydoc. The splits are by file, and a text that repeats passages of
one in an earlier split (validation, calibration, training, in this order) is left out of the later.

**Licence.** Python's, the Python Software Foundation License Version 2 (PSF-2.0),
<https://docs.python.org/3.11/license.html>. Copyright © 2001-2023 Python Software Foundation; all
rights reserved. Some modules name further authors and licences in their own text, which is kept
unchanged.

**Made by** `python examples/corpus.py phiconv/data`, which gives these bytes under Python
{version} and other texts under another; the files are committed and need not be made again.
"""


def data_readme_row(path: Path, documents: list[Document]) -> str:
    """One line of the table in ``DATA_README``."""
    kinds: tuple[Kind, ...] = ("code", "docstrings", "topic")
    lengths = [sum(len(d.text) for d in documents if d.kind == kind) for kind in kinds]
    cells = [f"`{path.name}`", len(documents), *(f"{n:,}" for n in (sum(lengths), *lengths))]
    return "| " + " | ".join(str(cell) for cell in (*cells, f"`{file_digest(path)}`")) + " |"


@click.command
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def main(directory: Path) -> None:
    """Write the held-out texts and their README into DIRECTORY."""
    corpus = collect()
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in ("calibration", "validation"):
        documents: list[Document] = getattr(corpus, name)
        path = directory / f"{name}.jsonl"
        write_json_lines(path, documents)
        rows.append(data_readme_row(path, documents))
        click.echo(rows[-1])
    readme = DATA_README.format(rows="\n".join(rows), version=platform.python_version())
    (directory / "README.md").write_text(readme, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
