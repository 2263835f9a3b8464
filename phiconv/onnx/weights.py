"""How each initializer of an ONNX graph is computed from checkpoint tensors.

An exported graph carries no weight data. Each initializer is an expression over rows of
checkpoint tensors; `quantize` and `cast` replace expressions, and the writer evaluates each one
once, in chunks. The expressions serialise to JSON, so a stage's output is a few hundred kilobytes
whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from phiconv.errors import ExportError

FloatType = Literal["FLOAT", "FLOAT16"]
Part = Literal["weight", "scales", "zero_points"]
Search = Literal["none", "mse"]


@dataclass(frozen=True)
class Rows:
    """Rows ``[start, stop)`` along the first axis of one checkpoint tensor."""

    tensor: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Dense:
    """A weight stored as floating point, rounded to nearest even.

    Attributes:
        rows: Row ranges, concatenated along the first axis.
        transposed: Whether the ``[N, K]`` weight is stored as ``[K, N]``, as MatMul wants it.
        overflow: What happens to a finite value outside the target type's range.
    """

    rows: tuple[Rows, ...]
    transposed: bool = False
    overflow: Literal["error", "clamp"] = "error"


@dataclass(frozen=True)
class Quantization:
    """A group-wise integer format of the MatMulNBits operator.

    Attributes:
        bits: 4 or 8.
        block_size: Number of consecutive input features that share one scale.
        symmetric: Without (True) or with (False) stored zero points.
        search: ``none`` for absmax/min-max rounding, ``mse`` for an error-minimising scale.
        scale_dtype: Type of the scales; the weight is rounded to it before it is quantized, as
            ONNX Runtime's quantizer does when it is given a graph of that type.
    """

    bits: int
    block_size: int
    symmetric: bool
    search: Search
    scale_dtype: FloatType


@dataclass(frozen=True)
class Blockwise:
    """One of the tensors that a group-wise quantized ``[N, K]`` weight becomes.

    Attributes:
        rows: Row ranges, concatenated along the first axis.
        quantization: The format.
        part: Which of the format's tensors this is.
        group: Name that the parts of one weight have in common; they are computed together.
    """

    rows: tuple[Rows, ...]
    quantization: Quantization
    part: Part
    group: str


@dataclass(frozen=True)
class Packed:
    """One of the tensors of a weight that is integer codes already: copied, not quantized.

    The codes are those that the writer's source has besides its weights (`RoundedWeights`).

    Attributes:
        rows: Row ranges, concatenated along the first axis.
        quantization: The format of the codes; its `search` is of no use.
        part: Which of the format's tensors this is.
        group: As in `Blockwise`.
    """

    rows: tuple[Rows, ...]
    quantization: Quantization
    part: Part
    group: str


Expression = Dense | Blockwise | Packed


def to_json(weights: Mapping[str, Expression]) -> dict[str, Any]:
    """Serialise expressions by initializer name."""
    return {name: {"op": _OPS[type(expr)], **asdict(expr)} for name, expr in weights.items()}


def from_json(document: Mapping[str, Any]) -> dict[str, Expression]:
    """Inverse of `to_json`.

    Raises:
        ExportError: The document was not written by `to_json`.
    """
    try:
        return {name: _parse(dict(entry)) for name, entry in document.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"weights.json is not a weight plan: {error!r}") from error


_OPS: dict[type[Expression], str] = {
    Dense: "dense",
    Blockwise: "blockwise",
    Packed: "packed",
}


def _parse(entry: dict[str, Any]) -> Expression:
    op = entry.pop("op")
    entry["rows"] = tuple(Rows(**rows) for rows in entry["rows"])
    if op == "dense":
        return Dense(**entry)
    if op in ("blockwise", "packed"):
        entry["quantization"] = Quantization(**entry["quantization"])
        return Blockwise(**entry) if op == "blockwise" else Packed(**entry)
    raise ValueError(f"unknown weight expression {op!r}")


def merged(rows: Iterable[Rows]) -> tuple[Rows, ...]:
    """Join consecutive ranges of one tensor."""
    joined: list[Rows] = []
    for part in rows:
        last = joined[-1] if joined else None
        if last is not None and last.tensor == part.tensor and last.stop == part.start:
            joined[-1] = Rows(last.tensor, last.start, part.stop)
        else:
            joined.append(part)
    return tuple(joined)


def between(rows: Sequence[Rows], start: int, stop: int) -> Iterator[Rows]:
    """Rows `[start, stop)` of a concatenation, tensor by tensor."""
    position = 0
    for part in rows:
        first, last = max(start - position, 0), min(stop - position, len(part))
        if first < last:
            yield Rows(part.tensor, part.start + first, part.start + last)
        position += len(part)


def row_count(rows: Sequence[Rows]) -> int:
    """Total number of rows of a concatenation."""
    return sum(len(part) for part in rows)
