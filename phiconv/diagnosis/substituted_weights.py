"""A checkpoint with other weights: rounded to fp16, or as an artifact stores them.

`phiconv.runtimes.reference` runs it like any checkpoint, layer by layer, so a rung of the ladder
differs from the reference in the weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from phiconv.checkpoint import Checkpoint, TensorInfo
from phiconv.errors import StageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from phiconv.diagnosis.weight_part import WeightPart

_LM_HEAD = "lm_head.weight"
_FLOAT_BYTES = 4

# Rows [start, stop) of a tensor, changed in place.
_Change = Callable[[str, int, "NDArray[np.float32]"], None]


class _SubstitutedWeights:
    """What the reference needs of a checkpoint; every tensor is fp32."""

    def __init__(self, checkpoint: Checkpoint, change: _Change):
        self.path = checkpoint.path
        self.config = checkpoint.config
        self._checkpoint = checkpoint
        self._change = change
        # a tied head gets a name of its own: an artifact may store it otherwise than the embedding
        self._source = {name: name for name in checkpoint.tensors}
        self._source.setdefault(_LM_HEAD, checkpoint.lm_head)
        self.tensors: Mapping[str, TensorInfo] = {
            name: _as_float(name, checkpoint.tensors[source])
            for name, source in self._source.items()
        }

    @property
    def lm_head(self) -> str:
        return _LM_HEAD

    def read(self, name: str) -> NDArray[Any]:
        return self.read_rows(name, 0, self.tensors[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        import numpy as np

        rows = self._checkpoint.read_rows(self._source[name], start, stop).astype(np.float32)
        self._change(name, start, rows)
        return rows


def _as_float(name: str, info: TensorInfo) -> TensorInfo:
    count = 1
    for size in info.shape:
        count *= size
    return replace(info, name=name, dtype="f32", nbytes=count * _FLOAT_BYTES)


def rounded_to_fp16(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with every weight rounded to fp16 and back."""
    import numpy as np

    def change(name: str, start: int, rows: NDArray[np.float32]) -> None:
        with np.errstate(over="ignore"):
            rows[...] = rows.astype(np.float16)

    return cast(Checkpoint, _SubstitutedWeights(checkpoint, change))


def with_weights_of(parts: Sequence[WeightPart], checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the weights of an artifact in place of its own.

    A weight that cannot be read, or whose shape does not fit, stays the checkpoint's.
    """
    by_tensor: dict[str, list[WeightPart]] = {}
    for part in parts:
        tensor = _LM_HEAD if part.component == "lm_head" else part.tensor
        by_tensor.setdefault(tensor, []).append(part)

    def change(name: str, start: int, rows: NDArray[np.float32]) -> None:
        for part in by_tensor.get(name, ()):
            first = max(start, part.tensor_start)
            last = min(start + len(rows), part.tensor_start + len(part))
            if first < last:
                offset = part.start - part.tensor_start
                _replace(rows[first - start : last - start], part, first + offset, last + offset)

    return cast(Checkpoint, _SubstitutedWeights(checkpoint, change))


def _replace(rows: NDArray[np.float32], part: WeightPart, start: int, stop: int) -> None:
    try:
        weight = part.load()
    except StageError:
        return
    if weight.shape[0] >= stop and weight.shape[1:] == rows.shape[1:]:
        rows[...] = weight.rows(start, stop)
