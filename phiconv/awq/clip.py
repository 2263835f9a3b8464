"""The clip search: how far each group is clamped before it is rounded.

A group's limit is the one, of eleven between its largest magnitude and half of that, for which the
outputs of the group alone are best: AutoAWQ's objective, written with the group's block of the
Gram matrix as `d^T H_gg d`, which needs no tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from phiconv.awq.rounding import Folded, Nearest
from phiconv.kernels.overlay import MAX_CLIP

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_ROWS = 512  # rows searched at once


def search_clips(weight: Folded, gram: torch.Tensor, nearest: Nearest) -> NDArray[np.uint8]:
    """The best clip index of each group, uint8 [N, groups].

    Args:
        weight: The weight and its factors.
        gram: Gram matrix of its inputs, before the columns' factors, float32 [K, K].
        nearest: The rounding.
    """
    group_size = nearest.grid.group_size
    n, size = weight.stored.shape
    blocks = _diagonal_blocks(gram, group_size)
    chosen = np.empty((n, len(blocks)), np.uint8)
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        part = Folded(weight.stored[rows], weight.columns, weight.rows[rows])
        count = rows.stop - rows.start
        losses = np.empty((MAX_CLIP + 1, count, len(blocks)), np.float32)
        for index in range(MAX_CLIP + 1):
            clip = np.full((count, len(blocks)), index, np.uint8)
            errors = nearest.errors(part, clip)
            losses[index] = _group_losses(errors, blocks, size)
        chosen[rows] = losses.argmin(axis=0)
    return chosen


def _diagonal_blocks(gram: torch.Tensor, group_size: int) -> torch.Tensor:
    """The blocks of the diagonal, [groups, group_size, group_size], zeros beyond the last input."""
    import torch

    size = len(gram)
    groups = -(-size // group_size)
    blocks = torch.zeros(groups, group_size, group_size)
    for group in range(groups):
        part = slice(group * group_size, min((group + 1) * group_size, size))
        width = part.stop - part.start
        blocks[group, :width, :width] = gram[part, part]
    return blocks


def _group_losses(
    errors: NDArray[np.float32], blocks: torch.Tensor, size: int
) -> NDArray[np.float32]:
    """`d^T H_gg d` of each group of each row, [rows, groups]."""
    import torch

    groups, group_size, _ = blocks.shape
    padded = np.zeros((len(errors), groups * group_size), np.float32)
    padded[:, :size] = errors
    by_group = torch.from_numpy(padded).view(len(errors), groups, group_size).transpose(0, 1)
    losses: NDArray[np.float32] = ((by_group @ blocks) * by_group).sum(-1).T.numpy()
    return losses
