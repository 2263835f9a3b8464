"""Reads weights through an overlay: scaled by row and column, optionally clipped by group.

The arithmetic is float32 throughout, each product rounded once: `(w * columns[k]) * rows[n]`. A
clip index `i` of a group of `group_size` consecutive columns clamps the group's products to
`+-largest * (1 - i / 20)`, where `largest` is the largest magnitude among them: AutoAWQ's grid of
clip limits (`_compute_best_clip`, n_grid 20, max_shrink 0.5).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.floats import bit_view, largest, load
from phiconv.kernels.jit import kernel

Array = npt.NDArray[Any]

CLIP_STEPS = 20
"""A clip index is a number of this many parts that are taken off the largest magnitude."""
MAX_CLIP = 10
"""The largest clip index: half of the largest magnitude."""


@kernel
def _scale(
    source: Array,
    source_format: int,
    columns: Array,
    rows: Array,
    clip: Array | None,
    group_size: int,
    out: Array,
) -> None:
    """Fills float32 `out` `[n, K]`; without `clip` nothing is clamped."""
    n, k = out.shape
    for r in range(n):
        target = out[r]
        load(source[r], source_format, target.view(np.int32))
        for i in range(k):
            target[i] = np.float32(np.float32(target[i] * columns[i]) * rows[r])
        if clip is not None:
            for group in range(clip.shape[1]):
                index = np.int32(clip[r, group])
                if index == 0:
                    continue
                values = target[group * group_size : min((group + 1) * group_size, k)]
                top = np.int32(largest(values.view(np.int32), values.shape[0])).view(np.float32)
                share = np.float32(np.float32(20 - index) / np.float32(20))
                limit = np.float32(top * share)
                for i in range(values.shape[0]):
                    # written so that NaN passes: the writers report it
                    if values[i] > limit:
                        values[i] = limit
                    elif values[i] < -limit:
                        values[i] = -limit


def scale_rows(
    weight: Array,
    out: npt.NDArray[np.float32],
    *,
    columns: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
    clip: npt.NDArray[np.uint8] | None = None,
    group_size: int = 0,
) -> None:
    """Multiplies rows of a stored weight by factors, and clips them if told how.

    NaN and infinite weights stay what they are.

    Args:
        weight: `[n, K]`, C-contiguous; bfloat16 (or its bits as uint16), float16 or float32.
        out: Receives the result; `[n, K]`, C-contiguous.
        columns: Factor of each column, `[K]`.
        rows: Factor of each row, `[n]`.
        clip: Clip index of each group, 0 to `MAX_CLIP`, `[n, ceil(K / group_size)]`.
        group_size: Columns that share a clip index.

    Raises:
        ValueError: Shapes, dtypes or layouts do not fit.
    """
    source, source_format = bit_view(weight, "weight")
    if weight.ndim != 2 or out.shape != weight.shape:
        raise ValueError(f"out has shape {out.shape}, weight has {weight.shape}")
    if out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError("out must be C-contiguous float32")
    n, k = weight.shape
    if columns.dtype != np.float32 or columns.shape != (k,):
        raise ValueError(f"columns must be float32 of shape {(k,)}")
    if rows.dtype != np.float32 or rows.shape != (n,):
        raise ValueError(f"rows must be float32 of shape {(n,)}")
    if clip is not None:
        if group_size < 1 or clip.dtype != np.uint8 or clip.shape != (n, -(-k // group_size)):
            raise ValueError(f"clip must be uint8, one for each group of {group_size} columns")
        clip = np.ascontiguousarray(clip)
    _scale(
        source,
        source_format,
        np.ascontiguousarray(columns),
        np.ascontiguousarray(rows),
        clip,
        group_size,
        out,
    )
