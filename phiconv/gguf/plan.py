"""What goes into a GGUF file: name, type and lazy source of every tensor, before any is read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from phiconv.checkpoint.config import EMBEDDING, LM_HEAD
from phiconv.errors import CheckpointError
from phiconv.gguf.file_types import TypeName
from phiconv.gguf.tensor_types import Assignment, TypeChoice, assign_types
from phiconv.kernels.ggml import row_nbytes

if TYPE_CHECKING:
    from phiconv.checkpoint import Checkpoint, ModelConfig

_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Weight:
    """A tensor that is computed from a checkpoint tensor, row by row.

    Attributes:
        name: Its name in the file.
        source: The checkpoint tensor.
        shape: Rows and columns; one row for a vector.
        is_vector: Whether the file stores it with one dimension.
        type: Its ggml type.
        wanted: The type that the rules gave it before its shape was looked at.
    """

    name: str
    source: str
    shape: tuple[int, int]
    is_vector: bool
    type: TypeName
    wanted: TypeName

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Its shape in the file, as numpy has it."""
        return self.shape[1:] if self.is_vector else self.shape

    @property
    def nbytes(self) -> int:
        """Size of its data in the file."""
        return self.shape[0] * row_nbytes(self.type, self.shape[1])


@dataclass(frozen=True)
class Constant:
    """A float32 vector that is no weight: LongRoPE's factors."""

    name: str
    values: tuple[float, ...]
    type: ClassVar[TypeName] = "F32"

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Its shape in the file."""
        return (len(self.values),)

    @property
    def nbytes(self) -> int:
        """Size of its data in the file."""
        return 4 * len(self.values)


@dataclass(frozen=True)
class TensorPlan:
    """The tensors of a file in their order: `llama-quantize`'s, by layer and then by name."""

    tensors: tuple[Weight | Constant, ...]

    @property
    def weights(self) -> tuple[Weight, ...]:
        """What comes from the checkpoint."""
        return tuple(tensor for tensor in self.tensors if isinstance(tensor, Weight))

    @property
    def parameters(self) -> int:
        """How many numbers the file holds."""
        return sum(prod(tensor.dimensions) for tensor in self.tensors)

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """A line for each tensor whose rows are not whole blocks of its type."""
        return tuple(
            f"{weight.name}: {weight.type} instead of {weight.wanted} (rows of {weight.shape[1]})"
            for weight in self.weights
            if weight.type != weight.wanted
        )


def plan_tensors(checkpoint: Checkpoint, choice: TypeChoice) -> TensorPlan:
    """Names every tensor and chooses its type; reads no weights.

    Raises:
        CheckpointError: gguf knows no name for a tensor.
    """
    config = checkpoint.config
    shapes = config.expected_tensors()
    if checkpoint.lm_head == LM_HEAD:
        # a tied checkpoint may hold a head of its own nevertheless, which transformers then uses
        shapes[LM_HEAD] = shapes[EMBEDDING]
    sources = {gguf: source for source, gguf in gguf_names(shapes, config).items()}
    by_layer = sorted(sources, key=_place)
    columns = {
        name: shapes[sources[name]][1] for name in by_layer if len(shapes[sources[name]]) == 2
    }
    assigned = assign_types(columns, config.num_hidden_layers, choice)
    tensors: list[Weight | Constant] = [
        _weight(name, sources[name], shapes[sources[name]], assigned.get(name)) for name in by_layer
    ]
    tensors += _rope_factors(config)
    return TensorPlan(tuple(sorted(tensors, key=lambda tensor: _place(tensor.name))))


def _weight(
    name: str, source: str, shape: tuple[int, ...], assignment: Assignment | None
) -> Weight:
    *rows, columns = shape
    return Weight(
        name=name,
        source=source,
        shape=(rows[0] if rows else 1, columns),
        is_vector=not rows,
        # llama.cpp reads norms as F32 only
        type=assignment.type if assignment else "F32",
        wanted=assignment.wanted if assignment else "F32",
    )


def gguf_names(tensors: Iterable[str], config: ModelConfig) -> dict[str, str]:
    """GGUF name of each checkpoint tensor, by gguf's own map for the architecture."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config.num_hidden_layers)
    found = {}
    for tensor in tensors:
        name = names.get_name(tensor, try_suffixes=(".weight",))
        if name is None:
            raise CheckpointError(f"GGUF has no name for the tensor {tensor!r}")
        found[tensor] = name
    return found


def _place(name: str) -> tuple[int, str]:
    """Sorts as llama.cpp's loader does: what belongs to no layer first, then layer by layer."""
    block = _BLOCK.match(name)
    return (int(block[1]) if block else -1, name)


def _rope_factors(config: ModelConfig) -> list[Constant]:
    if config.rope is None:
        return []
    return [
        Constant("rope_factors_long.weight", config.rope.long_factor),
        Constant("rope_factors_short.weight", config.rope.short_factor),
    ]
