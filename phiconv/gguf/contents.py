"""What a GGUF file holds: its metadata in short, and how each kind of weights is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from phiconv.errors import StageError
from phiconv.report.results import TensorKindRecord

_KINDS = {"attn": "attention", "ffn": "mlp", "token_embd": "embedding", "output": "lm_head"}
_SHOWN = 80


class StoredTensor(NamedTuple):
    """A tensor's name, ggml type, number of values and bytes."""

    name: str
    type: str
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class GgufSummary:
    """A GGUF file.

    Attributes:
        model: Name of the file.
        files: Its size in bytes by its name.
        metadata: Its keys; lists as their length, long texts shortened.
        dtypes: Number of tensors and bytes, by ggml type.
        weights: How each kind of weights is stored.
    """

    model: str
    files: Mapping[str, int]
    metadata: Mapping[str, Any]
    dtypes: Mapping[str, tuple[int, int]]
    weights: tuple[TensorKindRecord, ...]

    @property
    def bits_per_weight(self) -> float:
        """Mean bits a weight, scales included."""
        parameters = sum(record.parameters for record in self.weights)
        return 8 * sum(record.size_bytes for record in self.weights) / max(parameters, 1)


def inspect_gguf(file: Path) -> GgufSummary:
    """Looks into a GGUF file; reads no weights.

    Raises:
        StageError: It is no GGUF file.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise StageError(f"not a GGUF file: {error}", where=str(file)) from error
    tensors = [
        StoredTensor(t.name, t.tensor_type.name, int(t.n_elements), int(t.n_bytes))
        for t in reader.tensors
    ]
    dtypes: dict[str, tuple[int, int]] = {}
    for tensor in tensors:
        count, size = dtypes.get(tensor.type, (0, 0))
        dtypes[tensor.type] = count + 1, size + tensor.nbytes
    return GgufSummary(
        model=file.name,
        files={file.name: file.stat().st_size},
        metadata={
            name: _short(field)
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        },
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1][1])),
        weights=tensor_kinds(tensors),
    )


def tensor_kinds(tensors: Iterable[StoredTensor]) -> tuple[TensorKindRecord, ...]:
    """Sums up tensors by what they are and how they are stored, the largest first."""
    sums: dict[tuple[str, str], list[int]] = {}
    for tensor in tensors:
        total = sums.setdefault((_kind(tensor.name), tensor.type), [0, 0])
        total[0] += tensor.parameters
        total[1] += tensor.nbytes
    largest = sorted(sums.items(), key=lambda item: (-item[1][1], item[0]))
    return tuple(
        TensorKindRecord(kind, stored, parameters, size)
        for (kind, stored), (parameters, size) in largest
    )


def _kind(name: str) -> str:
    stem = name.removesuffix(".weight").rpartition(".")[2]
    if stem.endswith("norm"):
        return "norm"
    if stem.startswith("rope"):
        return "rotary"
    return _KINDS.get(stem) or _KINDS.get(stem.split("_")[0], "other")


def _short(field: Any) -> Any:
    import gguf

    if field.types[0] == gguf.GGUFValueType.ARRAY:
        return f"{len(field.data)} values"
    value = field.contents()
    return f"{value[:_SHOWN]}…" if isinstance(value, str) and len(value) > _SHOWN else value
