"""What every weight of an artifact is to a diagnosis: float32 rows, and how they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


FLOATS = frozenset({"f16", "bf16", "f32", "f64"})
"""The float types, as a `Format` is written."""


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Attributes:
        bits: Bits of a code, or of a float; in a GGUF file with the bits of the scales.
        dtype: `int`, a float type: `f32`, `f16`, `bf16`, `f64`, or a type of ggml: `Q4_K`.
        block_size: Weights that share a scale; 0 for floats.
        symmetric: Whether there are no zero points.
        scale_dtype: Float type of the scales; empty for floats and ggml's types.
        weighted: Whether it was rounded with an importance matrix, as its file says.
    """

    bits: float
    dtype: str
    block_size: int = 0
    symmetric: bool = True
    scale_dtype: str = ""
    weighted: bool = False

    def __str__(self) -> str:
        if self.dtype != "int":
            return self.dtype
        kind = "" if self.symmetric else " asymmetric"
        return f"int{self.bits} block {self.block_size}{kind}"

    @property
    def quantized(self) -> bool:
        """Whether it is stored as codes with scales."""
        return self.block_size > 0


class StoredWeight(Protocol):
    """A weight of an artifact."""

    @property
    def name(self) -> str:
        """Where it is stored."""
        ...

    @property
    def format(self) -> Format:
        """How it is stored."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """`[N, K]`, or `[N]` for a norm."""
        ...

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `[start, stop)` as float32."""
        ...
