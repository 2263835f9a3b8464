"""Integer codes of weights in a safetensors file, as GPTQ leaves them beside an overlay.

`<tensor>:codes` uint8 [N, blocks, group_size * bits / 8], `<tensor>:scales` float16 [N, blocks]
and, on an asymmetric grid, `<tensor>:zero_points` uint8 [N, ceil(blocks * bits / 8)]: the layout of
MatMulNBits. A row's unused codes (K not a multiple of group_size) are zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.problems import name_list
from phiconv.checkpoint.safetensors_file import NUMBERS, SafetensorsFile
from phiconv.checkpoint.safetensors_writer import SafetensorsWriter
from phiconv.errors import CheckpointError, StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint.safetensors_file import StoredDtype
    from phiconv.checkpoint.weight_source import Grid

ROUNDED_FILE = "rounded.safetensors"
_CODES, _SCALES, _ZERO_POINTS = ":codes", ":scales", ":zero_points"


def _layout(grid: Grid, n: int, k: int) -> dict[str, tuple[StoredDtype, tuple[int, ...]]]:
    """The parts of an `[n, k]` weight: dtype and shape."""
    blocks = -(-k // grid.group_size)
    parts: dict[str, tuple[StoredDtype, tuple[int, ...]]] = {
        _CODES: ("u8", (n, blocks, grid.group_size * grid.bits // 8)),
        _SCALES: ("f16", (n, blocks)),
    }
    if not grid.symmetric:
        parts[_ZERO_POINTS] = ("u8", (n, -(-blocks * grid.bits // 8)))
    return parts


class RoundedWriter:
    """Writes codes weight by weight; equal codes give equal bytes. A context manager.

    Args:
        folder: The overlay's folder.
        grid: The grid of all weights.
        shapes: `(N, K)` of each weight, by checkpoint tensor.
    """

    def __init__(self, folder: Path, grid: Grid, shapes: Mapping[str, tuple[int, int]]):
        self._grid = grid
        self._writer = SafetensorsWriter(
            folder / ROUNDED_FILE,
            {
                tensor + part: entry
                for tensor, shape in shapes.items()
                for part, entry in _layout(grid, *shape).items()
            },
        )

    def write(
        self,
        tensor: str,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float16],
        zero_points: NDArray[np.uint8] | None,
    ) -> None:
        """Writes one weight, shaped as this module says.

        Raises:
            KeyError: The file has no such weight.
            ValueError: Shapes or dtypes do not fit, or zero points do not fit the grid.
        """
        if self._grid.symmetric != (zero_points is None):
            raise ValueError("zero points belong to asymmetric grids, and only to them")
        self._writer.write(tensor + _CODES, codes)
        self._writer.write(tensor + _SCALES, scales)
        if zero_points is not None:
            self._writer.write(tensor + _ZERO_POINTS, zero_points)

    def __enter__(self) -> RoundedWriter:
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, traceback)


class RoundedFile:
    """The codes of a file: `RoundedWeights`.

    Args:
        path: The file.
        grid: The grid of all weights.

    Attributes:
        tensors: The grid, by checkpoint tensor.
        shapes: Rows and blocks, by checkpoint tensor.

    Raises:
        StageError: It cannot be read, or does not hold such codes.
    """

    def __init__(self, path: Path, grid: Grid):
        try:
            self._file = SafetensorsFile(path, path.name, NUMBERS)
        except CheckpointError as error:
            raise _damaged(error.message, path) from error
        entries = self._file.tensors
        self.tensors: Mapping[str, Grid] = {
            entry.removesuffix(_CODES): grid for entry in entries if entry.endswith(_CODES)
        }
        self.shapes: dict[str, tuple[int, int]] = {}
        expected: dict[str, tuple[StoredDtype, tuple[int, ...]]] = {}
        for tensor in self.tensors:
            shape = entries[tensor + _CODES].shape
            if len(shape) != 3:
                raise _damaged(f"{tensor}{_CODES} has the shape {list(shape)}", path)
            n, blocks, _ = shape
            self.shapes[tensor] = (n, blocks)
            parts = _layout(grid, n, blocks * grid.group_size)
            expected |= {tensor + part: entry for part, entry in parts.items()}
        found = {name: (info.dtype, info.shape) for name, info in entries.items()}
        if found != expected:
            wrong = sorted(dict(found.items() ^ expected.items()))
            raise _damaged(f"missing, left over or of another shape: {name_list(wrong)}", path)

    def read_rows(
        self,
        name: str,
        start: int,
        *,
        packed: np.ndarray[Any, Any],
        scales: np.ndarray[Any, Any],
        zero_points: np.ndarray[Any, Any] | None,
    ) -> None:
        """See `RoundedWeights.read_rows`; float32 scales are the stored ones, widened.

        Raises:
            CheckpointError: The file was changed since it was opened.
            StageError: A scale is not finite.
            ValueError: The arrays do not fit.
        """
        import numpy as np

        stop = start + len(packed)
        self._file.read_rows(name + _CODES, start, stop, packed)
        stored = self._file.read_rows(name + _SCALES, start, stop)
        if not np.isfinite(stored).all():
            raise _damaged(f"{name}{_SCALES} holds NaN or Inf", self._file.path)
        if scales.shape != stored.shape:
            raise ValueError(f"scales must be of shape {list(stored.shape)}")
        scales[...] = stored
        if zero_points is not None:
            self._file.read_rows(name + _ZERO_POINTS, start, stop, zero_points)


def _damaged(message: str, path: Path) -> StageError:
    return StageError(
        f"the overlay's codes are damaged: {message}",
        where=str(path),
        remedy="make the overlay again",
    )
