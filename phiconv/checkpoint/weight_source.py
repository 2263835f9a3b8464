"""What readers of weights ask of a checkpoint, and what else can stand in for one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np

    from phiconv.checkpoint.config import ModelConfig
    from phiconv.checkpoint.safetensors_file import TensorInfo


class Grid(NamedTuple):
    """A group-wise integer grid, as MatMulNBits has it.

    Attributes:
        bits: 4 or 8.
        group_size: Consecutive input features that share one scale: MatMulNBits' block_size.
        symmetric: Whether there are no zero points.
    """

    bits: int
    group_size: int
    symmetric: bool


class RoundedWeights(Protocol):
    """Weights that are integer codes already, such as GPTQ leaves them. Reading is thread-safe."""

    @property
    def tensors(self) -> Mapping[str, Grid]:
        """The grid of each such weight, by the checkpoint's name of its tensor."""
        ...

    def read_rows(
        self,
        name: str,
        start: int,
        *,
        packed: np.ndarray[Any, Any],
        scales: np.ndarray[Any, Any],
        zero_points: np.ndarray[Any, Any] | None,
    ) -> None:
        """Reads the rows from `start` on, as many as the arrays have, in MatMulNBits' layout.

        Args:
            name: The tensor, `[N, K]`.
            start: The first row.
            packed: uint8 `[n, blocks, group_size * bits / 8]`.
            scales: float16 or float32 `[n, blocks]`. Scales that float16 cannot hold become
                infinite there.
            zero_points: uint8 `[n, ceil(blocks * bits / 8)]`; None for a symmetric grid.

        Raises:
            StageError: They cannot be read.
            ValueError: The arrays do not fit.
        """
        ...


class WeightSource(Protocol):
    """Named tensors of one model, read row by row. Reading is thread-safe."""

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        ...

    @property
    def config(self) -> ModelConfig:
        """The normalised config."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name; `dtype` and `shape` are those of what is read."""
        ...

    @property
    def lm_head(self) -> str:
        """The name of the tensor that is the head's weight."""
        ...

    def for_grid(self, grid: Grid) -> WeightSource:
        """What to read for weights that will be quantized on this grid.

        The same, but for clip limits that were searched for it.
        """
        ...

    @property
    def rounded(self) -> RoundedWeights | None:
        """What has integer codes besides."""
        ...

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Reads a whole tensor into a new array."""
        ...

    def read_rows(
        self, name: str, start: int, stop: int, out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Reads rows `[start, stop)` of a tensor's first axis, into `out` if it is given."""
        ...
