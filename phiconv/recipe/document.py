"""Recipe text to plain data, with the line of every key, and nothing that YAML should not do.

Scalars follow the YAML 1.2 core schema (so `1e-4` is a number, and `no`, `on` and `12:30` are
strings), where PyYAML's own loaders follow 1.1. Duplicate keys, aliases, tags and keys that are
not strings are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from phiconv.errors import PhiconvError, Problems, RecipeError

KeyPath: TypeAlias = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_TAGS = {_TAG + name for name in ("map", "seq", "str", "null", "bool", "int", "float")}


class _Loader(yaml.SafeLoader):
    """Composes nodes; constructs nothing. Resolves scalars by the YAML 1.2 core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's class attribute)


_NUMBER = r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
for _name, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)


@dataclass(frozen=True)
class Document:
    """Parsed recipe text.

    Attributes:
        data: Dictionaries, lists and scalars.
        text: The text as read.
        name: How errors name it: the file's path as the user gave it.
        places: `file:line` of every key and list item, by its path in `data`.
    """

    data: Any
    text: str
    name: str
    places: Mapping[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Returns `file:line` of `path`, or of its closest ancestor that has a line."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.name


def read(path: Path, what: str = "recipe") -> Document:
    """Reads a file.

    Args:
        path: The file.
        what: What it holds, for errors.

    Raises:
        RecipeError: The file is not there, is not UTF-8 text, or is not the YAML phiconv takes
            (`Problems` lists everything found).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(
            f"there is no {what} file {path}", remedy="give the path of a YAML file"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"the {what} file is not UTF-8 text", where=f"{path}:{line}", remedy="save it as UTF-8"
        ) from error
    except OSError as error:
        message = f"cannot read the {what} file: {error.strerror}"
        raise RecipeError(
            message, where=str(path), remedy="give the path of a YAML file"
        ) from error
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """Parses recipe text; see `read` for what is raised."""
    try:
        return _parsed(text, name)
    except RecursionError:
        raise RecipeError("nested far too deeply for a recipe", where=name) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"not valid YAML: {what}", where=f"{name}:{line}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=name) from error


def _parsed(text: str, name: str) -> Document:
    node = yaml.compose(text, Loader=_Loader)
    reader = _Reader(name)
    data = reader.convert(node, ()) if node is not None else None
    if reader.errors:
        raise Problems(reader.errors) if len(reader.errors) > 1 else reader.errors[0]
    return Document(data, text, name, reader.places)


def parse_value(text: str, name: str) -> Any:
    """Parses the value of a `--set`; raises RecipeError naming `name`."""
    return parse(text, name).data


class _Reader:
    """Turns a node graph into data, noting places and problems on the way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[KeyPath, str] = {}
        self.errors: list[PhiconvError] = []
        self._seen: set[int] = set()

    def convert(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places.setdefault(path, self._line(node))
        if id(node) in self._seen:
            self._refuse(node, "YAML aliases (*name) are not supported", "write the value out")
            return None
        self._seen.add(id(node))
        if node.tag not in _TAGS:
            self._refuse(node, f"YAML tag {node.tag} is not supported", "write a plain value")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.convert(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                self._refuse(key_node, "a key that is not text", "put the key in quotes")
                continue
            key = key_node.value
            if key in data:
                first = self.places[(*path, key)]
                self._refuse(key_node, f"key {key!r} is given twice (first at {first})", None)
                continue
            self.places[(*path, key)] = self._line(key_node)
            data[key] = self.convert(value_node, (*path, key))
        return data

    def _scalar(self, node: yaml.Node) -> Any:
        kind = node.tag.removeprefix(_TAG)
        text: str = node.value
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        try:
            if kind == "int":
                return int(text, 0 if text.startswith(("0x", "0o")) else 10)
            return float(text)
        except ValueError:  # only with an explicit tag, such as !!int x
            self._refuse(node, f"{text!r} is not of type {kind}", "take the tag away")
            return None

    def _line(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def _refuse(self, node: yaml.Node, message: str, remedy: str | None) -> None:
        error = RecipeError(message, where=self._line(node), remedy=remedy)
        if str(error) not in map(str, self.errors):  # an alias is met where it is used
            self.errors.append(error)
