"""Per-block search of the scale that minimises the squared rounding error of a row.

The idea of llama.cpp's `make_qx_quants`, extended to zero points: for a handful of step widths
around the plain one, round the block, solve for the scale that fits those codes best in the least
squares sense, keep the best. Measured on normal weights, a grid four times as fine, scales of the
other sign or neighbouring zero points would lower the error by less than another 0.5 %.

All blocks of a row are searched side by side, one a vector lane: every sum runs over a block's
columns in their order, whatever the vector width, so the result is the same on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phiconv.kernels.jit import routine
from phiconv.kernels.plain_rule import code, reciprocal_of, round_scale

Array = npt.NDArray[Any]

_COARSE = 5


@routine
def _centred_code(value: Any, reciprocal: Any, low: Any, high: Any) -> Any:
    """`round(clamp(value * reciprocal, low, high))`; how halves are rounded matters little here."""
    scaled = value * reciprocal
    scaled = scaled if scaled > low else low
    return np.rint(scaled if scaled < high else high)


@routine
def _fit(columns: Array, reciprocal: Array, zero: Array, top: Any, dot: Array, norm: Array) -> None:
    """Rounds all blocks and sums `dot = sum(x * c)` and `norm = sum(c * c)` over codes `c`.

    Args:
        columns: `[block_size, blocks]` weights.
        reciprocal: `[blocks]` reciprocal scales.
        zero: `[blocks]` zero points.
        top: The largest code.
        dot: Receives `[blocks]`; `dot / norm` is the scale that fits the codes best, and
            `dot * dot / norm` what it takes off the squared norm of the block.
        norm: Receives `[blocks]`.
    """
    for b in range(dot.shape[0]):
        dot[b] = np.float32(0)
        norm[b] = np.float32(0)
    for j in range(0, columns.shape[0], 4):
        x0, x1, x2, x3 = columns[j], columns[j + 1], columns[j + 2], columns[j + 3]
        for b in range(dot.shape[0]):
            r, low, high = reciprocal[b], -zero[b], top - zero[b]
            c0 = _centred_code(x0[b], r, low, high)
            c1 = _centred_code(x1[b], r, low, high)
            c2 = _centred_code(x2[b], r, low, high)
            c3 = _centred_code(x3[b], r, low, high)
            dot[b] += (x0[b] * c0 + x1[b] * c1) + (x2[b] * c2 + x3[b] * c3)
            norm[b] += (c0 * c0 + c1 * c1) + (c2 * c2 + c3 * c3)


@routine
def _rounding_error(column: Any, scale: Any, reciprocal: Any, zero: Any, top: Any) -> Any:
    """A weight minus what dequantizing its code returns."""
    return column - (np.floor(code(column, reciprocal, zero, top)) - zero) * scale


@routine
def _squared_error(
    columns: Array, scale: Array, reciprocal: Array, zero: Array, top: Any, error: Array
) -> None:
    """Squared error of all blocks, float32 `[blocks]`, against what dequantization returns."""
    for b in range(error.shape[0]):
        error[b] = np.float32(0)
    for j in range(0, columns.shape[0], 4):
        x0, x1, x2, x3 = columns[j], columns[j + 1], columns[j + 2], columns[j + 3]
        for b in range(error.shape[0]):
            s, r, z = scale[b], reciprocal[b], zero[b]
            e0 = _rounding_error(x0[b], s, r, z, top)
            e1 = _rounding_error(x1[b], s, r, z, top)
            e2 = _rounding_error(x2[b], s, r, z, top)
            e3 = _rounding_error(x3[b], s, r, z, top)
            error[b] += (e0 * e0 + e1 * e1) + (e2 * e2 + e3 * e3)


@routine
def _stretch(step: int, top: Any) -> float:
    """How many times more steps to the same range the trial `step` has.

    More steps clip the end of the range, which pays at 4 bits and never at 8. At 4 bits two widths
    beside the best of five find what a grid as fine throughout would, to a thousandth.
    """
    if top > 15:
        return 1 - 0.0125 * step
    if step < _COARSE:
        return 0.85 + 0.075 * step
    return 0.975 if step == _COARSE else 1.025


@routine
def search_scales(
    columns: Array, scale: Array, reciprocal: Array, zero: Array, top: Any, half: bool
) -> None:
    """Replaces scales and their reciprocals where that lowers a block's squared error.

    Args:
        columns: float32 `[block_size, blocks]`, the weights of a row, block by column.
        scale: float32 `[blocks]` scales by the plain rule; receives the better ones.
        reciprocal: float32 `[blocks]`, their reciprocals; updated with them.
        zero: float32 `[blocks]` zero points, which stay.
        top: The largest code, 15 or 255.
        half: Scales are stored as float16.
    """
    blocks = scale.shape[0]
    trial = np.empty(blocks, np.float32)
    dot = np.empty(blocks, np.float32)
    norm = np.empty(blocks, np.float32)
    best = np.full(blocks, np.float32(-1))
    better = scale.copy()
    middle = reciprocal.copy()
    for step in range(_COARSE + 2 if top < 16 else 14):
        if step == _COARSE and top < 16:
            for b in range(blocks):
                middle[b] = reciprocal_of(better[b])
        stretch = _stretch(step, top)
        for b in range(blocks):
            trial[b] = middle[b] * np.float32(stretch)
        _fit(columns, trial, zero, top, dot, norm)
        for b in range(blocks):
            fitted = dot[b] / norm[b]
            gain = (fitted * reciprocal[b]) * (dot[b] * reciprocal[b])
            better[b] = fitted if gain > best[b] else better[b]
            best[b] = gain if gain > best[b] else best[b]
    for b in range(blocks):
        trial[b] = reciprocal_of(better[b])
    _fit(columns, trial, zero, top, dot, norm)
    for b in range(blocks):
        better[b] = round_scale(dot[b] / norm[b], half)
        trial[b] = reciprocal_of(better[b])
    _squared_error(columns, scale, reciprocal, zero, top, dot)
    _squared_error(columns, better, trial, zero, top, norm)
    for b in range(blocks):
        # sums of 256 squares are off by less than 1e-5 of themselves, unless they leave float32's
        # range; where a subnormal scale's reciprocal overflows, the padding counts in the plain one
        exact = np.float32(1e-30) < dot[b] < np.float32(1e38)
        if exact and norm[b] < dot[b] * np.float32(1 - 2e-5) and np.isfinite(reciprocal[b]):
            scale[b] = better[b]
            reciprocal[b] = trial[b]
