"""Checks a GGUF file byte by byte up to its weights, with no reader but this one.

Follows ggml's docs/gguf.md and what gguf_init_from_file of ggml/src/gguf.cpp demands: tensors lie
in the order of their infos, each at the next multiple of the alignment, and nothing follows.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

from phiconv.errors import StageError

MAGIC, VERSION = b"GGUF", 3
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_NAME = 63  # GGML_MAX_NAME with its final zero
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_REMEDY = "download or copy the file again"

Scalar = int | float | bool | str


class ArrayValue(NamedTuple):
    """An array of the metadata: the type of its elements, and how many there are."""

    type: int
    length: int


class TensorInfo(NamedTuple):
    """Where a tensor lies.

    `shape` is in ggml's order, the fastest axis first; `offset` counts from the start of the data.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufStructure:
    """A GGUF file whose structure is sound.

    Attributes:
        metadata: Every key; arrays as their type and length.
        tensors: In the order of the file.
        data_offset: Where the tensors begin, in bytes.
    """

    metadata: Mapping[str, Scalar | ArrayValue]
    tensors: tuple[TensorInfo, ...]
    data_offset: int


def read_structure(path: Path) -> GgufStructure:
    """Reads header, metadata and tensor infos; no weight is read.

    Raises:
        StageError: The file is no GGUF file of version 3, is cut off, is longer than its tensors,
            or says something that cannot be.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            found = _Reader(file, size, str(path)).structure()
    except OSError as error:
        message = f"the GGUF file cannot be read: {error.strerror}"
        raise StageError(message, where=str(path), remedy=_REMEDY) from error
    _check_against_metadata(found, str(path))
    return found


class _Reader:
    """Reads little-endian values and never more than the file has."""

    def __init__(self, file: BufferedReader, size: int, where: str) -> None:
        self._file, self._left, self._size, self._where = file, size, size, where

    def structure(self) -> GgufStructure:
        if self._bytes(4) != MAGIC:
            self._fail("it does not begin with GGUF")
        if (version := self._number("I")) != VERSION:
            self._fail(f"its version is {version}, not {VERSION}")
        tensor_count, key_count = self._number("Q"), self._number("Q")
        metadata: dict[str, Scalar | ArrayValue] = {}
        for _ in range(self._count(key_count, 13)):
            key = self._text("a key")
            if not key or key in metadata:
                self._fail(f"the key {key!r} stands twice" if key else "a key is empty")
            metadata[key] = self._value(self._number("I"), key)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not _is_power_of_two(alignment):
            self._fail(f"general.alignment is {alignment!r}, which is no power of two")
        assert isinstance(alignment, int)
        tensors: list[TensorInfo] = []
        end = 0
        for _ in range(self._count(tensor_count, 25)):
            tensors.append(self._tensor(end))
            end = _padded(end + tensors[-1].nbytes, alignment)
        start = _padded(self._size - self._left, alignment)
        self._check_end(tensors, start, end)
        return GgufStructure(metadata, tuple(tensors), start)

    def _tensor(self, expected_offset: int) -> TensorInfo:
        name = self._text("a tensor's name")
        if not 0 < len(name.encode()) <= _MAX_NAME:
            self._fail(f"a tensor's name is {len(name)} characters long: {name[:40]!r}")
        dims = self._number("I")
        if not 1 <= dims <= _MAX_DIMS:
            self._fail(f"tensor {name} has {dims} axes")
        shape = tuple(self._number("Q") for _ in range(dims))
        kind, nbytes = self._stored(name, shape, self._number("I"))
        if (offset := self._number("Q")) != expected_offset:
            self._fail(f"tensor {name} lies at {offset}, not at {expected_offset}")
        return TensorInfo(name, shape, kind, offset, nbytes)

    def _stored(self, name: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
        """The name of a ggml type, and the bytes of a tensor of it."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            self._fail(f"tensor {name} has the unknown type {number}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        count = 1
        for extent in shape:
            count *= extent
        if not count or shape[0] % block:
            self._fail(f"tensor {name} of shape {list(shape)} cannot be {kind.name}")
        return kind.name, count // block * block_bytes

    def _check_end(self, tensors: list[TensorInfo], start: int, end: int) -> None:
        names = sorted(tensor.name for tensor in tensors)
        if twice := [name for name, after in pairwise(names) if name == after]:
            self._fail(f"tensor {twice[0]} stands twice")
        last = tensors[-1].offset + tensors[-1].nbytes if tensors else 0
        if tensors and self._size < start + last:
            self._fail(f"it ends at byte {self._size}, its last tensor at {start + last}")
        if self._size > start + end:
            self._fail(f"{self._size - start - end} bytes follow its last tensor")

    def _value(self, kind: int, key: str) -> Scalar | ArrayValue:
        if kind != _ARRAY:
            return self._scalar(kind, key)
        element, length = self._number("I"), self._number("Q")
        if element in _SCALARS:
            self._bytes(struct.calcsize(_SCALARS[element]) * length)
        else:
            if element not in (_BOOL, _STRING):
                self._fail(f"{key} is an array of the unknown type {element}")
            for _ in range(self._count(length, 1)):
                self._scalar(element, key)
        return ArrayValue(element, length)

    def _scalar(self, kind: int, key: str) -> Scalar:
        if kind == _STRING:
            return self._text(key)
        if kind == _BOOL:
            if (value := self._number("B")) > 1:
                self._fail(f"{key} is a truth value of {value}")
            return bool(value)
        if kind not in _SCALARS:
            self._fail(f"{key} has the unknown type {kind}")
        found: Scalar = struct.unpack(f"<{_SCALARS[kind]}", self._bytes(_width(kind)))[0]
        return found

    def _number(self, code: str) -> int:
        found: int = struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))[0]
        return found

    def _text(self, what: str) -> str:
        data = self._bytes(self._number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            # a byte-level piece of a token need not be a whole character
            if what.startswith("tokenizer."):
                return data.decode("utf-8", "replace")
            self._fail(f"{what} is no UTF-8 text")

    def _count(self, count: int, least_bytes: int) -> int:
        """A count of things that take at least so many bytes each."""
        if count * least_bytes > self._left:
            self._fail(f"it counts {count} things where {self._left} bytes are left")
        return count

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            self._fail(f"{count} bytes are wanted where {self._left} are left")
        self._left -= count
        return self._file.read(count)

    def _fail(self, what: str) -> NoReturn:
        raise StageError(f"not a sound GGUF file: {what}", where=self._where, remedy=_REMEDY)


def _width(kind: int) -> int:
    return struct.calcsize(_SCALARS[kind])


def _is_power_of_two(value: object) -> bool:
    return type(value) is int and value > 0 and not value & (value - 1)


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _check_against_metadata(found: GgufStructure, where: str) -> None:
    """What the metadata says of vocabulary and layers is what the tensors are."""
    problems: list[str] = []
    tokens = found.metadata.get("tokenizer.ggml.tokens")
    vocabulary = tokens.length if isinstance(tokens, ArrayValue) else None
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        value = found.metadata.get(key)
        if isinstance(value, ArrayValue) and value.length != vocabulary:
            problems.append(f"{key} has {value.length} values for {vocabulary} tokens")
    for key, value in found.metadata.items():
        is_id = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if is_id and not (isinstance(value, int) and vocabulary and value < vocabulary):
            problems.append(f"{key} is {value!r}, with {vocabulary} tokens")
    architecture = found.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        problems.append("general.architecture is missing")
    layers = found.metadata.get(f"{architecture}.block_count")
    parts = (tensor.name.split(".") for tensor in found.tensors)
    blocks = {part[1] for part in parts if part[0] == "blk" and len(part) > 1}
    if blocks and blocks != {str(layer) for layer in range(len(blocks))}:
        problems.append("the tensors of a layer are missing")
    elif blocks and layers != len(blocks):
        problems.append(f"{architecture}.block_count is {layers!r}, with {len(blocks)} layers")
    problems += [
        f"the embedding has {tensor.shape[-1]} rows for {vocabulary} tokens"
        for tensor in found.tensors
        if tensor.name == "token_embd.weight" and tensor.shape[-1] != vocabulary
    ]
    if problems:
        raise StageError(
            f"the GGUF file contradicts itself: {'; '.join(problems)}", where=where, remedy=_REMEDY
        )
