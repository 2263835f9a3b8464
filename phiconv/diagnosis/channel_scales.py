"""Recognises weights that were rescaled channel by channel, as AWQ and SmoothQuant do.

Such a weight is far from the checkpoint's, yet the model computes the same: what a column is
multiplied by, the operation in front is divided by. So it is no fault by itself; whether the
scales are undone shows in the local errors of the layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phiconv.diagnosis.block_errors import Scales, checkpoint_rows
from phiconv.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from phiconv.checkpoint import Checkpoint
    from phiconv.diagnosis.weight_format import StoredWeight
    from phiconv.diagnosis.weight_part import WeightPart

_ITERATIONS = 3
# Scales are scales when a quarter of them differ from the middle one by a percent.
_SHARE = 0.25
_DIFFERENCE = 0.01


def fit_channel_scales(
    part: WeightPart, weight: StoredWeight, checkpoint: Checkpoint
) -> Scales | None:
    """Row and column factors that best take the checkpoint's weight to the stored one.

    Least squares of `stored[i, j] = rows[i] * columns[j] * checkpoint[i, j]`, rows and columns in
    turn. None where they are alike for most channels: then nothing was rescaled, and a fault in a
    few channels must not be explained away.
    """
    import numpy as np

    expected = checkpoint_rows(part, checkpoint, 0, len(part))
    found = np.nan_to_num(weight.rows(part.start, part.stop))
    product, square = expected * found, expected * expected
    rows = np.ones(expected.shape[0], np.float32)
    columns = np.ones(expected.shape[1], np.float32)
    for _ in range(_ITERATIONS):
        columns = _ratio(rows @ product, (rows * rows) @ square)
        rows = _ratio(product @ columns, square @ (columns * columns))
    return Scales(rows, columns) if _varies(rows) or _varies(columns) else None


def undone_in_readers(
    norm: WeightPart, readers: Sequence[WeightPart], checkpoint: Checkpoint
) -> bool:
    """Whether every reader of a norm's output undoes what the norm was multiplied by.

    Then its columns, divided by the norm's factors, are nearer to the checkpoint's than as they
    are, whatever its rows were multiplied by. A fault in the norm alone, or in one that was
    rescaled besides, takes them further away.

    Args:
        norm: The norm's weight.
        readers: The weights that read it; none is False.
        checkpoint: Where the weights come from.
    """
    import numpy as np

    if not readers:
        return False
    expected = checkpoint_rows(norm, checkpoint, 0, len(norm))
    try:
        found = norm.load().rows(norm.start, norm.stop)
        weights = [reader.load() for reader in readers]
    except StageError:
        return False
    if found.shape != expected.shape or not np.isfinite(found).all():
        return False
    factors: NDArray[np.float32] = np.ones(len(norm), np.float32)
    np.divide(expected, found, out=factors, where=found != 0)
    for reader, weight in zip(readers, weights, strict=True):
        if weight.shape[0] < reader.stop or weight.shape[1:] != factors.shape:
            return False
        own = checkpoint_rows(reader, checkpoint, 0, len(reader))
        stored = np.nan_to_num(weight.rows(reader.start, reader.stop))
        if _energy_left(stored, own * factors) >= _energy_left(stored, own):
            return False
    return True


def _energy_left(stored: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """What is left of the stored rows beside the nearest multiple of each expected row."""
    import numpy as np

    product = (stored * expected).sum(axis=1, dtype=np.float64)
    square = np.square(expected).sum(axis=1, dtype=np.float64)
    explained = np.divide(product * product, square, out=np.zeros_like(square), where=square > 0)
    return float(np.square(stored).sum(dtype=np.float64) - explained.sum())


def _ratio(above: NDArray[Any], below: NDArray[Any]) -> NDArray[np.float32]:
    import numpy as np

    ratio: NDArray[np.float32] = np.ones(len(above), np.float32)
    np.divide(above, below, out=ratio, where=below > 0)
    return ratio


def _varies(scales: NDArray[np.float32]) -> bool:
    import numpy as np

    middle = float(np.median(scales))
    if middle == 0:
        return False
    return float((np.abs(scales / middle - 1) > _DIFFERENCE).mean()) >= _SHARE
