"""What rounding a weight to a grid does to it, by the very kernels that a writer applies."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from phiconv.checkpoint.weight_source import Grid
from phiconv.kernels.matmulnbits import dequantize_rows, layout, quantize_rows
from phiconv.kernels.overlay import scale_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

Search = Literal["none", "mse"]

_BLOCK_ROWS = 64  # rows rounded by one thread at a time: a few MB, which caches hold


@dataclass(frozen=True)
class Folded:
    """A weight as stored, with the factors under which it will be rounded.

    Attributes:
        stored: [N, K] in the checkpoint's dtype.
        columns: Factor of each column, float32 [K].
        rows: Factor of each row, float32 [N].
    """

    stored: NDArray[Any]
    columns: NDArray[np.float32]
    rows: NDArray[np.float32]


@dataclass(frozen=True)
class Nearest:
    """Rounding to the nearest code of a grid, with scales rounded to float16.

    Attributes:
        grid: The grid.
        search: How a block's scale is chosen, as `quantize` names it.
        threads: How many threads round.
    """

    grid: Grid
    search: Search
    threads: int

    def errors(self, weight: Folded, clip: NDArray[np.uint8] | None = None) -> NDArray[np.float32]:
        """What rounding adds to the weight as stored (before its factors), float32 [N, K].

        Args:
            weight: The weight and its factors.
            clip: Clip index of each group, [N, groups].
        """
        out = np.empty(weight.stored.shape, np.float32)

        def work(start: int) -> None:
            stop = min(start + _BLOCK_ROWS, len(out))
            block, rows = out[start:stop], weight.rows[start:stop]
            part = None if clip is None else clip[start:stop]
            stored = weight.stored[start:stop]
            scale_rows(
                stored,
                block,
                columns=weight.columns,
                rows=rows,
                clip=part,
                group_size=self.grid.group_size,
            )
            rounded = self._round_trip(block)
            rounded /= weight.columns
            rounded /= rows[:, None]
            np.subtract(rounded, stored.astype(np.float32), out=block)

        in_threads(work, range(0, len(out), _BLOCK_ROWS), self.threads)
        return out

    def _round_trip(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        bits, group_size, symmetric = self.grid
        shapes = layout(*values.shape, bits=bits, block_size=group_size)
        packed, scales = np.empty(shapes.packed, np.uint8), np.empty(shapes.scales, np.float16)
        zero_points = None if symmetric else np.empty(shapes.zero_points, np.uint8)
        quantize_rows(
            values,
            bits=bits,
            block_size=group_size,
            symmetric=symmetric,
            search=self.search,
            packed=packed,
            scales=scales,
            zero_points=zero_points,
        )
        return dequantize_rows(
            packed,
            scales,
            zero_points,
            bits=bits,
            block_size=group_size,
            K=values.shape[1],
            symmetric=symmetric,
        )


def in_threads(work: Any, items: Any, threads: int) -> None:
    """Calls `work` with each item, on `threads` threads."""
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for done in [pool.submit(work, item) for item in items]:
            done.result()
