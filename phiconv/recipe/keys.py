"""Which keys a pydantic model takes at a place, for "did you mean" and for `--set`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from phiconv.recipe.document import KeyPath


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Returns a remedy that names the closest known word, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known here: {', '.join(names)}" if names else None


def known_keys(annotation: Any, path: KeyPath) -> list[str]:
    """The keys that the type `annotation` takes at `path`; [] where any key goes or none does."""
    types = list(_members(annotation))
    for key in path:
        children = [child for kind in types for child in child_types(kind, key)]
        types = children or types  # a path element that is no key is pydantic's union tag
    return [name for kind in types for name in _fields(kind)]


def child_types(annotation: Any, key: str | int) -> list[Any]:
    """The types that `annotation` holds under `key` (unions flattened); [] when it has no such."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [
            member
            for name, model_field in annotation.model_fields.items()
            if key == (model_field.alias or name)
            for member in _members(model_field.annotation)
        ]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if not isinstance(origin, type) or not arguments:
        return []
    if issubclass(origin, Mapping) and isinstance(key, str):
        return list(_members(arguments[1]))
    if issubclass(origin, Sequence) and isinstance(key, int):
        return list(_members(arguments[0]))
    return []


def takes_any_key(annotation: Any) -> bool:
    """Whether `annotation` is a mapping whose keys the user chooses."""
    origin = get_origin(annotation) or annotation
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _fields(annotation: Any) -> list[str]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [item.alias or name for name, item in annotation.model_fields.items()]
    return []


def _members(annotation: Any) -> Iterator[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin is Union or origin is UnionType:
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation
