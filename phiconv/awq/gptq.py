"""GPTQ on a Gram matrix: its factor, and the blocked rounding of a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
_ROWS = 2048  # rows rounded at once, which bounds the memory
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
    """`H + damping * diag(H) = U U^T` with its inputs reordered, as GPTQ uses it.

    Damping in proportion to each input's own energy, not to the mean, keeps the result the same
    however the inputs are scaled; so one factor serves every scale of the AWQ search.

    Attributes:
        upper: U's diagonal, and above it U divided by the diagonal of the column; float32 [K, K].
        order: The input that each of its rows belongs to, int64 [K].
        groups: The group that each of its groups of rows is, int64 [K / group_size].
    """

    upper: torch.Tensor
    order: NDArray[np.int64]
    groups: NDArray[np.int64]

    @classmethod
    def of(cls, gram: torch.Tensor, damping: float, group_size: int, name: str) -> GramFactor:
        """Factors a Gram matrix in blocks, from the last columns to the first.

        The same on every number of threads: only matrix products are shared among them.

        Args:
            gram: float32 [K, K], symmetric.
            damping: Share of the diagonal added to it.
            group_size: Inputs that share a scale, and so stay together.
            name: The weight, for messages.

        Raises:
            StageError: It is not positive definite in float32, however damped.
        """
        import torch

        order, groups = _by_energy(gram.diagonal().numpy(), group_size)
        chosen = torch.from_numpy(order)
        for attempt in range(4):
            reordered = gram[chosen[:, None], chosen]
            if _factor(reordered, damping * 10**attempt):
                return cls(reordered, order, groups)
        raise StageError(f"the inputs of {name} are degenerate: GPTQ cannot factor their products")


def _by_energy(
    energy: NDArray[np.float32], group_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Groups by falling energy, inputs within a group likewise; an incomplete group stays last.

    What is rounded early is made up for by more of what comes after. Whole groups move, so that
    each keeps its place in memory.
    """
    size = len(energy)
    whole = size // group_size
    by_group = energy[: whole * group_size].reshape(whole, group_size)
    groups = np.argsort(-by_group.sum(axis=1, dtype=np.float64), kind="stable")
    inside = np.argsort(-by_group, axis=1, kind="stable")
    order = (groups[:, None] * group_size + inside[groups]).reshape(-1)
    rest = np.arange(whole * group_size, size)
    if len(rest):
        groups = np.append(groups, whole)
    return np.concatenate([order, rest]), groups


def _factor(upper: torch.Tensor, damping: float) -> bool:
    """Turns a Gram matrix into its factor, in place; returns whether it is positive definite."""
    import torch

    diagonal = upper.diagonal()
    # An input that is always zero is made harmless by a pivot of its own.
    floor = float(diagonal.numpy().mean(dtype=np.float64)) * 1e-6 or 1.0
    diagonal.mul_(1 + damping).clamp_(min=floor)
    size = len(upper)
    for start in reversed(range(0, size, _BLOCK)):
        stop = min(start + _BLOCK, size)
        found = factor_block(upper[start:stop, start:stop].numpy())
        if found is None:
            return False
        block, inverse = found
        pivots = torch.from_numpy(block.diagonal().astype(np.float32))
        above = upper[:start, start:stop] @ torch.from_numpy(inverse.T.astype(np.float32))
        _subtract_square(upper, above, start)
        upper[:start, start:stop] = above / pivots
        ratios = (block / block.diagonal()).astype(np.float32)
        np.fill_diagonal(ratios, block.diagonal())
        upper[start:stop, start:stop] = torch.from_numpy(ratios)
    return True


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
        n, size = weight.stored.shape
        groups = -(-size // self.grid.group_size)
        codes = np.empty((n, size), np.uint8)
        scales, zeros = np.empty((n, groups), np.float32), np.empty((n, groups), np.float32)
        loss = 0.0
        for start in range(0, n, _ROWS):
            rows = slice(start, start + _ROWS)
            part = Folded(
                weight.stored[rows][:, factor.order].astype(np.float32),
                weight.columns[factor.order],
                weight.rows[rows],
            )
            found = self._round_rows(part, factor.upper)
            codes[rows, factor.order] = found.codes
            scales[rows, factor.groups] = found.scales
            zeros[rows, factor.groups] = found.zeros
            loss += found.loss
        return Codes(codes, scales, zeros, loss)

    def _round_rows(self, weight: Folded, upper: torch.Tensor) -> Codes:
        """Rounds rows whose columns are in the order of the factor, block by block."""
        import torch

        n, size = weight.stored.shape
        groups = -(-size // self.grid.group_size)
        found = Codes(
            np.empty((n, size), np.uint8),
            np.empty((n, groups), np.float32),
            np.empty((n, groups), np.float32),
            0.0,
        )
        feedback = torch.zeros(n, size)
        losses = np.zeros(n)
        width = max(_BLOCK, self.grid.group_size)
        for start in range(0, size, width):
            stop = min(start + width, size)
            errors = np.empty((n, stop - start), np.float32)
            block = upper[start:stop, start:stop].contiguous().numpy()
            self._round_block(weight, feedback.numpy(), start, block, found, errors, losses)
            feedback[:, stop:].addmm_(torch.from_numpy(errors), upper[start:stop, stop:])
        return replace(found, loss=float(losses.sum()))

    def _round_block(
        self,
        weight: Folded,
        feedback: NDArray[np.float32],
        start: int,
        upper: NDArray[np.float32],
        found: Codes,
        errors: NDArray[np.float32],
        losses: NDArray[np.float64],
    ) -> None:
        bits, group_size, symmetric = self.grid

        def work(first: int) -> None:
            rows = slice(first, first + _LANES)
            round_columns(
                weight.stored[rows],
                feedback[rows],
                start,
                upper,
                columns=weight.columns,
                rows=weight.rows[rows],
                bits=bits,
                group_size=group_size,
                symmetric=symmetric,
                search=self.search == "mse",
                codes=found.codes[rows],
                scales=found.scales[rows],
                zeros=found.zeros[rows],
                errors=errors[rows],
                losses=losses[rows],
            )

        in_threads(work, range(0, len(errors), _LANES), self.threads)
