"""A checkpoint read through an overlay, a `WeightSource` like the checkpoint itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from phiconv.checkpoint.safetensors_file import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    from phiconv.checkpoint.config import ModelConfig
    from phiconv.checkpoint.overlay import Overlay
    from phiconv.checkpoint.reader import Checkpoint
    from phiconv.checkpoint.safetensors_file import StoredDtype
    from phiconv.checkpoint.weight_source import Grid, RoundedWeights


class OverlaidCheckpoint:
    """A checkpoint whose weights are multiplied, and clipped, as its overlay says.

    What the overlay touches is float32; the rest passes through. Thread-safe as the checkpoint is.

    Args:
        checkpoint: The checkpoint.
        overlay: Its overlay.
        clip: Whether groups are clipped, as weights are that will be quantized on its grid.

    Attributes:
        path: The checkpoint's folder.
        source: What the user named.
        revision: The commit on the Hub, if any.
        config: The normalised config.
        raw_config: config.json as it is.
        files: The names of the files beside the weights.
        weight_files: The names of the safetensors files.
        tensors: Every tensor; those that the overlay touches as float32.
        lm_head: The name of the tensor that is the head's weight.
        overlay: The overlay.
        rounded: The overlay's codes.

    Raises:
        StageError: The overlay is not this checkpoint's.
    """

    def __init__(self, checkpoint: Checkpoint, overlay: Overlay, *, clip: bool):
        from phiconv.write_threads import ThreadBuffers

        overlay.check_fits(checkpoint)
        self.path = checkpoint.path
        self.source = checkpoint.source
        self.revision = checkpoint.revision
        self.config: ModelConfig = checkpoint.config
        self.raw_config = checkpoint.raw_config
        self.files = checkpoint.files
        self.weight_files = checkpoint.weight_files
        self.lm_head = checkpoint.lm_head
        self.overlay = overlay
        self.rounded: RoundedWeights | None = overlay.rounded
        touched = {*overlay.columns, *overlay.rows, *(overlay.clips if clip else ())}
        self.tensors: Mapping[str, TensorInfo] = {
            name: _as_float(info) if name in touched else info
            for name, info in checkpoint.tensors.items()
        }
        self._checkpoint = checkpoint
        self._touched = touched
        self._clip = clip
        self._buffers = ThreadBuffers()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are read."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtype(self) -> StoredDtype:
        """The checkpoint's stored dtype of most bytes."""
        return self._checkpoint.dtype

    @property
    def digest(self) -> str:
        """The checkpoint's digest; the overlay is not in it."""
        return self._checkpoint.digest

    def for_grid(self, grid: Grid) -> OverlaidCheckpoint:
        """Itself, but clipped if the overlay's limits are for this grid."""
        return self._clipped if grid == self.overlay.grid and self.overlay.clips else self

    @cached_property
    def _clipped(self) -> OverlaidCheckpoint:
        return self if self._clip else OverlaidCheckpoint(self._checkpoint, self.overlay, clip=True)

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Reads a whole tensor into a new array, as `Checkpoint.read` does."""
        if name not in self._touched:
            return self._checkpoint.read(name)
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(
        self, name: str, start: int, stop: int, out: np.ndarray[Any, Any] | None = None
    ) -> np.ndarray[Any, Any]:
        """Reads rows `[start, stop)` of a tensor, as `Checkpoint.read_rows` does.

        `out` is float32 where the overlay touches the tensor.
        """
        import numpy as np

        from phiconv.checkpoint.safetensors_file import numpy_dtype
        from phiconv.kernels.overlay import scale_rows

        if name not in self._touched:
            return self._checkpoint.read_rows(name, start, stop, out)
        stored = self._checkpoint.tensors[name]
        shape = (stop - start, *stored.shape[1:])
        buffer = self._buffers.get("stored", shape, numpy_dtype(stored.dtype))
        self._checkpoint.read_rows(name, start, stop, buffer)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape:
            raise ValueError(f"out must be of shape {list(shape)}, not {list(out.shape)}")
        columns, rows = self.overlay.columns.get(name), self.overlay.rows.get(name)
        if rows is not None:
            rows = rows[start:stop]
        clip = self.overlay.clips.get(name) if self._clip else None
        if len(shape) == 1:  # a norm: one row whose columns have the factors
            buffer, target = buffer[None], out[None]
            columns, rows = rows, None
        else:
            target = out
        scale_rows(
            buffer,
            target,
            columns=np.ones(buffer.shape[1], np.float32) if columns is None else columns,
            rows=np.ones(len(buffer), np.float32) if rows is None else rows,
            clip=None if clip is None else clip[start:stop],
            group_size=self.overlay.grid.group_size,
        )
        return out


def _as_float(info: TensorInfo) -> TensorInfo:
    count = 1
    for size in info.shape:
        count *= size
    return replace(info, dtype="f32", nbytes=4 * count)
