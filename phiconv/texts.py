"""Texts: those that ship with phiconv, files, and files of datasets on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from phiconv.errors import RecipeError
from phiconv.units import size_text

DEFAULT = "default"
MAX_BYTES = 32_000_000
"""Tokenizing takes up to 200 bytes of memory a byte of text, and a minute for 16 MB."""
HUB = "hub:"
_HUB_SPEC = re.compile(r"hub:(?P<repo_id>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})/(?P<file>.+)")
_HUB_REMEDY = (
    "such as hub:org/name@<commit of 40 digits>/data/train.jsonl; "
    "the commit is shown beside the dataset's files"
)
Packaged = Literal["validation", "calibration"]


@dataclass(frozen=True)
class Text:
    """One text and the name of where it comes from.

    Attributes:
        source: Its name.
        text: The text; of a conversation, its messages as canonical JSON.
        messages: The conversation as (role, content), where it is one.
    """

    source: str
    text: str
    messages: tuple[tuple[str, str], ...] | None = None


class HubFile(NamedTuple):
    """A file of a dataset on the Hub, at a commit."""

    repo_id: str
    commit: str
    name: str


def hub_file(spec: str) -> HubFile | None:
    """What `hub:ORG/NAME@COMMIT/FILE` names; None for any other spec.

    Raises:
        RecipeError: It begins so, but is not that: no commit, or a file that cannot be read.
    """
    if not spec.startswith(HUB):
        return None
    found = _HUB_SPEC.fullmatch(spec)
    if found is None:
        message = "not a file of a dataset at a commit, which alone is the same tomorrow"
        raise RecipeError(message, where=spec, remedy=_HUB_REMEDY)
    name = PurePosixPath(found["file"])
    if name.suffix not in (".jsonl", ".json", ".txt") or ".." in name.parts:
        raise RecipeError(
            f"{name.name} is no .jsonl, .json or .txt file",
            where=spec,
            remedy="name such a file of the dataset, or save its texts as a .jsonl file",
        )
    return HubFile(found["repo_id"], found["commit"], str(name))


def check_texts(spec: str, packaged: Packaged) -> None:
    """Makes sure that texts can be read; of those on the Hub, that they are well named.

    Raises:
        RecipeError: They cannot.
    """
    if hub_file(spec) is None:
        read_texts(spec, packaged=packaged)


def texts_key(spec: str, packaged: Packaged) -> str:
    """What identifies texts at plan time: their digest, or their place on the Hub."""
    if hub_file(spec) is not None:
        return spec
    return text_digest(read_texts(spec, packaged=packaged))


def read_texts(spec: str | Path, *, packaged: Packaged = "validation") -> list[Text]:
    """Reads the texts that `spec` names.

    Args:
        spec: `default` for the texts that ship with phiconv; else a .jsonl file with one object a
            line, or a .json file with a list of them (`text`, or `messages` with `role` and
            `content`; optionally `source`), or any other file as one plain UTF-8 text. For a file
            of a dataset, `hub:ORG/NAME@COMMIT/FILE`.
        packaged: Which of the packaged sets `default` means.

    Raises:
        RecipeError: The file is missing, too large, is not UTF-8, or holds something else; or there
            is no text in it.
        EnvironmentLacksError: The file cannot be downloaded.
    """
    if str(spec) == DEFAULT:
        file = resources.files("phiconv") / "data" / f"{packaged}.jsonl"
        return _parse_jsonl(file.read_text(encoding="utf-8"), f"{packaged}.jsonl")
    on_hub = hub_file(str(spec))
    path = _download(on_hub) if on_hub else Path(spec)
    content = _content(path, str(spec))
    name = PurePosixPath(on_hub.name) if on_hub else path
    if name.suffix == ".jsonl":
        texts = _parse_jsonl(content, str(spec))
    elif name.suffix == ".json":
        texts = _parse_json(content, str(spec))
    else:
        texts = [Text(name.name, content)]
    if not any(text.text for text in texts):
        raise RecipeError("the text file holds no text", where=str(spec))
    return texts


def _content(path: Path, where: str) -> str:
    remedy = f"name a UTF-8 .jsonl, .json or text file, or {DEFAULT!r}"
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RecipeError(
                f"the text file has {size_text(size)}, more than {size_text(MAX_BYTES)}",
                where=where,
                remedy="take a part of it: all of it is tokenized before windows are chosen",
            )
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"the text file is not UTF-8 from byte {error.start} on"
        raise RecipeError(message, where=where, remedy=remedy) from error
    except OSError as error:
        message = f"the text file cannot be read: {error.strerror}"
        raise RecipeError(message, where=where, remedy=remedy) from error


def _download(file: HubFile) -> Path:
    from phiconv.checkpoint.hub import fetch_dataset_file

    return fetch_dataset_file(*file)


def _parse_jsonl(content: str, where: str) -> list[Text]:
    texts = []
    # not splitlines(): a JSON string may hold U+2028 and its kin, which are no line ends in JSONL
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"not JSON: {error}", where=f"{where}, line {number}") from error
        texts.append(_parse_record(record, f"line {number}", where))
    return texts


def _parse_json(content: str, where: str) -> list[Text]:
    try:
        records = json.loads(content)
    except json.JSONDecodeError as error:
        raise RecipeError(f"not JSON: {error}", where=where) from error
    if not isinstance(records, list):
        raise RecipeError("not a list of JSON objects", where=where)
    return [
        _parse_record(record, f"record {number}", where) for number, record in enumerate(records, 1)
    ]


def _parse_record(record: Any, name: str, where: str) -> Text:
    text = _text_of(record, name)
    if text is None:
        raise RecipeError(
            "not a JSON object with a string `text`, or `messages` with `role` and `content`",
            where=f"{where}, {name}",
        )
    try:
        text.text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
        raise RecipeError(
            f"holds {text.text[error.start]!r}, which is no character", where=f"{where}, {name}"
        ) from error
    return text


def _text_of(record: Any, name: str) -> Text | None:
    if not isinstance(record, dict):
        return None
    source = str(record.get("source", name))
    if isinstance(record.get("text"), str):
        return Text(source, record["text"])
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        pairs = tuple((message["role"], message["content"]) for message in messages)
        return Text(source, json.dumps(pairs, ensure_ascii=False), pairs)
    return None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def text_digest(texts: Iterable[Text]) -> str:
    """Digest of the texts alone: `sha256:` over each one's UTF-8 length (8 bytes LE) and bytes."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return f"sha256:{digest.hexdigest()}"
