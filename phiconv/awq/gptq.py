"""GPTQ on a Gram matrix: its factor, and the blocked rounding of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from phiconv.awq.rounding import Folded, Search, in_threads
from phiconv.checkpoint.weight_source import Grid
from phiconv.errors import StageError
from phiconv.kernels.gptq import factor_block, round_columns

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_BLOCK = 128  # columns rounded between two updates of those behind them
_LANES = 32  # rows rounded side by side: 128 columns of them are 16 KiB


@dataclass(frozen=True)
class Codes:
    """A weight rounded by GPTQ.

    Attributes:
        codes: One a byte, uint8 [N, K].
        scales: Scales as float16 holds them, float32 [N, groups].
        zeros: Zero points, float32 [N, groups].
        loss: Mean over all inputs of the squared output error, by the damped Gram matrix.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.float32]
    loss: float

    def weights(self, rows: NDArray[np.int64], group_size: int) -> NDArray[np.float32]:
        """What rows stand for, float32 [rows, K]."""
        size = self.codes.shape[1]
        values = self.codes[rows].astype(np.float32)
        values -= np.repeat(self.zeros[rows], group_size, axis=1)[:, :size]
        values *= np.repeat(self.scales[rows], group_size, axis=1)[:, :size]
        return values

    def packed(self, grid: Grid) -> PackedCodes:
        """The codes in the layout of MatMulNBits."""
        n, size = self.codes.shape
        groups = self.scales.shape[1]
        padded = np.zeros((n, groups * grid.group_size), np.uint8)
        padded[:, :size] = self.codes
        zeros = None
        if not grid.symmetric:
            filled = np.full((n, groups + groups % 2), 8, np.uint8)
            filled[:, :groups] = self.zeros
            zeros = _packed(filled, 4) if grid.bits == 4 else filled[:, :groups].copy()
        codes = _packed(padded, grid.bits).reshape(n, groups, -1)
        return PackedCodes(codes, self.scales.astype(np.float16), zeros)


class PackedCodes(NamedTuple):
    """Codes as `phiconv.kernels.matmulnbits.layout` has them.

    Attributes:
        codes: uint8 [N, groups, group_size * bits / 8].
        scales: float16 [N, groups].
        zero_points: uint8 [N, ceil(groups * bits / 8)]; None on a symmetric grid.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zero_points: NDArray[np.uint8] | None


def _packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two codes of 4 bits a byte, the first one low."""
    if bits == 8:
        return codes
    return np.bitwise_or(codes[:, 0::2], np.left_shift(codes[:, 1::2], 4, dtype=np.uint8))


@dataclass(frozen=True)
class GramFactor:
    """`H + damping * diag(H) = U U^T`, as GPTQ uses it.

    Damping in proportion to each input's own energy, not to the mean, keeps the result the same
    however the inputs are scaled; so one factor serves every scale of the AWQ search.

    Attributes:
        upper: U's diagonal, and above it U divided by the diagonal of the column; float32 [K, K].
    """

    upper: torch.Tensor

    @classmethod
    def of(cls, gram: torch.Tensor, damping: float, name: str) -> GramFactor:
        """Factors a Gram matrix in blocks, from the last columns to the first.

        The same on every number of threads: only matrix products are shared among them.

        Args:
            gram: float32 [K, K], symmetric.
            damping: Share of the diagonal added to it.
            name: The weight, for messages.

        Raises:
            StageError: It is not positive definite in float32, however damped.
        """
        for attempt in range(4):
            upper = _factor(gram, damping * 10**attempt)
            if upper is not None:
                return cls(upper)
        raise StageError(f"the inputs of {name} are degenerate: GPTQ cannot factor their products")


def _factor(gram: torch.Tensor, damping: float) -> torch.Tensor | None:
    import torch

    upper = gram.clone()
    diagonal = upper.diagonal()
    # An input that is always zero is made harmless by a pivot of its own.
    floor = float(diagonal.mean()) * 1e-6 or 1.0
    diagonal.mul_(1 + damping).clamp_(min=floor)
    size = len(upper)
    for start in reversed(range(0, size, _BLOCK)):
        stop = min(start + _BLOCK, size)
        found = factor_block(upper[start:stop, start:stop].numpy())
        if found is None:
            return None
        block, inverse = found
        pivots = torch.from_numpy(block.diagonal().astype(np.float32))
        above = upper[:start, start:stop] @ torch.from_numpy(inverse.T.astype(np.float32))
        _subtract_square(upper, above, start)
        upper[:start, start:stop] = above / pivots
        ratios = (block / block.diagonal()).astype(np.float32)
        np.fill_diagonal(ratios, block.diagonal())
        upper[start:stop, start:stop] = torch.from_numpy(ratios)
    return upper


def _subtract_square(
    upper: torch.Tensor, above: torch.Tensor, size: int, strip: int = 1024
) -> None:
    """Subtracts `above above^T` from the upper triangle of the first `size` columns."""
    for start in range(0, size, strip):
        stop = min(start + strip, size)
        upper[:stop, start:stop].addmm_(above[:stop], above[start:stop].T, alpha=-1)


@dataclass(frozen=True)
class Gptq:
    """GPTQ rounding to a grid, with scales rounded to float16.

    Attributes:
        grid: The grid.
        search: How a group's scale is chosen.
        threads: How many threads round.
    """

    grid: Grid
    search: Search
    threads: int

    def round(self, weight: Folded, factor: GramFactor) -> Codes:
        """Rounds every row.

        Args:
            weight: The weight and the factors under which it is rounded.
            factor: Of the Gram matrix of its inputs, before the columns' factors.
        """
        import torch

        bits, group_size, symmetric = self.grid
        n, size = weight.stored.shape
        groups = -(-size // group_size)
        values = weight.stored.astype(np.float32)
        codes = np.empty((n, size), np.uint8)
        scales, zeros = np.empty((n, groups), np.float32), np.empty((n, groups), np.float32)
        feedback = torch.zeros(n, size)
        losses = np.zeros(n)
        width = max(_BLOCK, group_size)
        for start in range(0, size, width):
            stop = min(start + width, size)
            errors = np.empty((n, stop - start), np.float32)
            upper = factor.upper[start:stop, start:stop].contiguous().numpy()

            def work(
                first: int,
                start: int = start,
                errors: NDArray[np.float32] = errors,
                upper: NDArray[np.float32] = upper,
            ) -> None:
                rows = slice(first, first + _LANES)
                round_columns(
                    values[rows],
                    feedback.numpy()[rows],
                    start,
                    upper,
                    columns=weight.columns,
                    rows=weight.rows[rows],
                    bits=bits,
                    group_size=group_size,
                    symmetric=symmetric,
                    search=self.search == "mse",
                    codes=codes[rows],
                    scales=scales[rows],
                    zeros=zeros[rows],
                    errors=errors[rows],
                    losses=losses[rows],
                )

            in_threads(work, range(0, n, _LANES), self.threads)
            feedback[:, stop:].addmm_(torch.from_numpy(errors), factor.upper[start:stop, stop:])
        return Codes(codes, scales, zeros, float(losses.sum()))
