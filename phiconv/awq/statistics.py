"""What goes into a weight: mean magnitudes, mean squares, and the Gram matrix of a token sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_FLUSH_TOKENS = 2048  # tokens multiplied at once: long sums for the matrix product, small memory
_STRIP = 1024  # columns of the Gram matrix computed at once


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the inputs of one weight.

    Attributes:
        mean_abs: Mean |x| of each input over all tokens, float64 [K].
        gram: Mean of x x^T over the sampled tokens, float32 [K, K], symmetric.
    """

    mean_abs: NDArray[np.float64]
    gram: torch.Tensor


def sampled_tokens(tokens: int, limit: int) -> NDArray[np.int64]:
    """Indices of at most `limit` of `tokens` tokens, spread evenly."""
    count = min(tokens, limit)
    return np.arange(count, dtype=np.int64) * tokens // count


class StatisticsCollector:
    """Adds up what goes into one weight, batch by batch.

    Sums over tokens are float64, sums of products float32 in a fixed order, so the result does
    not depend on the number of threads.

    Args:
        sample: Ascending indices of the tokens whose products are summed.
    """

    def __init__(self, sample: NDArray[np.int64]):
        self._sample = sample
        self._tokens = 0
        self._abs: torch.Tensor | None = None
        self._gram: torch.Tensor | None = None
        self._pending: list[torch.Tensor] = []

    def add(self, values: torch.Tensor) -> bool:
        """Adds inputs, float32 [tokens, K]; returns whether their squares are finite."""
        import torch

        total = values.abs().sum(dim=0, dtype=torch.float64)
        self._abs = total if self._abs is None else self._abs + total
        first, last = np.searchsorted(self._sample, (self._tokens, self._tokens + len(values)))
        chosen = torch.from_numpy(self._sample[first:last] - self._tokens).to(values.device)
        self._pending.append(values[chosen])
        self._tokens += len(values)
        if sum(map(len, self._pending)) >= _FLUSH_TOKENS:
            self._flush()
        return bool(values.square().sum(dim=0, dtype=torch.float64).isfinite().all())

    def _flush(self) -> None:
        """Adds the products of the pending tokens to the Gram matrix's upper strips."""
        import torch

        if not self._pending:
            return
        values = torch.cat(self._pending)
        self._pending.clear()
        size = values.shape[1]
        if self._gram is None:
            self._gram = torch.zeros(size, size, device=values.device)
        for start in range(0, size, _STRIP):
            strip = values[:, start : start + _STRIP]
            self._gram[start : start + _STRIP, start:].addmm_(strip.T, values[:, start:])

    def result(self) -> InputStatistics:
        """The statistics; the collector is used up.

        Raises:
            ValueError: Nothing was added.
        """
        self._flush()
        if self._gram is None or self._abs is None:
            raise ValueError("no inputs were added")
        gram = self._gram.cpu().div_(len(self._sample))
        size = len(gram)
        for start in range(0, size, _STRIP):
            stop = min(start + _STRIP, size)
            block = gram[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
            gram[stop:, start:stop] = gram[start:stop, stop:].T
        return InputStatistics((self._abs / self._tokens).cpu().numpy(), gram)
